use std::os::fd::OwnedFd;

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Framed, Limits, Socket};
use futures::{SinkExt, StreamExt};

use super::{LONGEST_MESSAGE, Link, Received, Setup};

/// This crate, on either kind of socket.
pub(crate) struct Fdwire {
    framed: Framed<FrameCodec>,
    message_bytes: usize,
}

impl Fdwire {
    pub(crate) fn framed(socket: OwnedFd) -> Framed<FrameCodec> {
        let limits = Limits::default().max_payload_bytes(LONGEST_MESSAGE);
        Framed::new(Socket::try_from(socket).expect("a connected Unix socket"), FrameCodec::new(limits))
    }
}

impl Link for Fdwire {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        Self { framed: Self::framed(socket), message_bytes: setup.load.bytes }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        let frame = Frame::new(payload.clone());
        self.framed.feed(if let Some(fd) = fd { frame.with_fd(fd) } else { frame }).await.expect("sending");
    }

    async fn flush(&mut self) {
        self.framed.flush().await.expect("sending");
    }

    async fn recv(&mut self, received: &mut Received) {
        let frame = self.framed.next().await.expect("the peer is there").expect("receiving");
        assert_eq!(frame.payload.len(), self.message_bytes);
        received.bytes += frame.payload.len();
        if !frame.fds.is_empty() {
            received.fds.extend(frame.fds);
        }
    }
}
