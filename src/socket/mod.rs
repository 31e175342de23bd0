//! Unix sockets that are registered with tokio: connected sockets of both kinds, listeners, and
//! datagram sockets.

mod admission;
mod check;
mod convert;
mod datagram;
mod endpoint;
mod inherited;
mod listener;
mod listener_state;
mod managers;
mod open;
mod options;
mod pass_credentials;
mod path;
mod receive;
mod send;
#[cfg(feature = "tokio-seqpacket")]
mod seqpacket;
mod uid_account;

use std::{
    fmt,
    io::{ErrorKind, Result},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::SocketAddr,
    },
    path::Path,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

pub(crate) use check::connected;
pub use datagram::{Datagram, DatagramSocket};
pub(crate) use endpoint::{Attempt, Endpoint, SendFailure, SocketState};
pub(crate) use inherited::{take_numbered, take_stdin};
pub use listener::Listener;
pub(crate) use listener_state::{ListenerState, listener_addr};
pub(crate) use managers::passed;
pub(crate) use open::{connect, new_pair, new_socket, unix_addr};
pub use options::PeerCred;
pub use pass_credentials::PassCredentials;
pub(crate) use path::PathGuard;
pub(crate) use send::SendWait;
pub use uid_account::UidLimits;

pub use crate::credentials::Credentials;

use crate::{backoff::Backoff, closer::BackgroundFd, sys};

/// The kind of a connected Unix socket.
///
/// Frames have the same meaning on both. SEQPACKET moves large payloads faster. Most other programs
/// use STREAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SocketKind {
    /// A socket of type `SOCK_SEQPACKET`: connected, in order, in packets.
    SeqPacket,
    /// A socket of type `SOCK_STREAM`: connected, in order, a stream of bytes.
    Stream,
}

impl fmt::Display for SocketKind {
    /// Writes the name of the type as in socket(2): `SOCK_SEQPACKET` or `SOCK_STREAM`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SeqPacket => "SOCK_SEQPACKET",
            Self::Stream => "SOCK_STREAM",
        })
    }
}

/// A connected Unix socket of either kind, registered with tokio.
///
/// You use it through [`Framed`](crate::Framed). It converts from and into the sockets of std,
/// tokio and tokio-seqpacket, and `OwnedFd`. A descriptor of another type is refused with a clear
/// error.
///
/// The crate does not need `O_NONBLOCK`, which all holders of a socket share, and does not change
/// it. So a child that gets a socket from here as standard input has a blocking one.
///
/// # Panics
/// Every function that returns a socket panics outside of a tokio runtime, or if the runtime's I/O
/// driver is not enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::{Socket, SocketKind};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// assert_eq!(a.peer_cred()?.pid, Some(std::process::id() as i32));
/// # drop(b); Ok(()) }
/// ```
#[derive(Debug)]
pub struct Socket {
    io: AsyncFd<BackgroundFd>,
    state: SocketState,
    /// True if the socket is registered for reading only: see [`quiet`](Self::quiet).
    quiet: bool,
    /// The runtime with which the socket is registered. Timers are made there too, even if the
    /// socket is polled in another runtime.
    runtime: Handle,
}

impl Socket {
    /// Returns two connected sockets.
    ///
    /// # Errors
    /// The errors of socketpair(2): no more descriptors, no memory.
    pub fn pair(kind: SocketKind) -> Result<(Self, Self)> {
        let (a, b) = new_pair(kind)?;
        Ok((Self::register(a, kind)?, Self::register(b, kind)?))
    }

    /// Connects to the listener at a path. Waits while the listener's backlog is full. The kernel
    /// does not report when there is room, so this tries again after a growing pause, which the
    /// runtime's timer measures.
    ///
    /// # Panics
    /// Like [every function that returns a socket](Self#panics), and if the backlog is full and the
    /// runtime's timer is not enabled.
    ///
    /// # Errors
    /// The errors of connect(2), among them `NotFound`, `ConnectionRefused` (nobody listens),
    /// `PermissionDenied`, and `EPROTOTYPE` (the listener is of the other kind).
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn connect(path: impl AsRef<Path>, kind: SocketKind) -> Result<Self> {
        Self::connect_addr(&SocketAddr::from_pathname(path)?, kind).await
    }

    /// Connects to an address, which may be a path or an abstract name
    /// ([`std::os::linux::net::SocketAddrExt`]). Waits while the listener's backlog is full.
    ///
    /// # Panics
    /// In the same cases as [`connect`](Self::connect).
    ///
    /// # Errors
    /// The errors of [`connect`](Self::connect).
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn connect_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        let addr = unix_addr(addr)?;
        let fd = open::new_nonblocking(kind)?;
        let mut backoff = Backoff::default();
        loop {
            match connect(&fd, &addr) {
                Ok(()) => {
                    open::set_nonblocking(&fd, false)?;
                    return Self::register(fd, kind);
                }
                // The backlog is full. The kernel has begun nothing, so no event will come.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    tokio::time::sleep(backoff.next()).await
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Registers a connected socket that nobody has used yet.
    fn register(fd: OwnedFd, kind: SocketKind) -> Result<Self> {
        let state = SocketState::new(kind, None);
        Self::register_with(state.guard(fd), state)
    }

    /// Registers a socket that has a state already.
    pub(crate) fn register_with(fd: BackgroundFd, state: SocketState) -> Result<Self> {
        Ok(Self {
            io: sys::register(fd, Interest::READABLE | Interest::PRIORITY | Interest::WRITABLE)?,
            state,
            quiet: false,
            runtime: Handle::current(),
        })
    }

    /// Removes the socket from its event loop.
    pub(crate) fn into_unregistered(self) -> (BackgroundFd, SocketState) {
        (self.io.into_inner(), self.state)
    }

    /// Returns another handle to the same socket, by another descriptor (close-on-exec), registered
    /// with the current runtime.
    ///
    /// The handles share everything that the kernel keeps: options, the send buffer and the receive
    /// queue. So two readers take each other's messages, two writers mix theirs on a stream, and
    /// [`shutdown`](Self::shutdown) ends all handles. The connection ends when the last handle is
    /// dropped. If the peer closes without reading everything, only one of the handles gets that
    /// report ([`Error::Reset`](crate::Error::Reset)).
    ///
    /// Descriptors that wait to be closed count for both handles together. At a listener that
    /// limits what [one uid](UidLimits) may have, the handle counts as one more connection, but is
    /// never refused.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE`, and those of registering the descriptor with tokio.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
    /// use futures::SinkExt;
    ///
    /// let (socket, _peer) = Socket::pair(SocketKind::SeqPacket)?;
    /// let kept = socket.try_clone()?; // to end the connection from elsewhere
    /// let mut framed = Framed::new(socket, FrameCodec::default());
    /// kept.shutdown(std::net::Shutdown::Both)?;
    /// assert!(framed.send(Frame::new("too late")).await.is_err());
    /// # Ok(()) }
    /// ```
    pub fn try_clone(&self) -> Result<Self> {
        let state = self.state.for_copy();
        Self::register_with(state.guard(self.as_fd().try_clone_to_owned()?), state)
    }

    /// Registers the socket for reading only, so this thread is not woken whenever the peer
    /// consumes a packet. That uses less CPU, but an immediate reply is noticed a little later. If
    /// the system refuses the registration, the socket stays as it was.
    pub(crate) fn quiet(mut self) -> Self {
        // A registration can't be changed, so register a copy and drop the old descriptor.
        let registered = {
            let _context = self.runtime.enter();
            let copy = self.as_fd().try_clone_to_owned();
            copy.and_then(|copy| {
                sys::register(self.state.guard(copy), Interest::READABLE | Interest::PRIORITY)
            })
        };
        if let Ok(io) = registered {
            // The old descriptor is not the last copy, so its `close` is quick.
            drop(std::mem::replace(&mut self.io, io).into_inner().into_fd());
            self.quiet = true;
        }
        self
    }

    /// Returns the socket for a system call that does not wait.
    #[inline]
    pub(crate) fn endpoint(&self) -> Endpoint<'_> {
        Endpoint::new(self.as_fd(), &self.state)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}
