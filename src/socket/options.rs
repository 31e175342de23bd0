//! The options of a socket, and the process at its other end.

use std::{
    fmt,
    io::Result,
    net::Shutdown,
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::socket::{getsockopt, sockopt};

use super::{PassCredentials, Socket, SocketKind};
use crate::credentials::write_process;

/// The process at the other end, as it was when it called `connect`, `listen` or `socketpair`
/// (`SO_PEERCRED`, unix(7)).
///
/// If a parent process has made a pair of sockets, this is the **parent**, even if a child uses the
/// other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerCred {
    /// The effective user id.
    pub uid: u32,
    /// The effective group id.
    pub gid: u32,
    /// The process id. `None` if the process is in another PID namespace.
    pub pid: Option<i32>,
}

impl PeerCred {
    /// Returns the peer of a socket.
    pub(super) fn of(socket: &impl AsFd) -> Result<Self> {
        let cred = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { uid: cred.uid(), gid: cred.gid(), pid: Some(cred.pid()).filter(|&pid| pid != 0) })
    }
}

impl fmt::Display for PeerCred {
    /// Writes the ids, for example `process 812 of uid 1000, gid 1000`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_process(f, self.pid, self.uid, self.gid)
    }
}

impl Socket {
    /// Returns the kind of the socket.
    pub fn kind(&self) -> SocketKind {
        self.endpoint().kind()
    }

    /// Returns the process at the other end.
    ///
    /// # Errors
    /// The errors of getsockopt(2).
    pub fn peer_cred(&self) -> Result<PeerCred> {
        self.endpoint().peer_cred()
    }

    /// Returns a pidfd of the process that [`peer_cred`](Self::peer_cred) names (`SO_PEERPIDFD`,
    /// Linux 6.5). It becomes readable when that process ends. A process id may be used again for
    /// another process, but a pidfd always means the same one.
    ///
    /// Linux 6.16 and later return a pidfd even if the process has ended and was reaped. Then it is
    /// readable at once.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.5. Before 6.16 also an error, such as `ESRCH`, if the process
    /// was reaped.
    pub fn peer_pidfd(&self) -> Result<OwnedFd> {
        self.endpoint().peer_pidfd()
    }

    /// Returns the size of the send buffer in bytes, as the kernel counts it (`SO_SNDBUF`,
    /// socket(7)). A packet holds at most 32 bytes less.
    ///
    /// # Errors
    /// The errors of getsockopt(2).
    pub fn send_buffer_size(&self) -> Result<usize> {
        self.endpoint().send_buffer_size()
    }

    /// Requests a send buffer of `bytes` bytes. The kernel limits the number to
    /// `/proc/sys/net/core/wmem_max`, and then doubles it for its own bookkeeping. Call it before
    /// you make a [`Framed`](crate::Framed) of the socket.
    ///
    /// For frames of 1 MiB and more on SEQPACKET, a buffer of 4 MiB instead of the usual 208 KiB
    /// gives four times the throughput, because the packets of a long frame are a quarter of the
    /// buffer.
    ///
    /// # Errors
    /// The errors of setsockopt(2).
    pub fn set_send_buffer_size(&self, bytes: usize) -> Result<()> {
        self.endpoint().set_send_buffer_size(bytes)
    }

    /// Chooses whether this socket takes descriptors from the peer (`SO_PASSRIGHTS`, Linux 6.16).
    /// The default is true. With false, the peer's send with descriptors fails with
    /// `PermissionDenied` and sends nothing.
    ///
    /// Messages that the peer sent before this call still arrive with their descriptors. A client
    /// may send before its connection is accepted, so use
    /// [`Listener::set_pass_fds`](crate::Listener::set_pass_fds) for accepted connections.
    ///
    /// # Errors
    /// `ENOPROTOOPT` on an older kernel.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        self.endpoint().set_pass_fds(pass)
    }

    /// Chooses what is reported about the process that sends a message, in
    /// [`Framed::credentials`](crate::Framed::credentials) and
    /// [`ReadHalf::credentials`](crate::framed::ReadHalf::credentials). The default is
    /// [`PassCredentials::No`], on accepted, inherited and converted sockets too.
    ///
    /// Call it before the first receive. The sender of a message that was received or sent before
    /// this call is not known. For accepted connections, use
    /// [`Listener::set_pass_credentials`](crate::Listener::set_pass_credentials).
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        self.endpoint().set_pass_credentials(pass)
    }

    /// Ends a direction of the connection, for every holder of the socket. After `Shutdown::Read`
    /// the peer's sends fail with `EPIPE`. Messages that the peer sent before stay readable,
    /// followed by the end of the stream. A task that waits to receive is woken, on both kinds of
    /// socket.
    ///
    /// # Errors
    /// `NotConnected` if the connection has ended.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.endpoint().shutdown(how)
    }
}
