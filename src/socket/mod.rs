//! Connected `AF_UNIX` sockets that keep boundaries (SEQPACKET) or not (STREAM), on tokio's event
//! loop.

mod admission;
mod convert;
mod datagram;
mod endpoint;
mod inherited;
mod io;
mod listener;
mod listener_state;
mod managers;
mod options;
mod pass_credentials;
mod path;
mod uid_account;

use std::{
    io::Result,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::SocketAddr,
    },
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

pub(crate) use convert::connected;
pub use datagram::{Datagram, DatagramSocket};
pub(crate) use endpoint::{Attempt, Endpoint, SocketState};
pub(crate) use inherited::{take_numbered, take_stdin};
pub(crate) use io::SendWait;
pub use listener::Listener;
pub(crate) use listener_state::{ListenerState, listener_addr};
pub(crate) use managers::{Passed, passed};
pub use options::PeerCred;
pub use pass_credentials::PassCredentials;
pub(crate) use path::{PathGuard, unix_addr};
pub use uid_account::UidLimits;

use crate::{closer::BackgroundFd, sys};

/// The two kinds of socket.
///
/// Frames have the same meaning on both. SEQPACKET moves large payloads faster, STREAM is what most
/// other programs speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SocketKind {
    /// `SOCK_SEQPACKET`: connected, in order, in packets.
    SeqPacket,
    /// `SOCK_STREAM`: connected, in order, bytes.
    Stream,
}

impl SocketKind {
    pub(crate) fn sock_type(self) -> SockType {
        match self {
            Self::SeqPacket => SockType::SeqPacket,
            Self::Stream => SockType::Stream,
        }
    }
}

/// A connected Unix socket of either kind, registered with tokio.
///
/// Used through [`Framed`](crate::Framed). Converts from and into the sockets of std, tokio and
/// tokio-seqpacket, and `OwnedFd`; a descriptor of another type is refused with a clear error.
/// `O_NONBLOCK`, which all holders of a socket share, is not needed and left alone: a socket made
/// here is a blocking one for a child that gets it as standard input.
///
/// # Panics
/// Every way to get one panics outside of a tokio runtime, or where the runtime's I/O driver is not
/// enabled.
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
    /// Registered for reading only: see [`quiet`](Self::quiet).
    quiet: bool,
    /// Where it is registered, and where timers are made, wherever it is polled from.
    runtime: Handle,
}

impl Socket {
    /// Two connected sockets.
    ///
    /// # Errors
    /// Those of socketpair(2): no more descriptors, no memory.
    pub fn pair(kind: SocketKind) -> Result<(Self, Self)> {
        let (a, b) = socket::socketpair(AddressFamily::Unix, kind.sock_type(), None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self::register(a, kind)?, Self::register(b, kind)?))
    }

    /// Connects to the listener at a path. Waits while the listener's backlog is full. No event
    /// announces room there, so it tries again and again, by the runtime's timer.
    ///
    /// # Panics
    /// As for [every way to get a socket](Self#panics), and if the backlog is full and the
    /// runtime's timer is not enabled.
    ///
    /// # Errors
    /// Those of connect(2), among them `NotFound`, `ConnectionRefused` (nobody listens),
    /// `PermissionDenied`, and `EPROTOTYPE` (the listener is of the other kind).
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn connect(path: impl AsRef<Path>, kind: SocketKind) -> Result<Self> {
        Self::connect_addr(&SocketAddr::from_pathname(path)?, kind).await
    }

    /// Connects to an address; beside paths these are abstract names
    /// ([`std::os::linux::net::SocketAddrExt`]). Waits while the listener's backlog is full.
    ///
    /// # Panics
    /// As for [`connect`](Self::connect).
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn connect_addr(addr: &SocketAddr, kind: SocketKind) -> Result<Self> {
        let addr = path::unix_addr(addr)?;
        let fd = new_socket(kind)?;
        let mut backoff = Backoff::default();
        loop {
            match socket::connect(fd.as_raw_fd(), &addr) {
                Ok(()) => {
                    set_nonblocking(&fd, false)?;
                    return Self::register(fd, kind);
                }
                // The backlog is full. Nothing was begun, so no event will tell when there is room.
                Err(Errno::EAGAIN) => tokio::time::sleep(backoff.next()).await,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Registers a connected socket. Nobody else knows the descriptor's number.
    fn register(fd: OwnedFd, kind: SocketKind) -> Result<Self> {
        let state = SocketState::new(kind, None);
        Self::register_with(state.guard(fd), state)
    }

    /// The same for a socket that has a state already.
    pub(crate) fn register_with(fd: BackgroundFd, state: SocketState) -> Result<Self> {
        Ok(Self {
            io: sys::register(fd, Interest::READABLE | Interest::PRIORITY | Interest::WRITABLE)?,
            state,
            quiet: false,
            runtime: Handle::current(),
        })
    }

    /// Takes the socket off its event loop.
    pub(crate) fn into_unregistered(self) -> (BackgroundFd, SocketState) {
        (self.io.into_inner(), self.state)
    }

    /// Returns another handle to the same socket, by another descriptor (close-on-exec), registered
    /// with the current runtime.
    ///
    /// The handles share everything that the kernel keeps: options, the send buffer and the receive
    /// queue. So two readers take each other's messages, two writers mix theirs on a stream, and
    /// [`shutdown`](Self::shutdown) ends all handles. The connection ends by itself when the last
    /// handle is dropped. That the peer has closed without reading everything
    /// ([`Error::Reset`](crate::Error::Reset)) is reported to one of them.
    ///
    /// Descriptors that nobody takes count for both together while they wait to be closed. At a
    /// listener that limits what [one uid](UidLimits) may have, the handle counts as one more
    /// connection, but is never refused.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE`, and those of registering the descriptor with tokio.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
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

    /// Saves its thread the wakeup for each packet that the peer consumes. That takes less CPU, and
    /// a peer that answers at once is waited for asleep. Where the system refuses, all stays as it
    /// was.
    pub(crate) fn quiet(mut self) -> Self {
        let registered = {
            let _context = self.runtime.enter();
            let copy = self.as_fd().try_clone_to_owned();
            copy.and_then(|copy| sys::register(self.state.guard(copy), Interest::READABLE | Interest::PRIORITY))
        };
        if let Ok(io) = registered {
            // This copy is not the last one, so its `close` is quick.
            drop(std::mem::replace(&mut self.io, io).into_inner().into_fd());
            self.quiet = true;
        }
        self
    }

    /// The socket for a system call that does not wait.
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

/// Returns the address that a socket is bound to, or `None` if it has no name.
fn local_addr(socket: &impl AsRawFd) -> Result<Option<SocketAddr>> {
    let addr = socket::getsockname::<UnixAddr>(socket.as_raw_fd())?;
    match (addr.path(), addr.as_abstract()) {
        (Some(path), _) => SocketAddr::from_pathname(path).map(Some),
        (_, Some(name)) => SocketAddr::from_abstract_name(name).map(Some),
        _ => Ok(None),
    }
}

/// A socket for `connect` and `accept`, which have no flag for not blocking.
fn new_socket(kind: SocketKind) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, kind.sock_type(), flags, None)?)
}

/// Changes `O_NONBLOCK` of the open file, for every holder.
fn set_nonblocking(fd: impl AsFd, yes: bool) -> Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, yes);
    fcntl(&fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Waiting times for what no event announces: 1 ms, then twice as long each time, up to 64 ms.
#[derive(Debug, Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    pub(crate) fn next(&mut self) -> Duration {
        let delay = Duration::from_millis(1 << self.0);
        self.0 = (self.0 + 1).min(6);
        delay
    }
}
