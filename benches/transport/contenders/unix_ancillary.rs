use std::os::fd::OwnedFd;

use bytes::Bytes;
use tokio::net::UnixStream;
use unix_ancillary::AsyncUnixStreamExt;

use super::{
    Link, Received, Setup,
    batch::{Batch, Room},
};

/// unix-ancillary on tokio's `UnixStream`. It sends and receives bytes and descriptors, without
/// messages. The code here takes messages of one known length apart, and it can put many into one
/// call.
pub(crate) struct UnixAncillary {
    stream: UnixStream,
    waiting: Batch,
    room: Room,
}

impl Link for UnixAncillary {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        let stream = UnixStream::from_std(socket.into()).expect("the socket can be registered");
        Self { stream, waiting: Batch::default(), room: Room::new(setup.load) }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.waiting.push(payload, fd);
    }

    async fn flush(&mut self) {
        let fds = std::mem::take(&mut self.waiting.fds);
        let bytes = self.waiting.in_one_piece();
        if !bytes.is_empty() {
            self.stream.send_fds_all(bytes, &fds).await.expect("sending");
        }
        self.waiting.clear();
    }

    async fn recv(&mut self, received: &mut Received) {
        let (bytes, fds) =
            self.stream.recv_fds_into::<253>(self.room.spare()).await.expect("receiving");
        self.room.received(bytes);
        received.bytes += bytes;
        received.fds.extend(fds);
    }
}
