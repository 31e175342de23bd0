//! Connected `AF_UNIX` sockets that keep boundaries (SEQPACKET) or not (STREAM), on tokio's event loop.

mod admission;
mod convert;
mod io;
mod listener;
mod path;
mod uid_account;

use std::{
    io::{Error, Result},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::SocketAddr,
    },
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{self, AddressFamily, SockFlag, SockType, getsockopt, setsockopt, sockopt},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

pub(crate) use io::{SendWait, TooLarge};
pub use listener::Listener;
pub(crate) use path::PathGuard;
pub use uid_account::UidLimits;
use uid_account::UidShare;

pub(crate) use crate::sys::Received;

use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    sys,
};

/// The two kinds of socket.
///
/// Frames have the same meaning on both. SEQPACKET moves large payloads faster, STREAM is what most other programs
/// speak.
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

/// Who is at the other end: the process that called `connect`, `listen` or `socketpair`, at that time (`SO_PEERCRED`,
/// unix(7)).
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
    fn of(socket: &impl AsFd) -> Result<Self> {
        let cred = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { uid: cred.uid(), gid: cred.gid(), pid: Some(cred.pid()).filter(|&pid| pid != 0) })
    }
}

/// A connected Unix socket of either kind, registered with tokio.
///
/// Used through [`Framed`](crate::Framed). Converts from and into the sockets of std, tokio and tokio-seqpacket, and
/// `OwnedFd`; a descriptor of another type is refused with a clear error. `O_NONBLOCK`, which all holders of a socket
/// share, is not needed and left alone: a socket made here is a blocking one for a child that gets it as standard input.
///
/// # Panics
/// Every way to get one panics outside of a tokio runtime, or where the runtime's I/O driver is not enabled.
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

    /// The socket that this process got as standard input: how a parent gives one to a child, by
    /// `Command::stdin(OwnedFd::from(socket))`, with nothing to inherit by accident.
    ///
    /// It is a copy. Descriptor 0 stays open beside it until the process ends, so dropping the copy does not end the
    /// connection; closing or dropping a [`WriteHalf`](crate::WriteHalf) does end that direction.
    ///
    /// # Errors
    /// `InvalidInput` if standard input is not a connected Unix socket of either kind.
    pub fn from_stdin() -> Result<Self> {
        std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .and_then(Self::try_from)
            .map_err(|error| Error::new(error.kind(), format!("standard input: {error}")))
    }

    /// Connects to the listener at a path. Waits while the listener's backlog is full. No event
    /// announces room there, so it tries again and again, by the runtime's timer.
    ///
    /// # Panics
    /// As for [every way to get a socket](Self#panics), and if the backlog is full and the
    /// runtime's timer is not enabled.
    ///
    /// # Errors
    /// Those of connect(2), among them `NotFound`, `ConnectionRefused` (nobody listens), `PermissionDenied`, and
    /// `EPROTOTYPE` (the listener is of the other kind).
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn connect(path: impl AsRef<Path>, kind: SocketKind) -> Result<Self> {
        Self::connect_addr(&SocketAddr::from_pathname(path)?, kind).await
    }

    /// Connects to an address; beside paths these are abstract names ([`std::os::linux::net::SocketAddrExt`]). Waits
    /// while the listener's backlog is full.
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
        })
    }

    /// Saves its thread the wakeup for each packet that the peer consumes. That takes less CPU, and a peer that answers at once is
    /// waited for asleep. Where the system refuses, all stays as it was.
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

    /// Which kind it is.
    pub fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn peer_cred(&self) -> Result<PeerCred> {
        PeerCred::of(&self.io)
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
        Ok(getsockopt(self, sockopt::PeerPidfd)?)
    }

    /// Size of the send buffer in bytes as the kernel counts it (`SO_SNDBUF`, socket(7)). A packet holds at most this
    /// less 32 bytes.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn send_buffer_size(&self) -> Result<usize> {
        Ok(getsockopt(self, sockopt::SndBuf)?)
    }

    /// Asks for a send buffer of `bytes` bytes. The kernel doubles the number for its own bookkeeping, and caps it at
    /// `/proc/sys/net/core/wmem_max`. To be set before the socket goes into a [`Framed`](crate::Framed).
    ///
    /// For frames of 1 MiB and more on SEQPACKET a buffer of 4 MiB instead of the usual 208 KiB makes four times the
    /// throughput: the packets of a long frame are a quarter of the buffer.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_send_buffer_size(&self, bytes: usize) -> Result<()> {
        Ok(setsockopt(self, sockopt::SndBuf, &bytes)?)
    }

    /// Chooses whether this socket takes descriptors from the peer (`SO_PASSRIGHTS`, Linux 6.16).
    /// The default is true. With false, the peer's send with descriptors fails with
    /// `PermissionDenied` and sends nothing.
    ///
    /// What the peer sent before this call is still received with its descriptors. For an accepted
    /// connection, which the client may use before it is accepted, use [`Listener::set_pass_fds`]
    /// instead.
    ///
    /// # Errors
    /// `ENOPROTOOPT` on an older kernel.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        Ok(setsockopt(self, sys::PassRights, &pass)?)
    }

    /// Ends a direction of the connection, for every holder of the socket. After `Shutdown::Read`
    /// the peer's sends fail with `EPIPE`, and what it sent before stays readable; then comes the
    /// end. A task that waits to receive is woken, on both kinds of socket.
    ///
    /// # Errors
    /// `NotConnected`.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        let how = match how {
            Shutdown::Read => socket::Shutdown::Read,
            Shutdown::Write => socket::Shutdown::Write,
            Shutdown::Both => socket::Shutdown::Both,
        };
        Ok(socket::shutdown(self.io.as_raw_fd(), how)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
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
