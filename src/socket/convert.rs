//! Conversions from and into other types of socket.

use std::{
    io::{Error, Result},
    os::{fd::OwnedFd, unix},
};

use super::{
    Listener, Socket, SocketKind,
    check::{connected, invalid_descriptor},
};

/// Takes a connected Unix socket of either kind. Its file status flags stay as they are, because
/// other holders of the socket share them. `SO_PASSCRED` and `SO_PASSPIDFD` are switched off,
/// because their control messages would use up the buffer for descriptors.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for Socket {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        let (fd, state) = connected(fd)?;
        Self::register_with(fd, state)
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.io.into_inner().into_fd()
    }
}

impl TryFrom<unix::net::UnixStream> for Socket {
    type Error = Error;

    fn try_from(stream: unix::net::UnixStream) -> Result<Self> {
        OwnedFd::from(stream).try_into()
    }
}

impl TryFrom<tokio::net::UnixStream> for Socket {
    type Error = Error;

    fn try_from(stream: tokio::net::UnixStream) -> Result<Self> {
        stream.into_std()?.try_into()
    }
}

/// # Errors
/// `InvalidInput` if the socket is not of kind [`SocketKind::Stream`]. It is closed then.
impl TryFrom<Socket> for unix::net::UnixStream {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        match socket.kind() {
            SocketKind::Stream => Ok(OwnedFd::from(socket).into()),
            SocketKind::SeqPacket => {
                Err(invalid_descriptor("it is SOCK_SEQPACKET, SOCK_STREAM is expected"))
            }
        }
    }
}

/// Makes the socket non-blocking, for every holder.
///
/// # Errors
/// `InvalidInput` if the socket is not of kind [`SocketKind::Stream`]. It is closed then.
impl TryFrom<Socket> for tokio::net::UnixStream {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        let stream = unix::net::UnixStream::try_from(socket)?;
        stream.set_nonblocking(true)?;
        Self::from_std(stream)
    }
}

impl TryFrom<unix::net::UnixListener> for Listener {
    type Error = Error;

    fn try_from(listener: unix::net::UnixListener) -> Result<Self> {
        OwnedFd::from(listener).try_into()
    }
}

impl TryFrom<tokio::net::UnixListener> for Listener {
    type Error = Error;

    fn try_from(listener: tokio::net::UnixListener) -> Result<Self> {
        listener.into_std()?.try_into()
    }
}
