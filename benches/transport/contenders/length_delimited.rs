use std::os::fd::OwnedFd;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::{LONG_MESSAGE, LONGEST_MESSAGE, Link, Received, Setup};

/// tokio's `UnixStream` with tokio-util's `LengthDelimitedCodec`, fed and flushed like fdwire. It
/// passes no descriptors.
pub(crate) struct LengthDelimited {
    framed: Framed<UnixStream, LengthDelimitedCodec>,
    message_bytes: usize,
}

impl Link for LengthDelimited {
    const PASSES_FDS: bool = false;

    fn new(socket: OwnedFd, setup: Setup) -> Self {
        let stream = UnixStream::from_std(socket.into()).expect("the socket can be registered");
        let codec = LengthDelimitedCodec::builder().max_frame_length(LONGEST_MESSAGE).new_codec();
        // Its own default is 8 KiB.
        let mut framed = Framed::with_capacity(stream, codec, LONG_MESSAGE);
        // The same as fdwire's, so that a batch goes in one call.
        framed.set_backpressure_boundary(256 << 10);
        Self { framed, message_bytes: setup.load.bytes }
    }

    async fn send(&mut self, payload: &Bytes, _: Option<OwnedFd>) {
        self.framed.feed(payload.clone()).await.expect("sending");
    }

    async fn flush(&mut self) {
        SinkExt::<Bytes>::flush(&mut self.framed).await.expect("sending");
    }

    async fn recv(&mut self, received: &mut Received) {
        let message = self.framed.next().await.expect("the peer is there").expect("receiving");
        assert_eq!(message.len(), self.message_bytes);
        received.bytes += message.len();
    }
}
