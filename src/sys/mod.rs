//! The system calls, and **all `unsafe` of the crate**, one block for each call.
#![allow(unsafe_code)]

mod address;
mod buf_mut;
mod close;
mod credentials;
mod exit;
mod inherited;
mod kind;
mod lock;
#[cfg(feature = "serde")]
mod map;
mod message;
mod option;
mod poll;
mod process;
mod readiness;

pub(crate) use close::close_all;
pub(crate) use credentials::{may_have_same_file, overflow_id};
pub(crate) use exit::{ExitCloser, most_sockets_at_once};
pub(crate) use inherited::{copy_inherited, take_inherited};
pub(crate) use kind::{FileKind, FileType, file_kind, is_sealed, is_socket, new_memfd};
pub(crate) use lock::{try_lock, unlock};
#[cfg(feature = "serde")]
pub(crate) use map::map_sealed;
pub(crate) use message::{Received, recv_datagram, recvmsg, send_datagram, sendmsg};
pub(crate) use option::{Cookie, Domain, PassPidfd, PassRights, Protocol, switch_off_linger};
pub(crate) use poll::{Event, has_changed, wait_for};
pub(crate) use process::{kill, pidfd_open};
pub(crate) use readiness::{CloseFd, FdGuard, register};

use std::{
    io,
    mem::ManuallyDrop,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            self,
            net::{UnixListener, UnixStream},
        },
    },
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{SockFlag, accept4},
};

/// Returns true if descriptors or memory have run out. That is usually temporary.
#[cfg(any(feature = "handoff", feature = "takeover"))]
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Takes a connection off a listener's queue, close-on-exec.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes a connection off the queue of a TCP listener, non-blocking and close-on-exec, with the
/// address of its client. To get the address later would take another call, which fails if the
/// client has gone meanwhile.
pub(crate) fn accept_tcp(listener: BorrowedFd<'_>) -> io::Result<(TcpStream, SocketAddr)> {
    // SAFETY: the descriptor stays open for the call, and is not closed, because the listener is
    // not dropped.
    let listener = ManuallyDrop::new(unsafe { TcpListener::from_raw_fd(listener.as_raw_fd()) });
    let (stream, peer) = listener.accept()?;
    stream.set_nonblocking(true)?;
    Ok((stream, peer))
}

/// Takes a connection off the queue of a listener of Unix sockets, as [`accept_tcp`] does.
pub(crate) fn accept_unix(
    listener: BorrowedFd<'_>,
) -> io::Result<(UnixStream, unix::net::SocketAddr)> {
    // SAFETY: the descriptor stays open for the call, and is not closed, because the listener is
    // not dropped.
    let listener = ManuallyDrop::new(unsafe { UnixListener::from_raw_fd(listener.as_raw_fd()) });
    let (stream, peer) = listener.accept()?;
    stream.set_nonblocking(true)?;
    Ok((stream, peer))
}

/// Returns the size of what was sent on a Unix socket and not received, in bytes of the kernel's
/// memory. It is 0 when the peer has received everything (`SIOCOUTQ`, which is `TIOCOUTQ`).
pub(crate) fn unreceived(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes an int, to one that lives until it returns.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    Errno::result(outcome)?;
    Ok(bytes as usize)
}

/// Returns the number of bytes that a Unix socket has received and that were not read (`SIOCINQ`).
/// Empty packets do not count.
pub(crate) fn unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes an int, to one that lives until it returns.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    Errno::result(outcome)?;
    Ok(bytes as usize)
}
