//! The conversions from other types of socket and into them.

use std::{
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix,
    },
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{self, SockType, UnixAddr, getsockopt, sockopt},
};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::{Listener, PassCredentials, Socket, SocketKind, SocketState, open::set_nonblocking};
use crate::{
    closer::{BackgroundFd, close_in_background},
    sys,
};

/// Takes a connected Unix socket of either kind. Its file status flags are left alone, since other
/// holders of the socket share them. `SO_PASSCRED` and `SO_PASSPIDFD` are switched off, because
/// their control messages take the room of descriptors.
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

/// Takes a connected Unix socket of either kind, as `TryFrom<OwnedFd>` describes it.
pub(crate) fn connected(fd: OwnedFd) -> Result<(BackgroundFd, SocketState)> {
    let (fd, kind) = checked(fd, |fd| {
        let kind = unix_socket_kind(fd)?;
        if getsockopt(fd, sockopt::AcceptConn)? {
            return Err(invalid_descriptor("it is a listening socket"));
        }
        match socket::getpeername::<UnixAddr>(fd.as_raw_fd()) {
            Err(Errno::ENOTCONN) => return Err(invalid_descriptor("it is not connected")),
            connected => drop(connected?),
        }
        PassCredentials::No.set(fd)?;
        Ok(kind)
    })?;
    let state = SocketState::new(kind, None);
    Ok((state.guard(fd), state))
}

/// Returns a descriptor that passes a check, with what the check returns. Another one is closed in
/// the background: a peer that sent it may have made its `close` slow.
pub(super) fn checked<T>(fd: OwnedFd, check: impl FnOnce(&OwnedFd) -> Result<T>) -> Result<(OwnedFd, T)> {
    match check(&fd) {
        Ok(found) => Ok((fd, found)),
        Err(error) => {
            close_in_background([fd]);
            Err(error)
        }
    }
}

pub(super) fn unix_socket_kind(fd: &OwnedFd) -> Result<SocketKind> {
    match unix_socket_type(fd)? {
        SockType::SeqPacket => Ok(SocketKind::SeqPacket),
        SockType::Stream => Ok(SocketKind::Stream),
        _ => Err(invalid_descriptor("it is neither SOCK_SEQPACKET nor SOCK_STREAM")),
    }
}

pub(super) fn unix_socket_type(fd: &OwnedFd) -> Result<SockType> {
    match getsockopt(fd, sys::Domain) {
        Err(Errno::ENOTSOCK) => Err(invalid_descriptor("it is not a socket")),
        domain if domain? != libc::AF_UNIX => Err(invalid_descriptor("it is not a Unix socket")),
        _ => Ok(getsockopt(fd, sockopt::SockType)?),
    }
}

pub(super) fn invalid_descriptor(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("descriptor cannot be used: {reason}"))
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

impl TryFrom<UnixSeqpacket> for Socket {
    type Error = Error;

    fn try_from(seqpacket: UnixSeqpacket) -> Result<Self> {
        OwnedFd::from(seqpacket).try_into()
    }
}

/// # Errors
/// `InvalidInput` if the socket is not of kind [`SocketKind::Stream`]. It is closed then.
impl TryFrom<Socket> for unix::net::UnixStream {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        match socket.kind() {
            SocketKind::Stream => Ok(OwnedFd::from(socket).into()),
            SocketKind::SeqPacket => Err(invalid_descriptor("it is SOCK_SEQPACKET, SOCK_STREAM is expected")),
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

/// Makes the socket non-blocking, for every holder.
///
/// # Errors
/// `InvalidInput` if the socket is not of kind [`SocketKind::SeqPacket`]. It is closed then.
impl TryFrom<Socket> for UnixSeqpacket {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        match socket.kind() {
            SocketKind::SeqPacket => {
                set_nonblocking(&socket, true)?;
                OwnedFd::from(socket).try_into()
            }
            SocketKind::Stream => Err(invalid_descriptor("it is SOCK_STREAM, SOCK_SEQPACKET is expected")),
        }
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

impl TryFrom<UnixSeqpacketListener> for Listener {
    type Error = Error;

    fn try_from(listener: UnixSeqpacketListener) -> Result<Self> {
        OwnedFd::from(listener).try_into()
    }
}
