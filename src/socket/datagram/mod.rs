//! Datagram sockets: messages without a connection, from any process that may send to the address.

mod io;

use std::{
    io::{Error, Result},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{self, net::SocketAddr},
    },
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::{Bytes, BytesMut};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, setsockopt};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    PassCredentials,
    check::{checked, invalid_descriptor, unix_socket_type},
    inherited::take_numbered,
    open::{local_addr, unix_addr},
    path::PathGuard,
};
use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    credentials::Credentials,
    frame::Fds,
    sys,
};

/// The greatest length of a datagram in bytes. With the default send buffer, a sender can send
/// 212,960 bytes (`SO_SNDBUF`, socket(7)).
const MAX_PAYLOAD_BYTES: usize = 256 << 10;

/// One message from a [`DatagramSocket`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Datagram {
    /// The bytes. An empty datagram is a message like any other, and may have descriptors.
    pub payload: Bytes,
    /// The descriptors that came with it, at most 253.
    pub fds: Fds,
    /// The address to which the sender is bound, for an answer. `None` if the sender is not bound.
    pub sender: Option<SocketAddr>,
    /// The process that sent it, if the socket is set to [report
    /// it](DatagramSocket::set_pass_credentials). `None` also for datagrams that were sent before
    /// that was set.
    pub credentials: Option<Credentials>,
}

/// A Unix socket of type `SOCK_DGRAM`, registered with tokio: messages with descriptors and without
/// a connection.
///
/// A datagram arrives whole, with its descriptors, or not at all. It does not depend on others. So
/// there is no end of the stream and no codec with state, and an error of one datagram does not
/// affect the next. Unix sockets do not reorder or lose datagrams: a sender waits while the
/// receiver's queue is full. For a connection between two processes, use [`Socket`](crate::Socket),
/// which reports when the peer ends.
///
/// All methods take `&self`, and any number of tasks may send and receive at a time.
///
/// **Who may send.** A socket file is created with mode 0600. Any process may send to an abstract
/// name. Switch [credentials](Self::set_pass_credentials) on to identify the sender. While a socket
/// is [connected](Self::connect), only its peer may send to it. But the connection does not prove
/// which process has sent a datagram: datagrams that others have sent before are still received,
/// and the connection ends with the first send after the peer is gone.
///
/// **Who owns the path** is decided as for a [`Listener`](crate::Listener): there is a lock file
/// beside it, a stale socket is replaced, and the socket file is removed on drop.
///
/// **Against floods.** The kernel queues few datagrams (`/proc/sys/net/unix/max_dgram_qlen`,
/// usually 10), so a sender that floods keeps others waiting. Descriptors that the application does
/// not take are closed [in the background](crate::close_in_background). While more than 506 of them
/// wait to be closed, nothing is received.
///
/// # Panics
/// Every function that returns one panics outside of a tokio runtime, or if the runtime's I/O
/// driver is not enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{fs::File, os::fd::AsFd};
///
/// use fdwire::socket::DatagramSocket;
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
    /// The count of descriptors that came in datagrams and wait to be closed.
    account: Arc<Account>,
    path: Option<PathGuard>,
    /// The buffer for one datagram. It is empty between receives, and without memory before the
    /// first one.
    buffer: Mutex<BytesMut>,
}

impl DatagramSocket {
    /// Returns two sockets that are connected to each other.
    ///
    /// # Errors
    /// The errors of socketpair(2).
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) = socket::socketpair(
            AddressFamily::Unix,
            SockType::Datagram,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self::register(a, None)?, Self::register(b, None)?))
    }

    /// Returns a socket without an address. It can send, but as long as it has no address, nobody
    /// can send to it.
    ///
    /// # Errors
    /// The errors of socket(2).
    pub fn unbound() -> Result<Self> {
        Self::register(new_socket()?, None)
    }

    /// Binds to an abstract name that the kernel chooses and no other socket has (unix(7),
    /// "Autobind feature"), so that the receiver of a datagram can answer.
    ///
    /// # Errors
    /// The errors of bind(2).
    pub fn autobind() -> Result<Self> {
        let fd = new_socket()?;
        socket::bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
        Self::register(fd, None)
    }

    /// Binds to a path, which gets mode 0600.
    ///
    /// # Errors
    /// `AddrInUse` if a live process has the path, `AlreadyExists` if something other than a socket
    /// is there or `<path>.lock` is not a regular file, and those of bind(2).
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        Self::bind_with_mode(path, 0o600)
    }

    /// Binds to a path, which gets exactly the given mode, as
    /// [`Listener::bind_with_mode`](crate::Listener::bind_with_mode) does. Senders need write
    /// permission.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind), and `NotFound` if the umask has to be undone and `/proc`
    /// is not mounted.
    pub fn bind_with_mode(path: impl AsRef<Path>, mode: u32) -> Result<Self> {
        let path = path.as_ref();
        let addr = UnixAddr::new(path)?;
        // The path is locked before the socket is bound.
        let mut guard = PathGuard::take(path)?;
        let fd = new_socket()?;
        guard.bind(&fd, &addr, mode)?;
        Self::register(fd, Some(guard))
    }

    /// Binds to an address, which may be a path or an abstract name
    /// ([`std::os::linux::net::SocketAddrExt`]). Any uid can send to an abstract name.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind).
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
    /// The errors of [`Socket::from_inherited`](crate::Socket::from_inherited), with a Unix
    /// datagram socket in place of a connected one.
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }

    fn register(fd: OwnedFd, path: Option<PathGuard>) -> Result<Self> {
        closer::start();
        let account = Arc::<Account>::default();
        let fd = BackgroundFd::new(fd, InBackground::counted(Arc::clone(&account)));
        let io = sys::register(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { io, account, path, buffer: Mutex::default() })
    }

    /// Connects to the socket at a path. From then on, [`send`](Self::send) sends to that socket,
    /// and only that socket may send to this one.
    ///
    /// The peer is not notified. Datagrams that were queued before the first `connect` are still
    /// received, from any sender. If a socket connects to another peer than before, the kernel
    /// discards its queue.
    ///
    /// If the peer closes its socket, nothing happens until the next send. That send fails with
    /// `ConnectionRefused`. At this moment the kernel ends the connection and discards the queue,
    /// even the last datagrams of the peer. From then on sends fail with `NotConnected`, and any
    /// process may send to this socket as before, until another `connect`.
    ///
    /// The kernel closes the descriptors in a discarded queue in the calling thread. If sockets
    /// with `SO_LINGER` are among them, that can take as long as the peer wants. If you do not
    /// trust the peer, [refuse descriptors](Self::set_pass_fds), because nothing else prevents
    /// that.
    ///
    /// # Errors
    /// The errors of connect(2), among them `NotFound`, `ConnectionRefused` (nobody has the socket
    /// open) and `PermissionDenied` (by the mode of the path, or because the peer is connected to
    /// another socket).
    pub fn connect(&self, path: impl AsRef<Path>) -> Result<()> {
        self.connect_addr(&SocketAddr::from_pathname(path)?)
    }

    /// Connects to an address, which may be a path or an abstract name, as
    /// [`connect`](Self::connect) does.
    ///
    /// # Errors
    /// The errors of [`connect`](Self::connect).
    pub fn connect_addr(&self, addr: &SocketAddr) -> Result<()> {
        Ok(socket::connect(self.io.as_raw_fd(), &unix_addr(addr)?)?)
    }

    /// Returns the address to which the socket is bound. `None` if it is not bound.
    ///
    /// # Errors
    /// The errors of getsockname(2).
    pub fn local_addr(&self) -> Result<Option<SocketAddr>> {
        local_addr(&self.io)
    }

    /// Chooses what is reported about the sender of each datagram, in [`Datagram::credentials`].
    /// The default is [`PassCredentials::No`].
    ///
    /// If credentials are on at the sender or at the receiver, the kernel binds an unbound sender
    /// to an abstract name when it sends.
    ///
    /// # Errors
    /// `ENOPROTOOPT` for a pidfd before Linux 6.5.
    pub fn set_pass_credentials(&self, pass: PassCredentials) -> Result<()> {
        pass.set(&self.io)
    }

    /// Chooses whether this socket takes descriptors, as
    /// [`Socket::set_pass_fds`](crate::Socket::set_pass_fds) does. The default is true.
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

/// Takes a Unix datagram socket. Its file status flags stay as they are, and credentials are
/// switched off. If the socket has a path, it stays as it is on drop.
///
/// # Errors
/// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
impl TryFrom<OwnedFd> for DatagramSocket {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        let (fd, ()) = checked(fd, |fd| match unix_socket_type(fd)? {
            SockType::Datagram => PassCredentials::No.set(fd),
            _ => Err(invalid_descriptor("it is not SOCK_DGRAM")),
        })?;
        Self::register(fd, None)
    }
}

impl TryFrom<unix::net::UnixDatagram> for DatagramSocket {
    type Error = Error;

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
