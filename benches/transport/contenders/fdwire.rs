use std::os::fd::OwnedFd;

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Framed, Limits, SendFd, Socket};
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
        Framed::new(
            Socket::try_from(socket).expect("a connected Unix socket"),
            FrameCodec::new(limits),
        )
    }

    async fn feed(&mut self, payload: &Bytes, fd: Option<SendFd>) {
        self.framed.feed(Frame::from_parts(payload.clone(), fd)).await.expect("sending");
    }
}

impl Link for Fdwire {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        Self { framed: Self::framed(socket), message_bytes: setup.load.bytes }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.feed(payload, fd.map(SendFd::assume_file)).await;
    }

    async fn send_socket(&mut self, payload: &Bytes, socket: OwnedFd) {
        self.feed(payload, Some(SendFd::assume_socket(socket))).await;
    }

    async fn send_back(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.feed(payload, fd.map(SendFd::from)).await;
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
