//! The control socket, at which takeovers are requested.

use std::{io, os::fd::OwnedFd};

use nix::sys::socket::SockType;

use crate::socket::PathGuard;

/// The socket at which takeovers are requested, and its path.
pub(super) struct Control {
    /// Listens. All generations share this one socket, so nobody in its queue is lost.
    pub(super) fd: OwnedFd,
    /// The lock of the path, and the right to remove it.
    pub(super) guard: PathGuard,
}

/// Copies of everything that a new process gets once it is ready.
pub(super) struct Handover {
    pub(super) control: OwnedFd,
    pub(super) control_lock: OwnedFd,
    /// The locks of listeners that have a path, with the numbers of the listeners.
    pub(super) locks: Vec<(u32, OwnedFd)>,
}

impl Control {
    /// Listens at a path whose lock this process holds.
    pub(super) fn bind(mut guard: PathGuard, mode: u32) -> io::Result<Self> {
        let fd = guard.bind_new(SockType::SeqPacket, mode)?;
        Ok(Self { fd, guard })
    }
}
