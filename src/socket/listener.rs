use std::{
    future::poll_fn,
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::SocketAddr,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use nix::{
    libc,
    sys::socket::{self, Backlog, UnixAddr, getsockopt, setsockopt, sockopt},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    PeerCred, Socket, SocketKind, UidLimits,
    admission::Admission,
    convert::{checked, disable_credentials, invalid_descriptor, unix_socket_kind},
    new_socket,
    path::{PathGuard, unix_addr},
    set_nonblocking,
    uid_account::UidShare,
};
use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    sys,
};

/// Number of refused connections that may wait to be closed. Peers connect faster than the closer's thread
/// gets its turn, and each refused connection holds a descriptor until then.
const MAX_CLOSING: usize = 64;

/// Listens for connections at a path or an abstract name.
///
/// **Who may connect.** A socket file is created with mode 0600. A peer is admitted by its uid
/// (`SO_PEERCRED`). By default, root is admitted, and the effective uid that the process has when
/// it makes the listener. [`allow_uids`](Self::allow_uids) and
/// [`allow_any_uid`](Self::allow_any_uid) admit others. The connection of a peer that is not
/// admitted is closed at once, [counted](Self::refused), and logged as a warning: at most one line
/// a second, with the number of connections refused since the last one.
///
/// **How much one uid may have.** The connections of a uid share [limits](UidLimits), which
/// [`limit_each_uid`](Self::limit_each_uid) changes. A connection above them is refused like that of a
/// uid that is not admitted.
///
/// **In a user namespace** that does not map every uid, the kernel reports each uid without a
/// mapping as the overflow uid (`/proc/sys/kernel/overflowuid`, usually 65534). A peer with this
/// uid can be anybody, so it is never admitted by its number, even if the process itself runs as
/// that uid. There is one exception: a path that this listener has bound, if from the start only
/// its owner may write to it (mode 0600). There, the kernel itself has checked that the peer is the
/// owner or privileged. For anything else, combine [`allow_any_uid`](Self::allow_any_uid) with the
/// mode of the path or its directory, or give each process one end of a [`Socket::pair`].
///
/// **Who owns the path.** A lock file beside it (`<path>.lock`) is held as long as the listener lives. A stale socket is replaced; one
/// that a live process listens on is not, and neither is any other kind of file. On drop the socket is removed, if it is
/// still the one that was bound. Converted into an `OwnedFd`, the listener leaves it in place for the next holder.
///
/// # Panics
/// Every way to get one panics outside of a tokio runtime, or where the runtime's I/O driver is not enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::{Listener, Socket, SocketKind};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.sock");
/// let listener = Listener::bind(&path, SocketKind::SeqPacket)?;
/// let (client, server) = tokio::join!(Socket::connect(&path, SocketKind::SeqPacket), listener.accept());
/// # client?; server?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Listener {
    io: AsyncFd<BackgroundFd>,
    kind: SocketKind,
    admission: Admission,
    /// Refused connections that wait to be closed.
    closing: Arc<Account>,
    path: Option<PathGuard>,
    /// Made by a conversion. A connection copies `SO_PASSCRED` from the listener when the client
    /// connects, so those that were in the backlog then may have it.
    was_converted: bool,
    /// False after [`set_pass_fds(false)`](Self::set_pass_fds).
    pass_fds: AtomicBool,
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

    /// Listens at a path, which gets exactly the given mode (of which only the permission bits 0777
    /// count), whatever the process's umask is. Connecting takes write permission. At no moment may
    /// anyone connect whom the mode does not permit.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind), and `NotFound` if the umask has to be undone and `/proc` is not
    /// mounted.
    pub fn bind_with_mode(path: impl AsRef<Path>, kind: SocketKind, mode: u32) -> Result<Self> {
        let path = path.as_ref();
        let addr = UnixAddr::new(path)?;
        let mut guard = PathGuard::take(path)?;
        let fd = new_socket(kind)?;
        guard.bind(&fd, &addr, mode)?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Self::register(fd, kind, Some(guard))
    }

    /// Listens at an address; beside paths these are abstract names ([`std::os::linux::net::SocketAddrExt`]), which any
    /// uid can connect to: admission is all that guards them.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind).
    pub fn bind_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        if let Some(path) = addr.as_pathname() {
            return Self::bind(path, kind);
        }
        let addr = unix_addr(addr)?;
        let fd = new_socket(kind)?;
        socket::bind(fd.as_raw_fd(), &addr)?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Self::register(fd, kind, None)
    }

    /// Takes a listening, non-blocking socket whose path is guarded by somebody else.
    pub(crate) fn unguarded(fd: OwnedFd, kind: SocketKind) -> Result<Self> {
        Self::register(fd, kind, None)
    }

    fn register(fd: OwnedFd, kind: SocketKind, path: Option<PathGuard>) -> Result<Self> {
        closer::start();
        let fd = BackgroundFd::new(fd, InBackground::default());
        Ok(Self {
            io: sys::register(fd, Interest::READABLE)?,
            kind,
            admission: Admission::new(),
            closing: Arc::default(),
            path,
            was_converted: false,
            pass_fds: AtomicBool::new(true),
        })
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
    /// let listener = Listener::bind_with_mode("/run/app.sock", SocketKind::SeqPacket, 0o666)?.allow_uids([www_data]);
    /// # drop(listener); Ok(()) }
    /// ```
    #[must_use]
    pub fn allow_uids(mut self, uids: impl IntoIterator<Item = u32>) -> Self {
        self.admission.allow_uids(uids);
        self
    }

    /// Admits every uid that gets past the mode of the path.
    #[must_use]
    pub fn allow_any_uid(mut self) -> Self {
        self.admission.allow_any_uid();
        self
    }

    /// Replaces the limits of what the connections of one uid may hold together. To be called before the
    /// first connection is accepted: those accepted before count apart.
    ///
    /// ```no_run
    /// # fn main() -> std::io::Result<()> {
    /// use fdwire::{Listener, SocketKind, UidLimits};
    ///
    /// let limits = UidLimits::default().max_connections(10);
    /// let listener = Listener::bind("/run/app.sock", SocketKind::SeqPacket)?.limit_each_uid(limits);
    /// # drop(listener); Ok(()) }
    /// ```
    #[must_use]
    pub fn limit_each_uid(mut self, limits: UidLimits) -> Self {
        self.admission.limit_each_uid(limits);
        self
    }

    /// Returns the number of connections that were closed because their uid is not admitted, or has more
    /// than the [limits](UidLimits) allow.
    pub fn refused(&self) -> u64 {
        self.admission.refused()
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
        setsockopt(&self.io, sys::PassRights, &pass)?;
        self.pass_fds.store(pass, Ordering::Relaxed);
        Ok(())
    }

    /// The kind of the sockets that it accepts.
    pub fn kind(&self) -> SocketKind {
        self.kind
    }

    /// The address it listens at.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> Result<SocketAddr> {
        let addr = socket::getsockname::<UnixAddr>(self.io.as_raw_fd())?;
        match (addr.path(), addr.as_abstract()) {
            (Some(path), _) => SocketAddr::from_pathname(path),
            (_, Some(name)) => SocketAddr::from_abstract_name(name),
            _ => Err(Error::new(ErrorKind::InvalidData, "the listener has no name")),
        }
    }

    /// Waits for the next connection of an admitted uid.
    ///
    /// # Errors
    /// Those of accept(2). `EMFILE` and `ENFILE` pass when descriptors are closed: wait a little
    /// before the next call. Also those of setting up an accepted connection, which is closed then.
    ///
    /// # Cancel safety
    /// No connection is lost when dropped. Any number of tasks may wait at a time.
    pub async fn accept(&self) -> Result<Socket> {
        loop {
            poll_fn(|cx| self.closing.poll_at_most(cx, MAX_CLOSING)).await;
            if let Some(socket) = self.io.async_io(Interest::READABLE, |_| self.try_accept()).await? {
                return Ok(socket);
            }
        }
    }

    /// Polls for the next connection of an admitted uid. Only the task that polled last is woken.
    ///
    /// # Errors
    /// As for [`accept`](Self::accept).
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Socket>> {
        loop {
            ready!(self.closing.poll_at_most(cx, MAX_CLOSING));
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            if let Ok(accepted) = ready.try_io(|_| self.try_accept())
                && let Some(socket) = accepted.transpose()
            {
                return Poll::Ready(socket);
            }
        }
    }

    /// `None` after one that is not admitted: the next is another turn for the cooperative budget, or peers that are refused
    /// could keep the runtime busy.
    ///
    /// # Errors
    /// `WouldBlock` if nobody waits.
    fn try_accept(&self) -> Result<Option<Socket>> {
        let fd = match sys::accept(self.as_fd()) {
            Ok(fd) => fd,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ECONNABORTED) => return Ok(None),
                _ => return Err(error),
            },
        };
        // Who has sent something already may block its `close`.
        let fd = BackgroundFd::new(fd, InBackground::counted(Arc::clone(&self.closing)));
        self.take_accepted(fd).map_err(not_would_block)
    }

    /// Registers an accepted connection if its peer is admitted.
    fn take_accepted(&self, fd: BackgroundFd) -> Result<Option<Socket>> {
        let Some(uid_share) = self.admit(&fd)? else { return Ok(None) };
        if self.was_converted {
            disable_credentials(&fd)?;
        }
        // Clients in the backlog may have connected before the listener got the option.
        if !self.pass_fds.load(Ordering::Relaxed) {
            setsockopt(&fd, sys::PassRights, &false)?;
        }
        Socket::register_for_uid(fd.into_fd(), self.kind, Some(uid_share)).map(Some)
    }

    fn admit(&self, peer: &BackgroundFd) -> Result<Option<UidShare>> {
        Ok(self.admission.admit(PeerCred::of(peer)?, self.path.as_ref(), || self.local_addr()))
    }
}

/// Turns `WouldBlock` into another kind of error.
///
/// After `accept` has succeeded, tokio would take it for an answer of `accept`: it would forget
/// that connections are waiting, and the caller would never learn that one was accepted and closed.
fn not_would_block(error: Error) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock => Error::other(format!("an accepted connection was closed: {error}")),
        _ => error,
    }
}

/// Takes a listening Unix socket of either kind, inherited or received, and makes it non-blocking for every holder: another
/// one that makes it blocking again would have `accept` block the runtime. The path, if it has one, stays as it is on drop.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for Listener {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        let (fd, kind) = checked(fd, |fd| {
            let kind = unix_socket_kind(fd)?;
            if !getsockopt(fd, sockopt::AcceptConn)? {
                return Err(invalid_descriptor("it is not a listening socket"));
            }
            set_nonblocking(fd, true)?; // accept has no flag for it
            disable_credentials(fd)?; // for clients that connect from now on
            Ok(kind)
        })?;
        let listener = Self::register(fd, kind, None)?;
        Ok(Self { was_converted: true, ..listener })
    }
}

/// The socket file stays in place for the next holder of the descriptor.
impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        if let Some(guard) = listener.path {
            guard.hand_on();
        }
        listener.io.into_inner().into_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_accept_no_error_says_that_nobody_waits() {
        let mapped = not_would_block(Error::from_raw_os_error(libc::EAGAIN));
        assert_ne!(mapped.kind(), ErrorKind::WouldBlock);
        assert!(mapped.to_string().contains("Resource temporarily unavailable"), "{mapped}");

        let kept = not_would_block(Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(kept.raw_os_error(), Some(libc::EMFILE));
    }
}
