use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_util::codec::LengthDelimitedCodec;

use crate::{BATCH, MESSAGE_BYTES};

/// One end of a connection. The methods never wait: the socket has room for a batch, and a batch
/// comes whole.
pub(crate) trait Link: Sized {
    const NAME: &str;

    /// Both ends, inside of a runtime.
    fn pair() -> (Self, Self);

    fn send_batch(&mut self, payload: &Bytes);

    fn receive_batch(&mut self);
}

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

pub(crate) struct LengthDelimited(tokio_util::codec::Framed<UnixStream, LengthDelimitedCodec>);

impl Link for LengthDelimited {
    const NAME: &str = "LengthDelimitedCodec";

    fn pair() -> (Self, Self) {
        let (a, b) = UnixStream::pair().expect("a pair of sockets");
        // As fdwire has it: the default read buffer has 8 KiB, and 8 KiB of messages are sent
        // without a flush.
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
