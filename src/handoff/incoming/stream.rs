//! The socket of a connection that was offered, in the event loop of this process.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::handoff::Transport;

/// The socket of a [`Connection`](super::Connection), registered with tokio.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectionStream {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A Unix socket of kind STREAM.
    Unix(UnixStream),
}

impl ConnectionStream {
    /// Registers the socket with the event loop. If that fails, this copy is closed at once. It is
    /// not the last one, because the dispatcher keeps its copy until it has the answer.
    pub(super) fn new(transport: Transport, fd: OwnedFd) -> io::Result<Self> {
        match transport {
            Transport::Tcp => TcpStream::from_std(fd.into()).map(Self::Tcp),
            Transport::UnixStream => UnixStream::from_std(fd.into()).map(Self::Unix),
        }
    }

    /// Takes the socket out of the event loop.
    pub(super) fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(stream) => stream.into_std().map(OwnedFd::from),
            Self::Unix(stream) => stream.into_std().map(OwnedFd::from),
        }
    }

    pub(super) fn as_read(&mut self) -> &mut (dyn AsyncRead + Unpin) {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    pub(super) fn as_write(&mut self) -> &mut (dyn AsyncWrite + Unpin) {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }
}

impl AsFd for ConnectionStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}
