//! The contenders: ways to send and receive messages over one connected socket.

mod anchovy;
pub(crate) mod bare;
mod batch;
mod fdwire;
mod ipc_channel;
mod length_delimited;
mod tokio_seqpacket;
mod tokio_unix_ipc;
mod unix_ancillary;

use std::os::fd::OwnedFd;

use ::fdwire::SocketKind;
use bytes::Bytes;

pub(crate) use self::{
    anchovy::Anchovy,
    bare::Bare,
    fdwire::Fdwire,
    ipc_channel::{IpcChannel, IpcSharedMem},
    length_delimited::LengthDelimited,
    tokio_seqpacket::TokioSeqpacket,
    tokio_unix_ipc::TokioUnixIpc,
    unix_ancillary::UnixAncillary,
};

/// Longest message of any row, for contenders that have a limit.
pub(crate) const LONGEST_MESSAGE: usize = 64 << 20;

/// From this length on a receiver of bytes reads each message into its own memory; shorter ones
/// arrive many at a time.
const LONG_MESSAGE: usize = 64 << 10;

/// The messages of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) bytes: usize,
    /// Whether each carries a descriptor.
    pub(crate) fd: bool,
    /// Messages between two flushes.
    pub(crate) batch: usize,
}

/// The process of an end: the one that measures, or the one that it has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Near,
    Far,
}

/// The facts that a contender needs to take over its end of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) kind: SocketKind,
    pub(crate) side: Side,
    pub(crate) load: Load,
}

/// The messages and descriptors that have arrived.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) bytes: usize,
    /// Descriptors, to be closed or sent back.
    pub(crate) fds: Vec<OwnedFd>,
    /// Handles that the contender keeps, because they are not descriptors to its users.
    pub(crate) handles: usize,
}

/// One end of a connection. Synchronous contenders block in its methods.
pub(crate) trait Link: Sized + 'static {
    /// Whether it can pass any descriptor. If not, it gets none, and if [`Load::fd`] is set, it
    /// sends a handle of its own.
    const PASSES_FDS: bool = true;

    /// Takes over a non-blocking socket. Called inside a runtime.
    fn new(socket: OwnedFd, setup: Setup) -> Self;

    /// Sends a message, or keeps it for [`flush`](Self::flush). The descriptor is a file that this
    /// process has opened. It is closed once it is sent.
    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>);

    /// Sends a message with a socket.
    async fn send_socket(&mut self, payload: &Bytes, socket: OwnedFd) {
        self.send(payload, Some(socket)).await;
    }

    /// Sends a message with a descriptor that the peer has sent.
    async fn send_back(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.send(payload, fd).await;
    }

    /// Sends the messages that are kept.
    async fn flush(&mut self);

    /// Receives one message, several, or a part of one. Contenders that know the bounds of messages
    /// check their length.
    async fn recv(&mut self, received: &mut Received);
}
