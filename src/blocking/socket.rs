//! A connected socket for a program without a runtime.

use std::{
    io::{Error, Result},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{SocketAddr, UnixStream},
    },
    path::Path,
};

use crate::{
    closer::BackgroundFd,
    socket::{
        self, Endpoint, PassCredentials, PeerCred, SocketKind, SocketState, connect, connected,
        new_pair, new_socket, take_numbered, take_stdin, unix_addr,
    },
};

/// A connected Unix socket of either kind, for a program without a runtime.
///
/// You use it through [`Framed`](super::Framed). It converts from and into
/// [`fdwire::Socket`](crate::Socket), and from `OwnedFd` and std's `UnixStream`. A descriptor of
/// another type is refused with a clear error. `O_NONBLOCK`, which all holders of a socket share,
/// makes no difference here and is not changed.
///
/// ```
/// use fdwire::{SocketKind, blocking::Socket};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// assert_eq!(a.peer_cred()?.pid, Some(std::process::id() as i32));
/// # drop(b);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Socket {
    /// Closed in the background, because a peer can make `close` slow.
    fd: BackgroundFd,
    state: SocketState,
}

impl Socket {
    /// Returns two connected sockets.
    ///
    /// # Errors
    /// The errors of socketpair(2): no more descriptors, no memory.
    pub fn pair(kind: SocketKind) -> Result<(Self, Self)> {
        let (a, b) = new_pair(kind)?;
        Ok((Self::unused(a, kind), Self::unused(b, kind)))
    }

    /// Takes the socket that this process got as standard input, and leaves `/dev/null` there, as
    /// [`fdwire::Socket::from_stdin`](crate::Socket::from_stdin) does.
    ///
    /// # Errors
    /// The errors of [`fdwire::Socket::from_stdin`](crate::Socket::from_stdin).
    pub fn from_stdin() -> Result<Self> {
        take_stdin()
    }

    /// Takes a connected socket that this process has inherited, by its number, as
    /// [`fdwire::Socket::from_inherited`](crate::Socket::from_inherited) does.
    ///
    /// # Errors
    /// The errors of [`fdwire::Socket::from_inherited`](crate::Socket::from_inherited).
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }

    /// Connects to the listener at a path. Waits while the listener's backlog is full.
    ///
    /// # Errors
    /// The errors of connect(2), among them `NotFound`, `ConnectionRefused` (nobody listens),
    /// `PermissionDenied`, and `EPROTOTYPE` (the listener is of the other kind).
    pub fn connect(path: impl AsRef<Path>, kind: SocketKind) -> Result<Self> {
        Self::connect_addr(&SocketAddr::from_pathname(path)?, kind)
    }

    /// Connects to an address, which may be a path or an abstract name
    /// ([`std::os::linux::net::SocketAddrExt`]). Waits while the listener's backlog is full.
    ///
    /// # Errors
    /// The errors of [`connect`](Self::connect).
    pub fn connect_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        let addr = unix_addr(addr)?;
        // The socket is blocking, so the kernel waits for room in the backlog.
        let fd = new_socket(kind)?;
        connect(&fd, &addr)?;
        Ok(Self::unused(fd, kind))
    }

    /// Takes a socket that was not used yet.
    fn unused(fd: OwnedFd, kind: SocketKind) -> Self {
        let state = SocketState::new(kind, None);
        Self::new((state.guard(fd), state))
    }

    pub(super) fn new((fd, state): (BackgroundFd, SocketState)) -> Self {
        Self { fd, state }
    }

    pub(super) fn endpoint(&self) -> Endpoint<'_> {
        Endpoint::new(self.fd.as_fd(), &self.state)
    }

    /// Returns another handle to the same socket, with another descriptor, as
    /// [`fdwire::Socket::try_clone`](crate::Socket::try_clone) does. Another thread can end a wait
    /// by calling [`shutdown`](Self::shutdown) on it.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE`.
    pub fn try_clone(&self) -> Result<Self> {
        // Both handles share one count of descriptors that wait to be closed.
        let state = self.state.for_copy();
        Ok(Self::new((state.guard(self.fd.as_fd().try_clone_to_owned()?), state)))
    }

    /// Returns the kind of the socket.
    pub fn kind(&self) -> SocketKind {
        self.state.kind()
    }

    /// Returns the process at the other end, as
    /// [`fdwire::Socket::peer_cred`](crate::Socket::peer_cred) does.
    ///
    /// # Errors
    /// The errors of getsockopt(2).
    pub fn peer_cred(&self) -> Result<PeerCred> {
        self.endpoint().peer_cred()
    }

    /// Returns a pidfd of the process at the other end, as
    /// [`fdwire::Socket::peer_pidfd`](crate::Socket::peer_pidfd) does.
    ///
    /// # Errors
    /// The errors of [`fdwire::Socket::peer_pidfd`](crate::Socket::peer_pidfd).
    pub fn peer_pidfd(&self) -> Result<OwnedFd> {
        self.endpoint().peer_pidfd()
    }

    /// Returns the size of the send buffer in bytes, as
    /// [`fdwire::Socket::send_buffer_size`](crate::Socket::send_buffer_size) does.
    ///
    /// # Errors
    /// The errors of getsockopt(2).
    pub fn send_buffer_size(&self) -> Result<usize> {
        self.endpoint().send_buffer_size()
    }

    /// Requests a send buffer of `bytes` bytes, as
    /// [`fdwire::Socket::set_send_buffer_size`](crate::Socket::set_send_buffer_size) does.
    ///
    /// # Errors
    /// The errors of setsockopt(2).
    pub fn set_send_buffer_size(&self, bytes: usize) -> Result<()> {
        self.endpoint().set_send_buffer_size(bytes)
    }

    /// Chooses whether this socket takes descriptors from the peer, as
    /// [`fdwire::Socket::set_pass_fds`](crate::Socket::set_pass_fds) does.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.16.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        self.endpoint().set_pass_fds(pass)
    }

    /// Chooses what is reported about the process that sends a message, as
    /// [`fdwire::Socket::set_pass_credentials`](crate::Socket::set_pass_credentials) does.
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        self.endpoint().set_pass_credentials(pass)
    }

    /// Ends a direction of the connection, for every holder of the socket. After `Shutdown::Read`
    /// the peer's sends fail with `EPIPE`. Messages that the peer sent before stay readable,
    /// followed by the end of the stream. A thread that waits to receive is woken, on both kinds of
    /// socket.
    ///
    /// # Errors
    /// `NotConnected` if the connection has ended.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.endpoint().shutdown(how)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Takes a connected Unix socket of either kind, as `fdwire::Socket` does.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for Socket {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        connected(fd).map(Self::new)
    }
}

impl TryFrom<UnixStream> for Socket {
    type Error = Error;

    fn try_from(stream: UnixStream) -> Result<Self> {
        OwnedFd::from(stream).try_into()
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.fd.into_fd()
    }
}

/// Removes the socket from its event loop. A connection that a listener has accepted still counts
/// for its uid.
impl From<socket::Socket> for Socket {
    fn from(socket: socket::Socket) -> Self {
        Self::new(socket.into_unregistered())
    }
}

/// Registers the socket with tokio. A connection that a listener has accepted still counts for its
/// uid.
///
/// # Errors
/// The errors of epoll_ctl(2), if the event loop can't watch more sockets. The socket is closed
/// then.
///
/// # Panics
/// Outside of a tokio runtime, or if the runtime's I/O driver is not enabled.
impl TryFrom<Socket> for socket::Socket {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        Self::register_with(socket.fd, socket.state)
    }
}
