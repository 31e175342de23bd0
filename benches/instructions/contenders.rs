use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_util::codec::LengthDelimitedCodec;

use crate::{BATCH, MESSAGE_BYTES};

/// One end of a connection. The methods never wait: the socket has room for a batch, and a batch
/// arrives as a whole.
pub(crate) trait Link: Sized {
    const NAME: &str;

    /// Connects two ends. Called inside a runtime.
    fn pair() -> (Self, Self);

    /// Feeds a batch of messages and flushes once.
    fn send_batch(&mut self, payload: &Bytes);

    /// Receives a batch, and checks the length of each message.
    fn receive_batch(&mut self);
}

/// fdwire's `Framed` with its `FrameCodec`.
pub(crate) struct Fdwire(fdwire::Framed<FrameCodec>);

impl Link for Fdwire {
    const NAME: &str = "FrameCodec";

    fn pair() -> (Self, Self) {
        let (a, b) = Socket::pair(SocketKind::Stream).expect("a pair of sockets");
        let framed = |socket| Self(fdwire::Framed::new(socket, FrameCodec::default()));
        (framed(a), framed(b))
    }

    fn send_batch(&mut self, payload: &Bytes) {
        let batch = async {
            for _ in 0..BATCH {
                self.0.feed(Frame::new(payload.clone())).await.expect("it is accepted");
            }
            self.0.flush().await.expect("it is sent");
        };
        batch.now_or_never().expect("there is room for a batch");
    }

    fn receive_batch(&mut self) {
        let batch = async {
            for _ in 0..BATCH {
                let frame = self.0.next().await.expect("the peer is there").expect("a frame");
                assert_eq!(frame.payload.len(), MESSAGE_BYTES);
            }
        };
        batch.now_or_never().expect("a batch is there");
    }
}

/// tokio-util's `Framed` with its `LengthDelimitedCodec`. It passes no descriptors.
pub(crate) struct LengthDelimited(tokio_util::codec::Framed<UnixStream, LengthDelimitedCodec>);

impl Link for LengthDelimited {
    const NAME: &str = "LengthDelimitedCodec";

    fn pair() -> (Self, Self) {
        let (a, b) = UnixStream::pair().expect("a pair of sockets");
        // The same buffers as fdwire's. By default the read buffer has 8 KiB, and more than 8 KiB
        // of messages are sent before the flush.
        let framed = |stream| {
            let mut framed = tokio_util::codec::Framed::with_capacity(
                stream,
                LengthDelimitedCodec::new(),
                64 << 10,
            );
            framed.set_backpressure_boundary(256 << 10);
            Self(framed)
        };
        (framed(a), framed(b))
    }

    fn send_batch(&mut self, payload: &Bytes) {
        let batch = async {
            for _ in 0..BATCH {
                self.0.feed(payload.clone()).await.expect("it is accepted");
            }
            SinkExt::<Bytes>::flush(&mut self.0).await.expect("it is sent");
        };
        batch.now_or_never().expect("there is room for a batch");
    }

    fn receive_batch(&mut self) {
        let batch = async {
            for _ in 0..BATCH {
                let message = self.0.next().await.expect("the peer is there").expect("a message");
                assert_eq!(message.len(), MESSAGE_BYTES);
            }
        };
        batch.now_or_never().expect("a batch is there");
    }
}
