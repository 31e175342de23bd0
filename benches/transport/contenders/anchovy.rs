use std::{
    io::IoSlice,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use anchovy::{AnchovyStream, DBUS_FD_LIMIT};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Link, Received, Setup,
    batch::{Batch, Room},
};

/// anchovy. It sends and receives bytes and a queue of descriptors, without messages. The code here
/// takes messages of one known length apart, and it can put many into one write.
pub(crate) struct Anchovy {
    stream: AnchovyStream<DBUS_FD_LIMIT>,
    waiting: Batch,
    room: Room,
}

impl Link for Anchovy {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        let stream =
            AnchovyStream::new(UnixStream::from(socket)).expect("the socket can be registered");
        Self { stream, waiting: Batch::default(), room: Room::new(setup.load) }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.waiting.push(payload, fd);
    }

    async fn flush(&mut self) {
        let Self { stream, waiting, .. } = self;
        let call = async |pieces: &[IoSlice<'_>], fds: &mut Vec<OwnedFd>| {
            stream.write_queue_mut().extend(fds.drain(..));
            match pieces {
                [piece] => stream.write(piece).await,
                pieces => stream.write_vectored(pieces).await,
            }
        };
        waiting.send_all(&mut { usize::MAX }, call).await;
    }

    async fn recv(&mut self, received: &mut Received) {
        let bytes = self.stream.read(self.room.spare()).await.expect("receiving");
        self.room.received(bytes);
        received.bytes += bytes;
        received.fds.extend(self.stream.read_queue_mut().drain(..));
    }
}
