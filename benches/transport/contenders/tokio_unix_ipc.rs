use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bytes::Bytes;
use tokio_unix_ipc::{RawReceiver, RawSender, raw_channel_from_std};

use super::{Link, Received, Setup, batch::Batch};

/// The raw channel of tokio-unix-ipc, which its typed channel is made of. By hand, many messages
/// can go in one of the channel's.
pub(crate) struct TokioUnixIpc {
    sender: RawSender,
    receiver: RawReceiver,
    waiting: Batch,
}

impl Link for TokioUnixIpc {
    fn new(socket: OwnedFd, _: Setup) -> Self {
        let (sender, receiver) =
            raw_channel_from_std(socket.into()).expect("the socket can be registered");
        Self { sender, receiver, waiting: Batch::default() }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.waiting.push(payload, fd);
    }

    async fn flush(&mut self) {
        let fds = std::mem::take(&mut self.waiting.fds);
        let raw_fds = fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        let bytes = self.waiting.in_one_piece();
        if !bytes.is_empty() {
            assert_eq!(self.sender.send(bytes, &raw_fds).await.expect("sending"), bytes.len());
        }
        self.waiting.clear();
    }

    #[allow(unsafe_code, reason = "tokio-unix-ipc returns received descriptors as numbers")]
    async fn recv(&mut self, received: &mut Received) {
        let (message, fds) = self.receiver.recv().await.expect("receiving");
        received.bytes += message.len();
        // SAFETY: the kernel has just installed it in this process, for this message.
        received
            .fds
            .extend(fds.into_iter().flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
    }
}
