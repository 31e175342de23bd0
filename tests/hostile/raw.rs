//! Sockets without the library under test.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::SocketAddr,
    },
};

use fdwire::SocketKind;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, UnixAddr, connect, recv, sendmsg,
        socket, socketpair,
    },
};
use rustix::{
    cmsg_space,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};

use crate::common::sock_type;

pub(crate) fn pair(kind: SocketKind) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, sock_type(kind), None, SockFlag::SOCK_CLOEXEC).unwrap()
}

pub(crate) fn connected_to(addr: &SocketAddr, kind: SocketKind) -> OwnedFd {
    connected_to_name(addr.as_abstract_name().unwrap(), kind)
}

/// Connects a socket to the listener at an abstract name.
pub(crate) fn connected_to_name(name: &[u8], kind: SocketKind) -> OwnedFd {
    let ours = socket(AddressFamily::Unix, sock_type(kind), SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(ours.as_raw_fd(), &UnixAddr::new_abstract(name).unwrap()).unwrap();
    ours
}

/// Makes one `sendmsg`. Returns `None` if the kernel refuses the descriptors (`ETOOMANYREFS`): one
/// is nested too deeply, or too many are in flight.
pub(crate) fn try_send(socket: &impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> Option<()> {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let place = [IoSlice::new(bytes)];
    match sendmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &place, &control, MsgFlags::empty(), None)
    {
        Ok(_) => Some(()),
        Err(Errno::ETOOMANYREFS) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Makes one `recvmsg`. Returns the bytes and the descriptors.
///
/// # Errors
/// Returns the error of the call.
pub(crate) fn receive(
    socket: &impl AsFd,
    wait: bool,
) -> rustix::io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut control = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut control);
    let mut bytes = vec![0; 4096];
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    flags.set(RecvFlags::DONTWAIT, !wait);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?.bytes;
    bytes.truncate(received);
    let rights = |message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    };
    Ok((bytes, control.drain().filter_map(rights).flatten().collect()))
}

/// Returns true if nothing that was sent to this socket waits in the kernel.
pub(crate) fn nothing_is_unread(socket: &impl AsFd) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_fd().as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}
