//! A listener for Unix sockets that is registered with tokio.

use std::{
    future::poll_fn,
    io::{Error, Result},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::SocketAddr,
    },
    path::Path,
    task::{Context, Poll, ready},
};

use tokio::io::{Interest, unix::AsyncFd};

use super::{
    PassCredentials, Socket, SocketKind, UidLimits,
    listener_state::{ListenerState, listener_addr, not_would_block},
};
use crate::{closer::BackgroundFd, sys};

/// Listens for connections at a path or an abstract name.
///
/// **Who may connect.** A socket file is created with mode 0600. A peer is admitted by its uid
/// (`SO_PEERCRED`). By default, root is admitted, and the effective uid that the process has when
/// it makes the listener. [`allow_uids`](Self::allow_uids) and
/// [`allow_any_uid`](Self::allow_any_uid) admit others. The connection of a peer that is not
/// admitted is closed at once, [counted](Self::refused), and logged as a warning. There is at most
/// one line a second, with the number of connections that were refused since the line before.
///
/// **What one uid may hold.** The connections of a uid share [limits](UidLimits), which
/// [`limit_each_uid`](Self::limit_each_uid) changes. A connection above them is refused in the same
/// way as the connection of a uid that is not admitted.
///
/// **In a user namespace** that does not map every uid, the kernel reports each uid without a
/// mapping as the overflow uid (`/proc/sys/kernel/overflowuid`, usually 65534). A peer with this
/// uid can be anybody, so it is never admitted by its number, even if the process itself runs as
/// that uid. There is one exception: a path that this listener has bound, if from the start only
/// its owner may write to it (mode 0600). For such a path, the kernel itself has checked that the
/// peer is the owner or privileged. In all other cases, combine
/// [`allow_any_uid`](Self::allow_any_uid) with the mode of the path or its directory, or give each
/// process one end of a [`Socket::pair`].
///
/// **Who owns the path.** A lock file beside it (`<path>.lock`) is held as long as the listener
/// lives. A stale socket is replaced. A socket on which a live process listens is not, and neither
/// is any other kind of file. On drop the socket file is removed, if it is still the one that was
/// bound. If the listener is converted into an `OwnedFd`, the file stays for the next holder.
///
/// # Panics
/// Every function that returns one panics outside of a tokio runtime, or if the runtime's I/O
/// driver is not enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::{Listener, Socket, SocketKind};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.sock");
/// let listener = Listener::bind(&path, SocketKind::SeqPacket)?;
/// let client = Socket::connect(&path, SocketKind::SeqPacket);
/// let (client, server) = tokio::join!(client, listener.accept());
/// # client?; server?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Listener {
    io: AsyncFd<BackgroundFd>,
    state: ListenerState,
}

impl Listener {
    /// Listens at a path, which gets mode 0600.
    ///
    /// # Errors
    /// `AddrInUse` if a live process listens there, `AlreadyExists` if something other than a
    /// socket is there or `<path>.lock` is not a regular file, and those of bind(2).
    pub fn bind(path: impl AsRef<Path>, kind: SocketKind) -> Result<Self> {
        Self::bind_with_mode(path, kind, 0o600)
    }

    /// Listens at a path, which gets exactly the given mode, for any umask of the process. Only the
    /// permission bits 0777 of the mode count. Clients need write permission to connect. There is
    /// no moment at which a client can connect that the mode does not permit.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind), and `NotFound` if the umask has to be undone and `/proc`
    /// is not mounted.
    pub fn bind_with_mode(path: impl AsRef<Path>, kind: SocketKind, mode: u32) -> Result<Self> {
        Self::register(ListenerState::bind(path.as_ref(), kind, mode)?)
    }

    /// Listens at an address, which may be a path or an abstract name
    /// ([`std::os::linux::net::SocketAddrExt`]). The kernel lets any uid connect to an abstract
    /// name, so only the list of admitted uids protects it.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind).
    pub fn bind_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        Self::register(ListenerState::bind_addr(addr, kind)?)
    }

    pub(crate) fn register((fd, state): (BackgroundFd, ListenerState)) -> Result<Self> {
        Ok(Self { io: sys::register(fd, Interest::READABLE)?, state })
    }

    /// Removes the listener from its event loop.
    pub(crate) fn into_unregistered(self) -> (BackgroundFd, ListenerState) {
        (self.io.into_inner(), self.state)
    }

    /// Takes a listening, non-blocking socket whose path another holder guards.
    pub(crate) fn unguarded(fd: OwnedFd, kind: SocketKind) -> Result<Self> {
        Self::register(ListenerState::unguarded(fd, kind))
    }

    /// Admits these uids too.
    ///
    /// The overflow uid is not admitted by this in a user namespace that does not map every uid, as
    /// described for [`Listener`].
    ///
    /// ```no_run
    /// # fn main() -> std::io::Result<()> {
    /// use fdwire::{Listener, SocketKind};
    ///
    /// let www_data = 33;
    /// let listener = Listener::bind_with_mode("/run/app.sock", SocketKind::SeqPacket, 0o666)?;
    /// let listener = listener.allow_uids([www_data]);
    /// # drop(listener); Ok(()) }
    /// ```
    #[must_use]
    pub fn allow_uids(mut self, uids: impl IntoIterator<Item = u32>) -> Self {
        self.state.admission.allow_uids(uids);
        self
    }

    /// Admits every uid. Then only the mode of the path decides who may connect.
    #[must_use]
    pub fn allow_any_uid(mut self) -> Self {
        self.state.admission.allow_any_uid();
        self
    }

    /// Replaces the limits of what the connections of one uid may hold together. Call it before the
    /// first connection is accepted: connections that were accepted before do not count.
    ///
    /// ```no_run
    /// # fn main() -> std::io::Result<()> {
    /// use fdwire::{Listener, SocketKind, socket::UidLimits};
    ///
    /// let limits = UidLimits::default().max_connections(10);
    /// let listener = Listener::bind("/run/app.sock", SocketKind::SeqPacket)?;
    /// let listener = listener.limit_each_uid(limits);
    /// # drop(listener); Ok(()) }
    /// ```
    #[must_use]
    pub fn limit_each_uid(mut self, limits: UidLimits) -> Self {
        self.state.admission.limit_each_uid(limits);
        self
    }

    /// Returns the number of connections that were closed because their uid is not admitted, or has
    /// more than the [limits](UidLimits) allow.
    pub fn refused(&self) -> u64 {
        self.state.admission.refused()
    }

    /// Chooses whether the accepted connections take descriptors from their peers, as
    /// [`Socket::set_pass_fds`] does for one connection (`SO_PASSRIGHTS`, Linux 6.16). The default
    /// is true.
    ///
    /// A connection inherits the option when the client connects. So after this call with false, no
    /// new client can have sent descriptors before its connection is accepted. A client that is
    /// already waiting in the backlog may have: what it sent before is received, and its connection
    /// gets the option when it is accepted.
    ///
    /// # Errors
    /// `ENOPROTOOPT` on an older kernel.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        self.state.set_pass_fds(self.as_fd(), pass)
    }

    /// Chooses what is reported about the senders of messages on the accepted connections, as
    /// [`Socket::set_pass_credentials`] does for one connection. The default is
    /// [`PassCredentials::No`].
    ///
    /// A connection inherits the option when the client connects, or gets it when it is accepted.
    /// So the sender is also reported for messages that a client has sent before its connection was
    /// accepted.
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        self.state.set_pass_credentials(self.as_fd(), pass)
    }

    /// Returns the kind of the sockets that it accepts.
    pub fn kind(&self) -> SocketKind {
        self.state.kind()
    }

    /// Returns the address at which it listens.
    ///
    /// # Errors
    /// The errors of getsockname(2).
    pub fn local_addr(&self) -> Result<SocketAddr> {
        listener_addr(self.as_fd())
    }

    /// Waits for the next connection of an admitted uid.
    ///
    /// # Errors
    /// The errors of accept(2). After `EMFILE` or `ENFILE`, wait a little and call again: they pass
    /// when descriptors are closed. If setting up an accepted connection fails, it is closed and
    /// the error is returned.
    ///
    /// # Cancel safety
    /// No connection is lost when dropped. Any number of tasks may wait at a time.
    pub async fn accept(&self) -> Result<Socket> {
        loop {
            poll_fn(|cx| self.state.poll_closed(cx)).await;
            if let Some(socket) =
                self.io.async_io(Interest::READABLE, |_| self.try_accept()).await?
            {
                return Ok(socket);
            }
        }
    }

    /// Polls for the next connection of an admitted uid. Only the task that polled last is woken.
    ///
    /// # Errors
    /// The errors of [`accept`](Self::accept).
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Socket>> {
        loop {
            ready!(self.state.poll_closed(cx));
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            if let Ok(accepted) = ready.try_io(|_| self.try_accept())
                && let Some(socket) = accepted.transpose()
            {
                return Poll::Ready(socket);
            }
        }
    }

    /// Takes the next connection and registers it. Returns `None` after one that is not admitted.
    /// The next one then takes another unit of the cooperative budget, so peers that are refused
    /// can't keep the runtime busy.
    ///
    /// # Errors
    /// `WouldBlock` if there is no connection to accept.
    fn try_accept(&self) -> Result<Option<Socket>> {
        let Some((fd, state)) = self.state.try_accept(self.as_fd())? else { return Ok(None) };
        Socket::register_with(fd, state).map(Some).map_err(not_would_block)
    }
}

/// Takes a listening Unix socket of either kind, inherited or received, and makes it non-blocking
/// for every holder. If another holder makes it blocking again, `accept` blocks the runtime. The
/// path, if it has one, stays as it is on drop.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for Listener {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        Self::register(ListenerState::from_fd(fd)?)
    }
}

/// The socket file stays in place for the next holder of the descriptor.
impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.state.hand_on();
        listener.io.into_inner().into_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}
