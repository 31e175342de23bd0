//! A listener for a program without a runtime.

use std::{
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{SocketAddr, UnixListener},
    },
    path::Path,
    time::Duration,
};

use super::{
    Socket,
    wait::{self, Deadline},
};
use crate::{
    closer::BackgroundFd,
    error,
    socket::{
        self, ListenerState, PassCredentials, SocketKind, UidLimits, listener_addr, take_numbered,
        take_stdin,
    },
    sys::Event,
};

/// Listens for connections at a path or an abstract name, for a program without a runtime.
///
/// The rules for admitted uids, for the limits of one uid and for the ownership of the path are
/// those of [`fdwire::Listener`](crate::Listener), into which it converts.
///
/// ```
/// use std::thread;
///
/// use fdwire::{SocketKind, blocking::{Listener, Socket}};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.sock");
/// let listener = Listener::bind(&path, SocketKind::SeqPacket)?;
/// let client = thread::spawn(move || Socket::connect(&path, SocketKind::SeqPacket));
/// let socket = listener.accept()?;
/// # client.join().unwrap()?; drop(socket);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Listener {
    fd: BackgroundFd,
    state: ListenerState,
    /// The limit of one call, set by [`set_accept_timeout`](Self::set_accept_timeout).
    timeout: Option<Duration>,
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

    /// Listens at a path, which gets exactly the given mode, as
    /// [`fdwire::Listener::bind_with_mode`](crate::Listener::bind_with_mode) does.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind), and `NotFound` if the umask has to be undone and `/proc`
    /// is not mounted.
    pub fn bind_with_mode(path: impl AsRef<Path>, kind: SocketKind, mode: u32) -> Result<Self> {
        ListenerState::bind(path.as_ref(), kind, mode).map(Self::new)
    }

    /// Listens at an address, which may be a path or an abstract name
    /// ([`std::os::linux::net::SocketAddrExt`]). The kernel lets any uid connect to an abstract
    /// name, so only the list of admitted uids protects it.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind).
    pub fn bind_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        ListenerState::bind_addr(addr, kind).map(Self::new)
    }

    /// Takes the listening socket that this process got as standard input, as
    /// [`fdwire::Listener::from_stdin`](crate::Listener::from_stdin) does.
    ///
    /// # Errors
    /// The errors of [`fdwire::Listener::from_stdin`](crate::Listener::from_stdin).
    pub fn from_stdin() -> Result<Self> {
        take_stdin()
    }

    /// Takes a listening socket that this process has inherited, by its number, as
    /// [`fdwire::Listener::from_inherited`](crate::Listener::from_inherited) does.
    ///
    /// # Errors
    /// The errors of [`fdwire::Listener::from_inherited`](crate::Listener::from_inherited).
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }

    fn new((fd, state): (BackgroundFd, ListenerState)) -> Self {
        Self { fd, state, timeout: None }
    }

    /// Admits these uids too, as [`fdwire::Listener::allow_uids`](crate::Listener::allow_uids)
    /// does.
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

    /// Replaces the limits of what the connections of one uid may hold together, as
    /// [`fdwire::Listener::limit_each_uid`](crate::Listener::limit_each_uid) does.
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
    /// [`fdwire::Listener::set_pass_fds`](crate::Listener::set_pass_fds) does.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.16.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        self.state.set_pass_fds(self.as_fd(), pass)
    }

    /// Chooses what is reported about the senders of messages on the accepted connections, as
    /// [`fdwire::Listener::set_pass_credentials`](crate::Listener::set_pass_credentials) does.
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        self.state.set_pass_credentials(self.as_fd(), pass)
    }

    /// Sets the time for which one call of [`accept`](Self::accept) waits. `None`, the default,
    /// waits without a limit.
    pub fn set_accept_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
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

    /// Waits for the next connection of an admitted uid. Any number of threads may wait at a time.
    ///
    /// # Errors
    /// `TimedOut` if none came within the [time](Self::set_accept_timeout), and the errors of
    /// accept(2). After `EMFILE` or `ENFILE`, wait a little and call again: they pass when
    /// descriptors are closed.
    /// If setting up an accepted connection fails, it is closed and the error is returned.
    pub fn accept(&self) -> Result<Socket> {
        let deadline = Deadline::after(self.timeout);
        // Each connection that is refused restarts the loop with the same deadline.
        loop {
            // Wait while too many refused connections wait to be closed.
            if !wait::until_woken(deadline, |cx| self.state.poll_closed(cx)) {
                return Err(timed_out());
            }
            match self.state.try_accept(self.as_fd()) {
                Ok(Some(accepted)) => return Ok(Socket::new(accepted)),
                // A peer was refused. A loop of such peers must not extend the time of the call.
                Ok(None) if deadline.is_over() => return Err(timed_out()),
                Ok(None) => {}
                // The socket is non-blocking, so that the deadline applies: wait with poll(2).
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !wait::until_ready(self.as_fd(), Event::Readable, deadline)? {
                        return Err(timed_out());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn timed_out() -> Error {
    error::Error::TimedOut.into()
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Takes a listening Unix socket of either kind, and makes it non-blocking for every holder, as
/// `fdwire::Listener` does.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for Listener {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        ListenerState::from_fd(fd).map(Self::new)
    }
}

impl TryFrom<UnixListener> for Listener {
    type Error = Error;

    fn try_from(listener: UnixListener) -> Result<Self> {
        OwnedFd::from(listener).try_into()
    }
}

/// The socket file stays in place for the next holder of the descriptor.
impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.state.hand_on();
        listener.fd.into_fd()
    }
}

/// Removes the listener from its event loop. It still owns its path and admits the same peers.
impl From<socket::Listener> for Listener {
    fn from(listener: socket::Listener) -> Self {
        Self::new(listener.into_unregistered())
    }
}

/// Registers the listener with tokio. It still owns its path and admits the same peers.
///
/// # Errors
/// The errors of epoll_ctl(2), if the event loop can't watch more sockets. The listener is closed
/// then.
///
/// # Panics
/// Outside of a tokio runtime, or if the runtime's I/O driver is not enabled.
impl TryFrom<Listener> for socket::Listener {
    type Error = Error;

    fn try_from(listener: Listener) -> Result<Self> {
        Self::register((listener.fd, listener.state))
    }
}
