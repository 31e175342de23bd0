//! Making, connecting and naming sockets.

use std::{
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::SocketAddr,
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr},
};

use super::SocketKind;

/// Makes two connected sockets.
pub(crate) fn new_pair(kind: SocketKind) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socket::socketpair(AddressFamily::Unix, sock_type(kind), None, SockFlag::SOCK_CLOEXEC)?)
}

/// Makes a socket.
pub(crate) fn new_socket(kind: SocketKind) -> Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, sock_type(kind), SockFlag::SOCK_CLOEXEC, None)?)
}

/// Makes a non-blocking socket. `connect` and `accept` have no flag that makes one call
/// non-blocking.
pub(super) fn new_nonblocking(kind: SocketKind) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, sock_type(kind), flags, None)?)
}

fn sock_type(kind: SocketKind) -> SockType {
    match kind {
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Stream => SockType::Stream,
    }
}

/// Connects a socket. A blocking one waits while the listener's backlog is full.
///
/// # Errors
/// The errors of connect(2). `WouldBlock` if the backlog is full and the socket is non-blocking.
pub(crate) fn connect(fd: &OwnedFd, addr: &UnixAddr) -> Result<()> {
    loop {
        match socket::connect(fd.as_raw_fd(), addr) {
            Err(Errno::EINTR) => {}
            connected => return Ok(connected?),
        }
    }
}

/// Changes `O_NONBLOCK` of the open file, which all holders share.
pub(super) fn set_nonblocking(fd: impl AsFd, yes: bool) -> Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, yes);
    fcntl(&fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Converts an address to the type that the system calls take.
///
/// # Errors
/// `InvalidInput` if the address is unnamed.
pub(crate) fn unix_addr(addr: &SocketAddr) -> Result<UnixAddr> {
    match (addr.as_pathname(), addr.as_abstract_name()) {
        (Some(path), _) => Ok(UnixAddr::new(path)?),
        (_, Some(name)) => Ok(UnixAddr::new_abstract(name)?),
        _ => Err(Error::new(ErrorKind::InvalidInput, "the address has no name")),
    }
}

/// Returns the address to which a socket is bound, or `None` if it is not bound.
pub(super) fn local_addr(socket: &impl AsRawFd) -> Result<Option<SocketAddr>> {
    let addr = socket::getsockname::<UnixAddr>(socket.as_raw_fd())?;
    match (addr.path(), addr.as_abstract()) {
        (Some(path), _) => SocketAddr::from_pathname(path).map(Some),
        (_, Some(name)) => SocketAddr::from_abstract_name(name).map(Some),
        _ => Ok(None),
    }
}
