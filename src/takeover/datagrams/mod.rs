//! Receiving datagrams from a socket that moves between processes.

mod receive;

use std::{
    fmt,
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use self::receive::receive;
use super::{
    Error, Phase,
    lanes::{Forwarded, Header, Lanes},
    protocol::{Family, Identity, Kind},
    shared::{Gate, Shared},
};
use crate::sys;

/// The time until the next attempt to send if no descriptor is left.
const BACK_OFF: Duration = Duration::from_millis(1);

/// A UDP socket of a [`Server`](super::Server), from which one process at a time receives.
///
/// When another process has taken over, this one stops receiving from the socket. The socket leaves
/// its event loop, and datagrams wait in the kernel for the new process. So a **stateless** service
/// (DNS, statsd, ...) only has to receive in a loop. Sending goes on in all processes.
///
/// # Forwarding
/// A service with connections (QUIC, DTLS, WireGuard, ...) finishes those of the old process while
/// the new one receives. So the new process has to forward the datagrams of old connections. A
/// closure returns the owner of each datagram: see [`forwarding`](Self::forwarding). Each server
/// has a [generation](super::Server::generation), a number that no other process has. The service
/// makes its clients send this number in each datagram, for example in the connection ids of QUIC,
/// and the closure reads it there.
///
/// The new process sends such a datagram over a *lane*: a pair of Unix sockets, one pair for each
/// older process that still drains and for each UDP socket. In the old process,
/// [`poll_recv`](Self::poll_recv) returns the datagram as if it came from the socket, with its
/// source, its destination and its ECN bits.
///
/// **The process that serves receives, and not the old one**, although the old one knows its
/// connections best. There are three reasons. A datagram never takes more than one detour, for any
/// number of generations. Datagrams of new clients take none. And an old process that hangs, stops
/// or dies affects only its own datagrams. Nothing is lost during a takeover: the queue of the
/// socket stays where it is. From the moment at which the new process is ready until the old one
/// has read that, both receive, and each forwards to the other. If the new process dies, the old
/// one receives again.
///
/// | the other process | what happens to its datagrams |
/// |---|---|
/// | does not receive | its lane fills up; further ones are [missed](Self::missed) |
/// | has ended | this process's application gets them, and can notify the client |
/// | floods its lane | lanes and the socket take turns |
///
/// A lane holds as much as `net.core.wmem_max` allows. In QUIC, the answer to a datagram whose
/// process has ended is a stateless reset.
///
/// If the process that serves hangs, nobody receives until it is killed. Then the old process
/// receives again.
///
/// Do not receive from a [copy of the socket](super::Server::socket): that takes datagrams away
/// from this value.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::net::UdpSocket;
///
/// use fdwire::takeover::{self, Listeners, Options, Server};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("takeover");
/// let mut listeners = Listeners::new();
/// let socket = UdpSocket::bind("127.0.0.1:0")?;
/// # let address = socket.local_addr()?;
/// listeners.add("echo", socket)?;
/// let server = Server::bind(&path, listeners, Options::default())?;
///
/// // In this protocol, the first byte of a datagram is the generation of its server.
/// let owner = |datagram: &[u8], _| datagram.first().map(|&byte| byte.into());
/// let datagrams = server.datagrams("echo", 0)?.forwarding(owner);
/// # UdpSocket::bind("127.0.0.1:0")?.send_to(b"hello", address)?;
/// let mut buffer = [0; 2048];
/// let received = datagrams.recv(&mut buffer).await?;
/// datagrams.send_to(&buffer[..received.len], received.source).await?;
/// # Ok(()) }
/// ```
pub struct Datagrams {
    shared: Arc<Shared>,
    identity: Identity,
    /// The copy of the socket that sends. It is not registered with the event loop.
    socket: UdpSocket,
    receiver: Arc<Receiver>,
    owner: Option<Owner>,
    /// True if the next call tries the lanes before the socket.
    lanes_first: AtomicBool,
}

/// The application's function that returns the generation to which a datagram belongs.
type Owner = Box<dyn Fn(&[u8], SocketAddr) -> Option<u32> + Send + Sync>;

/// The part of [`Datagrams`] that a change of phase concerns.
struct Receiver {
    /// The copy of the socket that is registered with the event loop. `None` unless this process
    /// serves.
    registered: Mutex<Option<AsyncFd<OwnedFd>>>,
    lanes: Arc<Lanes>,
}

/// A datagram that was received. If the application has switched on `UDP_GRO`, the buffer may
/// contain several datagrams of one source, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// Length in bytes of everything in the buffer.
    pub len: usize,
    /// Length in bytes of each datagram. Only the last one may be shorter.
    pub stride: usize,
    /// The address of the client.
    pub source: SocketAddr,
    /// The address that it was sent to, if the application has switched on `IP_PKTINFO` or
    /// `IPV6_RECVPKTINFO`.
    pub destination: Option<IpAddr>,
    /// The ECN bits (RFC 3168), if the application has switched on `IP_RECVTOS` or
    /// `IPV6_RECVTCLASS`. 0 otherwise.
    pub ecn: u8,
}

impl Datagrams {
    pub(super) fn new(shared: Arc<Shared>, name: &str, index: u32) -> Result<Self, Error> {
        let (identity, socket) = shared.with_listeners(|listeners| -> Result<_, Error> {
            let entry = listeners.find(name, index)?;
            Ok((entry.identity.clone(), entry.fd.as_fd().try_clone_to_owned()?))
        })?;
        if identity.kind != Kind::Datagram || identity.family == Family::Unix {
            return Err(Error::WrongKind { identity: Box::new(identity), expected: "UDP socket" });
        }
        let receiver =
            Arc::new(Receiver { registered: Mutex::new(None), lanes: shared.lanes(name, index) });
        let gate: Arc<dyn Gate> = Arc::<Receiver>::clone(&receiver);
        shared.add_gate(Arc::downgrade(&gate));
        Ok(Self {
            shared,
            identity,
            socket: socket.into(),
            receiver,
            owner: None,
            lanes_first: AtomicBool::new(false),
        })
    }

    /// Forwards datagrams of other generations. The closure gets each datagram with its source, and
    /// returns the [generation](super::Server::generation) to which it belongs, or `None` if it
    /// belongs to no connection. This process keeps a datagram that belongs to no connection, or to
    /// a generation that has ended.
    ///
    /// The closure is called for each datagram, so it must not block.
    #[must_use]
    pub fn forwarding(
        mut self,
        owner: impl Fn(&[u8], SocketAddr) -> Option<u32> + Send + Sync + 'static,
    ) -> Self {
        self.owner = Some(Box::new(owner));
        self.receiver.lanes.start_forwarding();
        self
    }

    /// Returns the identity of the socket.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the number of datagrams of other generations that were lost, because their process
    /// did not receive them and its lane was full.
    pub fn missed(&self) -> u64 {
        self.receiver.lanes.missed()
    }

    /// Receives the next datagram of this process: from the socket while this process serves, or
    /// one that another process has forwarded. What does not fit the buffer is cut off.
    ///
    /// # Errors
    /// The errors of recvmsg(2) and of registering with the event loop. After `EMFILE` or `ENFILE`,
    /// wait a little and call again: they pass when descriptors are closed.
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver is not enabled.
    ///
    /// # Cancel safety
    /// No datagram is lost when dropped.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        poll_fn(|cx| self.poll_recv(cx, buffer)).await
    }

    /// Polls for the next datagram, as [`recv`](Self::recv) does. Only the task of the last call is
    /// woken.
    ///
    /// # Errors
    /// The errors of [`recv`](Self::recv).
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver is not enabled.
    pub fn poll_recv(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<Received>> {
        // Register before the phase is read, so that a later change wakes this task.
        self.receiver.lanes.register(cx);
        // Lanes and socket take turns, so that a flood of one does not keep the other waiting.
        let lanes_first = self.lanes_first.fetch_xor(true, Ordering::Relaxed);
        for from_lanes in [lanes_first, !lanes_first] {
            let polled = if from_lanes {
                self.receiver.lanes.poll_receive(cx, buffer).map(|received| Ok(from_lane(received)))
            } else {
                self.poll_socket(cx, buffer)
            };
            if polled.is_ready() {
                return polled;
            }
        }
        Poll::Pending
    }

    /// Sends a datagram. A process that drains goes on sending.
    ///
    /// # Errors
    /// The errors of sendto(2).
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver is not enabled.
    ///
    /// # Cancel safety
    /// If this is dropped before it returns, the datagram was not sent.
    pub async fn send_to(&self, payload: &[u8], receiver: SocketAddr) -> io::Result<usize> {
        loop {
            match self.try_send_to(payload, receiver) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                sent => return sent,
            }
        }
    }

    /// Sends a datagram without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room for it, and the errors of sendto(2).
    pub fn try_send_to(&self, payload: &[u8], receiver: SocketAddr) -> io::Result<usize> {
        self.socket.send_to(payload, receiver)
    }

    /// Waits until there is room to send. Call it only after `WouldBlock`: while a socket is
    /// registered for writing, the kernel wakes this process for each datagram that leaves, no
    /// matter which process has sent it.
    ///
    /// # Errors
    /// The errors of registering with the event loop.
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver is not enabled.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn writable(&self) -> io::Result<()> {
        match self.socket.as_fd().try_clone_to_owned() {
            Ok(copy) => drop(sys::register(copy, Interest::WRITABLE)?.writable().await?),
            Err(_) => sleep(BACK_OFF).await, // no descriptor is left
        }
        Ok(())
    }

    /// Receives from the socket, if this process serves.
    fn poll_socket(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<Received>> {
        let mut registered = self.receiver.registered();
        // The check is under the lock, so that a change of phase finds whatever is registered.
        if self.shared.phase() != Phase::Serving {
            return Poll::Pending;
        }
        let socket = match &mut *registered {
            Some(socket) => socket,
            none => none.insert(sys::register(
                self.socket.as_fd().try_clone_to_owned()?,
                Interest::READABLE,
            )?),
        };
        loop {
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            match receive(socket.as_fd(), buffer) {
                Ok(received) => {
                    if let Some(own) = self.keep_own(buffer, received) {
                        return Poll::Ready(Ok(own));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Forwards the datagrams of other generations, and moves the others together at the front of
    /// the buffer. Returns `None` if nothing is left for this process.
    ///
    /// For example, three datagrams of 100 bytes came at once (`UDP_GRO`), and the second one
    /// belongs to another generation. It is forwarded, the third one moves to offset 100, and `len`
    /// is 200.
    fn keep_own(&self, buffer: &mut [u8], mut received: Received) -> Option<Received> {
        let Some(owner) = &self.owner else { return Some(received) };
        let Received { len, stride, source, destination, ecn } = received;
        // The datagrams from `start` on are not checked yet. `kept` bytes at the front are this
        // process's.
        let (mut start, mut kept) = (0, 0);
        loop {
            let end = len.min(start + stride);
            let datagram = &buffer[start..end];
            let other =
                owner(datagram, source).filter(|&generation| generation != self.shared.generation);
            let header = Header { source, destination, ecn };
            let forwarded = other.map(|other| self.receiver.lanes.forward(other, header, datagram));
            if forwarded != Some(Forwarded::Gone) {
                buffer.copy_within(start..end, kept);
                kept += end - start;
                received.len = kept;
            }
            start = end;
            if start == len {
                // An empty datagram is a datagram too.
                let is_own = kept > 0 || len == 0 && forwarded != Some(Forwarded::Gone);
                return is_own.then_some(received);
            }
        }
    }
}

/// Returns a forwarded datagram as a received one.
fn from_lane((len, Header { source, destination, ecn }): (usize, Header)) -> Received {
    Received { len, stride: len, source, destination, ecn }
}

/// Gives access to the socket, to set options or to send in other ways.
impl AsFd for Datagrams {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for Datagrams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datagrams").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Drop for Datagrams {
    /// Closes the lanes unless this process serves, so that the others stop forwarding to it.
    fn drop(&mut self) {
        if self.shared.phase() != Phase::Serving {
            self.receiver.lanes.close();
        }
    }
}

impl Receiver {
    fn registered(&self) -> MutexGuard<'_, Option<AsyncFd<OwnedFd>>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate for Receiver {
    fn on_phase(&self, phase: Phase) {
        if phase == Phase::Serving {
            return self.lanes.wake();
        }
        let socket = self.registered().take();
        drop(socket);
    }
}
