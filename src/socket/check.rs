//! The checks of a descriptor before it becomes a socket.

use std::{
    io::{Error, ErrorKind, Result},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{self, SockType, UnixAddr, getsockopt, sockopt},
};

use super::{PassCredentials, SocketKind, SocketState};
use crate::{
    closer::{BackgroundFd, close_in_background},
    sys,
};

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

/// Checks a descriptor, and returns it with the result of the check. If the check fails, the
/// descriptor is closed in the background, because a peer that sent it may have made its `close`
/// slow.
pub(super) fn checked<T>(
    fd: OwnedFd,
    check: impl FnOnce(&OwnedFd) -> Result<T>,
) -> Result<(OwnedFd, T)> {
    match check(&fd) {
        Ok(found) => Ok((fd, found)),
        Err(error) => {
            close_in_background([fd]);
            Err(error)
        }
    }
}

/// Returns the kind of a Unix socket.
pub(super) fn unix_socket_kind(fd: &OwnedFd) -> Result<SocketKind> {
    match unix_socket_type(fd)? {
        SockType::SeqPacket => Ok(SocketKind::SeqPacket),
        SockType::Stream => Ok(SocketKind::Stream),
        _ => Err(invalid_descriptor("it is neither SOCK_SEQPACKET nor SOCK_STREAM")),
    }
}

/// Returns the type of a Unix socket (`SO_TYPE`).
pub(super) fn unix_socket_type(fd: &OwnedFd) -> Result<SockType> {
    match getsockopt(fd, sys::Domain) {
        Err(Errno::ENOTSOCK) => Err(invalid_descriptor("it is not a socket")),
        domain if domain? != libc::AF_UNIX => Err(invalid_descriptor("it is not a Unix socket")),
        _ => Ok(getsockopt(fd, sockopt::SockType)?),
    }
}

/// Returns the error for a descriptor that fails a check.
pub(super) fn invalid_descriptor(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("descriptor cannot be used: {reason}"))
}
