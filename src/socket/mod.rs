//! Connected `AF_UNIX` sockets that keep boundaries (SEQPACKET) or not (STREAM), on tokio's event
//! loop.

mod admission;
mod convert;
mod datagram;
mod inherited;
mod io;
mod listener;
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
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
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

pub use datagram::{Datagram, DatagramSocket};
pub(crate) use io::{HasFd, SendWait, TooLarge};
pub use listener::Listener;
pub use options::PeerCred;
pub use pass_credentials::PassCredentials;
pub use uid_account::UidLimits;
use uid_account::UidShare;

pub(crate) use crate::sys::Received;

use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    sys,
};

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
    fn sock_type(self) -> SockType {
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
    kind: SocketKind,
    /// What waits to be closed of what came over this socket.
    account: Arc<Account>,
    /// Of a connection that a listener has accepted.
    uid_share: Option<UidShare>,
    /// Registered for reading only: see [`quiet`](Self::quiet).
    quiet: bool,
    /// Where it is registered, and where timers are made, wherever it is polled from.
    runtime: Handle,
    /// Whether the kernel has said `ECONNRESET`.
    reset: AtomicBool,
    /// Whether this process has asked for credentials. Another holder of the socket may have
    /// switched them on as well.
    wants_credentials: AtomicBool,
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
        Self::register_for_uid(fd, kind, None)
    }

    /// The same for a connection that counts for its peer's uid.
    fn register_for_uid(fd: OwnedFd, kind: SocketKind, uid_share: Option<UidShare>) -> Result<Self> {
        closer::start();
        let account = Arc::new(uid_share.as_ref().map(UidShare::closing_account).unwrap_or_default());
        let fd = BackgroundFd::new(fd, InBackground::counted(Arc::clone(&account)));
        Ok(Self {
            io: sys::register(fd, Interest::READABLE | Interest::PRIORITY | Interest::WRITABLE)?,
            kind,
            account,
            uid_share,
            quiet: false,
            runtime: Handle::current(),
            reset: AtomicBool::new(false),
            wants_credentials: AtomicBool::new(false),
        })
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
        let fd = self.guard(self.as_fd().try_clone_to_owned()?);
        Ok(Self {
            io: sys::register(fd, Interest::READABLE | Interest::PRIORITY | Interest::WRITABLE)?,
            kind: self.kind,
            account: Arc::clone(&self.account),
            uid_share: self.uid_share.as_ref().map(UidShare::for_copy),
            quiet: false,
            runtime: Handle::current(),
            reset: AtomicBool::new(self.reset.load(Ordering::Relaxed)),
            wants_credentials: AtomicBool::new(self.wants_credentials()),
        })
    }

    /// Saves its thread the wakeup for each packet that the peer consumes. That takes less CPU, and
    /// a peer that answers at once is waited for asleep. Where the system refuses, all stays as it
    /// was.
    pub(crate) fn quiet(mut self) -> Self {
        let registered = {
            let _context = self.runtime.enter();
            let copy = self.as_fd().try_clone_to_owned();
            copy.and_then(|copy| sys::register(self.guard(copy), Interest::READABLE | Interest::PRIORITY))
        };
        if let Ok(io) = registered {
            // This copy is not the last one, so its `close` is quick.
            drop(std::mem::replace(&mut self.io, io).into_inner().into_fd());
            self.quiet = true;
        }
        self
    }

    /// A copy of the socket is closed as the socket itself is.
    fn guard(&self, copy: OwnedFd) -> BackgroundFd {
        BackgroundFd::new(copy, InBackground::counted(Arc::clone(&self.account)))
    }

    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Waits while too many descriptors wait to be closed: more than `limit` of this connection, or
    /// more than its uid may have.
    pub(crate) fn poll_closed(&self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        ready!(self.account.poll_at_most(cx, limit));
        match &self.uid_share {
            Some(share) => share.poll_closed(cx),
            None => Poll::Ready(()),
        }
    }

    /// Reports what has arrived of messages that are not complete.
    ///
    /// # Errors
    /// [`OverUidLimit`](crate::Error::OverUidLimit) if that is more than the peer's uid may have.
    #[inline]
    pub(crate) fn hold(&self, bytes: usize, fds: usize) -> std::result::Result<(), crate::Error> {
        match &self.uid_share {
            Some(share) => share.hold(bytes, fds),
            None => Ok(()),
        }
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
