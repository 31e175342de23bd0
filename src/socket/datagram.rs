//! Datagram sockets: each message stands for itself, and may come from anybody who may send there.

use std::{
    future::poll_fn,
    io::{Error as IoError, ErrorKind, Result},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{self, net::SocketAddr},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use nix::{
    libc,
    sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, setsockopt},
};
use smallvec::SmallVec;
use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyGuard},
    },
    task::coop,
};

use super::{
    Backoff, PassCredentials,
    convert::{checked, invalid_descriptor, unix_socket_type},
    inherited::take_numbered,
    local_addr,
    path::{PathGuard, unix_addr},
};
use crate::{
    Credentials, Error, Fds,
    closer::{self, Account, BackgroundFd, InBackground},
    limits::SCM_MAX_FD,
    sys,
};

/// Room for a datagram. By default a sender's buffer holds one of 212,960 bytes (`SO_SNDBUF`, socket(7)).
const MAX_PAYLOAD_BYTES: usize = 256 << 10;

/// Number of descriptors that came in datagrams and may wait to be closed. While more wait, nothing is received.
const MAX_CLOSING: usize = 2 * SCM_MAX_FD;

/// One message from a [`DatagramSocket`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Datagram {
    /// The bytes. An empty datagram is a message like any other, and may have descriptors.
    pub payload: Bytes,
    /// The descriptors that came with it, at most 253.
    pub fds: Fds,
    /// The address that the sender is bound to, where an answer goes. `None` if the sender has none.
    pub sender: Option<SocketAddr>,
    /// The process that sent it, if the socket was [asked](DatagramSocket::set_pass_credentials) to report that. `None`
    /// also for datagrams that were sent before.
    pub credentials: Option<Credentials>,
}

/// A Unix socket of type `SOCK_DGRAM`, registered with tokio: messages with descriptors and without a connection.
///
/// A datagram arrives whole, with its descriptors, or not at all, and each one stands for itself. So there is no end of the stream, no
/// codec with state, and an error of one datagram says nothing about the next. Unix sockets do not reorder or lose datagrams: a sender
/// waits while the receiver's queue is full. For a connection between two processes [`Socket`](crate::Socket) is better, because
/// it notices when the peer ends.
///
/// All methods take `&self`, and any number of tasks may send and receive at a time.
///
/// **Who may send.** A socket file is created with mode 0600. Anybody may send to an abstract name. Ask for [credentials](Self::set_pass_credentials)
/// to know who did. A [connected](Self::connect) socket receives only from its peer.
///
/// **Who owns the path** is decided as for a [`Listener`](crate::Listener): a lock file beside it, a stale socket is replaced, and the
/// socket file is removed on drop.
///
/// **Against floods.** The kernel queues few datagrams of others (`/proc/sys/net/unix/max_dgram_qlen`, usually 10), so a sender that floods
/// keeps others waiting. Descriptors that nobody takes are closed [in the background](crate::close_in_background); while more
/// than 506 wait for that, nothing is received.
///
/// # Panics
/// Every way to get one panics outside of a tokio runtime, or where the runtime's I/O driver is not enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{fs::File, os::fd::AsFd};
///
/// use fdwire::DatagramSocket;
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.sock");
/// let service = DatagramSocket::bind(&path)?;
///
/// let client = DatagramSocket::autobind()?; // with an address, so that it can get an answer
/// client.connect(&path)?;
/// let file = File::open("/dev/null")?;
/// client.send("store this", &[file.as_fd()]).await?;
///
/// let datagram = service.recv().await?;
/// assert_eq!((&datagram.payload[..], datagram.fds.len()), (&b"store this"[..], 1));
/// let sender = datagram.sender.ok_or("the sender has no address")?;
/// service.send_to("stored", &[], &sender).await?;
/// assert_eq!(client.recv().await?.payload, "stored");
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct DatagramSocket {
    io: AsyncFd<BackgroundFd>,
    /// Descriptors that came in datagrams and wait to be closed.
    account: Arc<Account>,
    path: Option<PathGuard>,
    /// Room for one datagram, empty between receives.
    buffer: Mutex<BytesMut>,
}

impl DatagramSocket {
    /// Returns two sockets that are connected to each other.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) = socket::socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self::register(a, None)?, Self::register(b, None)?))
    }

    /// Returns a socket without an address. It can send, and receives only from a peer that it is connected to by
    /// [`pair`](Self::pair).
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn unbound() -> Result<Self> {
        Self::register(new_socket()?, None)
    }

    /// Binds to an abstract name that the kernel chooses and nobody else has (unix(7), "Autobind feature"), so that the
    /// receiver of a datagram can answer.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn autobind() -> Result<Self> {
        let fd = new_socket()?;
        socket::bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
        Self::register(fd, None)
    }

    /// Binds to a path, which gets mode 0600.
    ///
    /// # Errors
    /// `AddrInUse` if a live process has the path, `AlreadyExists` if something other than a socket is there or `<path>.lock` is
    /// not a regular file, and those of bind(2).
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        Self::bind_with_mode(path, 0o600)
    }

    /// Binds to a path, which gets exactly the given mode, as [`Listener::bind_with_mode`](crate::Listener::bind_with_mode)
    /// does. Sending takes write permission.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind), and `NotFound` if the umask has to be undone and `/proc` is not mounted.
    pub fn bind_with_mode(path: impl AsRef<Path>, mode: u32) -> Result<Self> {
        let path = path.as_ref();
        let addr = UnixAddr::new(path)?;
        let mut guard = PathGuard::take(path)?;
        let fd = new_socket()?;
        guard.bind(&fd, &addr, mode)?;
        Self::register(fd, Some(guard))
    }

    /// Binds to an address; beside paths these are abstract names ([`std::os::linux::net::SocketAddrExt`]), to which any
    /// uid can send.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind).
    pub fn bind_addr(addr: &SocketAddr) -> Result<Self> {
        if let Some(path) = addr.as_pathname() {
            return Self::bind(path);
        }
        let addr = unix_addr(addr)?;
        let fd = new_socket()?;
        socket::bind(fd.as_raw_fd(), &addr)?;
        Self::register(fd, None)
    }

    /// Takes a datagram socket that this process has inherited, as
    /// [`Socket::from_inherited`](crate::Socket::from_inherited) does.
    ///
    /// # Errors
    /// As there, of a Unix datagram socket.
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }

    fn register(fd: OwnedFd, path: Option<PathGuard>) -> Result<Self> {
        closer::start();
        let account = Arc::<Account>::default();
        let fd = BackgroundFd::new(fd, InBackground::counted(Arc::clone(&account)));
        let io = sys::register(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { io, account, path, buffer: Mutex::new(BytesMut::with_capacity(MAX_PAYLOAD_BYTES)) })
    }

    /// Connects to the socket at a path: [`send`](Self::send) goes there, and nothing is received from elsewhere.
    ///
    /// The peer is not told. If it goes away, sends fail and nothing ends; another `connect` is possible. Datagrams that the
    /// kernel has queued for a socket are discarded when it connects to another peer than before.
    ///
    /// # Errors
    /// Those of connect(2), among them `NotFound`, `ConnectionRefused` (nobody has the socket open) and `PermissionDenied`
    /// (by the mode of the path, or because the peer is connected to another socket).
    pub fn connect(&self, path: impl AsRef<Path>) -> Result<()> {
        self.connect_addr(&SocketAddr::from_pathname(path)?)
    }

    /// Connects to an address in the same way.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    pub fn connect_addr(&self, addr: &SocketAddr) -> Result<()> {
        Ok(socket::connect(self.io.as_raw_fd(), &unix_addr(addr)?)?)
    }

    /// Sends a datagram to the connected peer, with at most 253 descriptors, of which the receiver gets copies. Waits while
    /// the receiver's queue is full.
    ///
    /// # Errors
    /// Nothing was sent then, and the next send may succeed. `ConnectionRefused` (the peer has closed its socket), `NotConnected`,
    /// `EMSGSIZE` (larger than the send buffer), `InvalidInput` (more than 253 descriptors), `PermissionDenied` (the peer takes no
    /// descriptors, or is connected to another socket), and others of sendmsg(2).
    ///
    /// # Cancel safety
    /// When dropped, the datagram was not sent.
    pub async fn send(&self, payload: impl AsRef<[u8]>, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_with(payload.as_ref(), fds, None).await
    }

    /// Sends a datagram to an address. Waits while the receiver's queue is full, by the runtime's timer, because no event announces
    /// room there.
    ///
    /// # Errors
    /// As for [`send`](Self::send). `NotFound` and `ConnectionRefused` if nobody has a socket at the address.
    ///
    /// # Cancel safety
    /// When dropped, the datagram was not sent.
    ///
    /// # Panics
    /// If it has to wait and the runtime's timer is not enabled.
    pub async fn send_to(
        &self,
        payload: impl AsRef<[u8]>,
        fds: &[BorrowedFd<'_>],
        receiver: &SocketAddr,
    ) -> Result<()> {
        self.send_with(payload.as_ref(), fds, Some(&unix_addr(receiver)?)).await
    }

    async fn send_with(&self, payload: &[u8], fds: &[BorrowedFd<'_>], receiver: Option<&UnixAddr>) -> Result<()> {
        if fds.len() > SCM_MAX_FD {
            let reason = format!("a datagram takes at most {SCM_MAX_FD} descriptors, not {}", fds.len());
            return Err(IoError::new(ErrorKind::InvalidInput, reason));
        }
        let mut backoff = Backoff::default();
        let mut writable: Option<AsyncFdReadyGuard<'_, BackgroundFd>> = None;
        loop {
            let coop = poll_fn(coop::poll_proceed).await;
            match sys::send_datagram(self.as_fd(), payload, fds.iter().copied(), receiver) {
                Ok(()) => {
                    coop.made_progress();
                    return Ok(());
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) if receiver.is_none() => {
                        drop(coop);
                        // Readiness from before the send may be stale. Ask for it, and only if it is stale then, wait.
                        match writable.take() {
                            None => writable = Some(self.io.writable().await?),
                            Some(mut stale) => stale.clear_ready(),
                        }
                    }
                    // Nothing announces that another socket's queue has room, nor that fewer descriptors of this uid are
                    // in flight, nor that there is memory.
                    Some(libc::EAGAIN | libc::ETOOMANYREFS | libc::ENOMEM | libc::ENOBUFS) => {
                        drop(coop);
                        tokio::time::sleep(backoff.next()).await;
                    }
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Waits for the next datagram.
    ///
    /// # Errors
    /// None is the end: the next call goes on with the next datagram.
    ///
    /// [`TruncatedPacket`](Error::TruncatedPacket) if a datagram is longer than 256 KiB, and
    /// [`TruncatedControl`](Error::TruncatedControl) if some of its descriptors were lost because this process has no more
    /// left. The rest of that datagram is closed. [`Io`](Error::Io) with `ConnectionReset` before the next datagram, if the
    /// peer has connected to another socket and so has discarded what was sent to it, and for others of recvmsg(2).
    ///
    /// # Cancel safety
    /// No datagram is lost when dropped.
    pub async fn recv(&self) -> std::result::Result<Datagram, Error> {
        poll_fn(|cx| self.account.poll_at_most(cx, MAX_CLOSING)).await;
        self.io.async_io(Interest::READABLE, |_| self.try_recv()).await?
    }

    /// Polls for the next datagram. Only the task that polled last is woken.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::DatagramSocket;
    /// use futures::{StreamExt, stream};
    ///
    /// let (a, b) = DatagramSocket::pair()?;
    /// a.send("one", &[]).await?;
    /// let mut datagrams = stream::poll_fn(|cx| b.poll_recv(cx).map(Some));
    /// assert_eq!(datagrams.next().await.ok_or("it never ends")??.payload, "one");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As for [`recv`](Self::recv).
    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<std::result::Result<Datagram, Error>> {
        loop {
            ready!(self.account.poll_at_most(cx, MAX_CLOSING));
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            if let Ok(received) = ready.try_io(|_| self.try_recv()) {
                return Poll::Ready(received?);
            }
        }
    }

    /// # Errors
    /// `WouldBlock` if there is no datagram. The inner error is about one datagram.
    fn try_recv(&self) -> Result<std::result::Result<Datagram, Error>> {
        let mut fds = SmallVec::new();
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let (received, sender) = loop {
            match sys::recv_datagram(self.as_fd(), &mut buffer, &mut fds) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                received => break received?,
            }
        };
        let payload = Bytes::copy_from_slice(&buffer);
        buffer.clear();
        drop(buffer);
        // From here on, descriptors that nobody takes are closed in the background.
        let fds = Fds::from_peer(fds, Some(Arc::<Account>::clone(&self.account)));
        Ok(match received {
            sys::Received { packet_truncated: true, .. } => Err(Error::TruncatedPacket),
            sys::Received { control_truncated: true, .. } => Err(Error::TruncatedControl),
            sys::Received { credentials, .. } => Ok(Datagram { payload, fds, sender, credentials }),
        })
    }

    /// Returns the address that it is bound to. `None` if it is not bound.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> Result<Option<SocketAddr>> {
        local_addr(&self.io)
    }

    /// Chooses what is reported about the sender of each datagram, in [`Datagram::credentials`]. The default is
    /// [`PassCredentials::No`].
    ///
    /// A sender that is not bound gets an abstract name from the kernel when it sends to a socket that asks for credentials, or asks for
    /// them itself.
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        pass.set(&self.io)
    }

    /// Chooses whether this socket takes descriptors, as [`Socket::set_pass_fds`](crate::Socket::set_pass_fds) does. The
    /// default is true.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.16.
    pub fn set_pass_fds(&self, pass: bool) -> Result<()> {
        Ok(setsockopt(&self.io, sys::PassRights, &pass)?)
    }
}

fn new_socket() -> Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

impl AsFd for DatagramSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

/// Takes a Unix datagram socket. Its file status flags are left alone, and credentials are switched off. The path, if it has
/// one, stays as it is on drop.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for DatagramSocket {
    type Error = IoError;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        let (fd, ()) = checked(fd, |fd| match unix_socket_type(fd)? {
            SockType::Datagram => PassCredentials::No.set(fd),
            _ => Err(invalid_descriptor("it is not SOCK_DGRAM")),
        })?;
        Self::register(fd, None)
    }
}

impl TryFrom<unix::net::UnixDatagram> for DatagramSocket {
    type Error = IoError;

    fn try_from(socket: unix::net::UnixDatagram) -> Result<Self> {
        OwnedFd::from(socket).try_into()
    }
}

/// The socket file stays in place for the next holder of the descriptor.
impl From<DatagramSocket> for OwnedFd {
    fn from(socket: DatagramSocket) -> Self {
        if let Some(guard) = socket.path {
            guard.hand_on();
        }
        socket.io.into_inner().into_fd()
    }
}
