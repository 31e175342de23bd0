//! What a socket tells, and its options.

use std::{
    io::Result,
    net::Shutdown,
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::socket::{getsockopt, sockopt};

use super::{PassCredentials, Socket, SocketKind};
/// Who is at the other end: the process that called `connect`, `listen` or `socketpair`, at that
/// time (`SO_PEERCRED`, unix(7)).
///
/// On a pair made by a parent that is the **parent**, not the child that uses the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerCred {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id; `None` if the process is in another PID namespace.
    pub pid: Option<i32>,
}

impl PeerCred {
    pub(super) fn of(socket: &impl AsFd) -> Result<Self> {
        let cred = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { uid: cred.uid(), gid: cred.gid(), pid: Some(cred.pid()).filter(|&pid| pid != 0) })
    }
}

impl Socket {
    /// Which kind it is.
    pub fn kind(&self) -> SocketKind {
        self.endpoint().kind()
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn peer_cred(&self) -> Result<PeerCred> {
        self.endpoint().peer_cred()
    }

    /// Returns a pidfd of the process that [`peer_cred`](Self::peer_cred) names. It becomes
    /// readable when that process ends, and never means another one, as a reused process id may
    /// (`SO_PEERPIDFD`, Linux 6.5).
    ///
    /// Linux 6.16 and later return it even if the process has ended and was reaped; it is readable
    /// at once then.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.5. Before 6.16 also an error, such as `ESRCH`, if the process
    /// was reaped.
    pub fn peer_pidfd(&self) -> Result<OwnedFd> {
        self.endpoint().peer_pidfd()
    }

    /// Size of the send buffer in bytes as the kernel counts it (`SO_SNDBUF`, socket(7)). A packet
    /// holds at most this less 32 bytes.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn send_buffer_size(&self) -> Result<usize> {
        self.endpoint().send_buffer_size()
    }

    /// Asks for a send buffer of `bytes` bytes. The kernel doubles the number for its own
    /// bookkeeping, and caps it at `/proc/sys/net/core/wmem_max`. To be set before the socket goes
    /// into a [`Framed`](crate::Framed).
    ///
    /// For frames of 1 MiB and more on SEQPACKET a buffer of 4 MiB instead of the usual 208 KiB
    /// makes four times the throughput: the packets of a long frame are a quarter of the buffer.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_send_buffer_size(&self, bytes: usize) -> Result<()> {
        self.endpoint().set_send_buffer_size(bytes)
    }

    /// Chooses whether this socket takes descriptors from the peer (`SO_PASSRIGHTS`, Linux 6.16).
    /// The default is true. With false, the peer's send with descriptors fails with
    /// `PermissionDenied` and sends nothing.
    ///
    /// What the peer sent before this call is still received with its descriptors. For an accepted
    /// connection, which the client may use before it is accepted, use
    /// [`Listener::set_pass_fds`](crate::Listener::set_pass_fds) instead.
    ///
    /// # Errors
    /// `ENOPROTOOPT` on an older kernel.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        self.endpoint().set_pass_fds(pass)
    }

    /// Chooses what is reported about the process that sends a message, in
    /// [`Framed::credentials`](crate::Framed::credentials) and
    /// [`ReadHalf::credentials`](crate::ReadHalf::credentials). The default is
    /// [`PassCredentials::No`], on accepted, inherited and converted sockets too.
    ///
    /// To be set before the first receive: the sender of a message that was received before, or
    /// even sent before, is not known. For an accepted connection use
    /// [`Listener::set_pass_credentials`](crate::Listener::set_pass_credentials).
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        self.endpoint().set_pass_credentials(pass)
    }

    /// Ends a direction of the connection, for every holder of the socket. After `Shutdown::Read`
    /// the peer's sends fail with `EPIPE`, and what it sent before stays readable; then comes the
    /// end. A task that waits to receive is woken, on both kinds of socket.
    ///
    /// # Errors
    /// `NotConnected`.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.endpoint().shutdown(how)
    }
}
