//! A connection that was adopted.

use std::{
    io::{self, IoSlice},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{self, Shutdown, SockType, getsockopt, setsockopt, sockopt},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tracing::{Span, warn};

use super::{
    Address, Transport,
    incoming::Channel,
    protocol::{Offer, RejectReason},
    span::{ConnectionId, ConnectionSpan},
};
use crate::{close_in_background, sys};

/// A client's connection, adopted by this process. From [`Incoming`](super::Incoming).
///
/// ```
/// use fdwire::handoff::Connection;
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// async fn echo(mut connection: Connection) -> std::io::Result<()> {
///     let mut heard = [0; 1024];
///     loop {
///         match connection.read(&mut heard).await? {
///             0 => return Ok(()), // the connection is ended here
///             bytes => connection.write_all(&heard[..bytes]).await?,
///         }
///     }
/// }
/// ```
///
/// Reads give first what the dispatcher had read already, then what comes from the client.
///
/// Dropping it **ends the connection** at once, also where another process still has a copy of it:
/// that is what a client waits for. `shutdown` of tokio's `AsyncWriteExt` ends the sending
/// direction only.
///
/// Socket options are set through [`AsFd`].
#[derive(Debug)]
pub struct Connection {
    stream: EndOnDrop,
    prefix: Bytes,
    peer: Address,
    local: Address,
    metadata: Bytes,
    bundle: Bundle,
    serving: ServingGuard,
}

/// The socket of a [`Connection`], registered with tokio.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectionStream {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A Unix socket of kind STREAM.
    Unix(UnixStream),
}

/// The parts of a [`Connection`], from [`Connection::into_parts`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ConnectionParts {
    /// The socket. Dropping it closes it, which ends the connection only if no other process has a
    /// copy: shut it down.
    pub stream: ConnectionStream,
    /// Bytes that were read from it and are not consumed. They come before what the socket still
    /// has.
    pub prefix: Bytes,
    /// Address of the client.
    pub peer: Address,
    /// Address that it has connected to.
    pub local: Address,
    /// Metadata from the dispatcher's application.
    pub metadata: Bytes,
    /// The descriptors that [came with it](Connection::bundle_mut).
    pub bundle: Vec<OwnedFd>,
    /// To be kept until the connection has ended.
    pub serving: ServingGuard,
}

/// Counts as a connection that is being served until it is dropped: the dispatcher goes by it when
/// it chooses a worker, and a drain waits for it.
#[derive(Debug)]
pub struct ServingGuard {
    channel: Arc<Channel>,
    span: ConnectionSpan,
}

impl Drop for ServingGuard {
    fn drop(&mut self) {
        self.channel.finish();
    }
}

/// An offered connection that is ready to be served: its socket is registered with the event loop,
/// so that nothing can fail once it is adopted. Until then it is nobody's, and is only [given
/// up](Self::into_fds).
#[derive(Debug)]
pub(super) struct Prepared {
    cookie: u64,
    stream: ConnectionStream,
    peer: Address,
    local: Address,
    prefix: Bytes,
    metadata: Bytes,
    bundle: Vec<OwnedFd>,
}

impl Prepared {
    /// Registers the socket of an offer, which changes nothing about the connection.
    ///
    /// # Errors
    /// Why it has to be rejected.
    pub(super) fn new(offer: Offer) -> Result<Self, RejectReason> {
        if !is_usable(&offer) {
            close_in_background(offer.into_fds());
            return Err(RejectReason::Unusable);
        }
        let Offer { cookie, transport, peer, local, prefix, metadata, fd, bundle } = offer;
        match ConnectionStream::new(transport, fd) {
            Ok(stream) => Ok(Self { cookie, stream, peer, local, prefix, metadata, bundle }),
            Err(error) => {
                let connection = ConnectionId(cookie);
                let text = "cannot serve a connection; it goes back to the dispatcher";
                warn!(%error, %connection, %peer, "{text}");
                close_in_background(bundle);
                Err(RejectReason::Full)
            }
        }
    }

    /// Takes it out of the event loop. No option and no flag of it is touched.
    pub(super) fn into_fds(self) -> impl Iterator<Item = OwnedFd> {
        self.stream.into_fd().ok().into_iter().chain(self.bundle)
    }
}

impl Connection {
    /// The dispatcher has been told of the adoption.
    pub(super) fn adopted(prepared: Prepared, channel: &Arc<Channel>) -> Self {
        let Prepared { cookie, stream, peer, local, prefix, metadata, bundle } = prepared;
        let span = ConnectionSpan::serve(cookie, &peer, &local);
        let serving = ServingGuard { channel: Arc::clone(channel), span };
        let stream = EndOnDrop(Some(stream));
        Self { stream, prefix, peer, local, metadata, bundle: Bundle(bundle), serving }
    }

    /// Address of the client.
    pub fn peer_addr(&self) -> &Address {
        &self.peer
    }

    /// Address that the client has connected to.
    pub fn local_addr(&self) -> &Address {
        &self.local
    }

    /// Metadata from the dispatcher's application; empty if there is none.
    pub fn metadata(&self) -> &Bytes {
        &self.metadata
    }

    /// The descriptors that belong to the connection, such as the upstream connection of a proxy's
    /// client: those of [`Accepted::with_fd`](super::Accepted::with_fd), in its order. Take out
    /// what you use; the rest is closed with the connection.
    pub fn bundle_mut(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.bundle.0
    }

    /// Returns the `tracing` span of this connection, which ends with it: for events of the
    /// application that belong to the connection. It is [described](crate::watching#spans) with the
    /// others.
    ///
    /// ```no_run
    /// # async fn serve(_: fdwire::handoff::Connection) {}
    /// # async fn example(connection: fdwire::handoff::Connection) {
    /// use tracing::Instrument;
    ///
    /// let span = connection.span().clone();
    /// tokio::spawn(serve(connection).instrument(span));
    /// # }
    /// ```
    pub fn span(&self) -> &Span {
        self.serving.span.get()
    }

    /// Takes it apart, for what wants tokio's own streams.
    pub fn into_parts(mut self) -> ConnectionParts {
        let stream = self.stream.0.take().expect(PRESENT);
        let bundle = mem::take(&mut self.bundle.0);
        let Self { prefix, peer, local, metadata, serving, .. } = self;
        ConnectionParts { stream, prefix, peer, local, metadata, bundle, serving }
    }

    fn stream(self: Pin<&mut Self>) -> &mut ConnectionStream {
        self.get_mut().stream.0.as_mut().expect(PRESENT)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.0.as_ref().expect(PRESENT).as_fd()
    }
}

const PRESENT: &str = "only into_parts takes the stream";

#[derive(Debug)]
struct EndOnDrop(Option<ConnectionStream>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            end_connection(&stream);
        }
    }
}

/// Ends a connection for every holder, so that the client sees it at once. To be closed next, which
/// then does not block.
fn end_connection(connection: &impl AsFd) {
    let connection = connection.as_fd();
    if socket::shutdown(connection.as_raw_fd(), Shutdown::Both).is_err() {
        return; // it has ended, in both directions
    }
    // With a time to linger the last `close` would block for it, non-blocking or not.
    if getsockopt(&connection, sockopt::Linger)
        .is_ok_and(|linger| linger.l_onoff != 0 && linger.l_linger > 0)
    {
        let _ = setsockopt(&connection, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
    }
}

/// The descriptors that came with a connection. A peer decides how long their last `close` takes.
#[derive(Debug)]
struct Bundle(Vec<OwnedFd>);

impl Drop for Bundle {
    fn drop(&mut self) {
        close_in_background(mem::take(&mut self.0));
    }
}

/// Returns true if the descriptor of an offer is a non-blocking connection of its transport.
fn is_usable(offer: &Offer) -> bool {
    let is_stream_of = |domains: &[i32]| {
        getsockopt(&offer.fd, sys::Domain).is_ok_and(|domain| domains.contains(&domain))
            && getsockopt(&offer.fd, sockopt::SockType) == Ok(SockType::Stream)
    };
    let is_of_transport = match offer.transport {
        // The first is enough, usually. Other protocols, such as MPTCP, speak for TCP too.
        Transport::Tcp => {
            getsockopt(&offer.fd, sys::Protocol) == Ok(libc::IPPROTO_TCP)
                || is_stream_of(&[libc::AF_INET, libc::AF_INET6])
        }
        Transport::UnixStream => is_stream_of(&[libc::AF_UNIX]),
    };
    is_of_transport && is_non_blocking(&offer.fd)
}

/// It has to be so already, because the flag belongs to all holders of the connection.
fn is_non_blocking(fd: &OwnedFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
}

impl ConnectionStream {
    /// Registers it with the event loop. If that fails, it is closed right here: that is not the
    /// last copy, because the dispatcher keeps one until it has the answer.
    fn new(transport: Transport, fd: OwnedFd) -> io::Result<Self> {
        match transport {
            Transport::Tcp => TcpStream::from_std(fd.into()).map(Self::Tcp),
            Transport::UnixStream => UnixStream::from_std(fd.into()).map(Self::Unix),
        }
    }

    /// Takes it out of the event loop.
    fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(stream) => stream.into_std().map(OwnedFd::from),
            Self::Unix(stream) => stream.into_std().map(OwnedFd::from),
        }
    }

    fn as_read(&mut self) -> &mut (dyn AsyncRead + Unpin) {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    fn as_write(&mut self) -> &mut (dyn AsyncWrite + Unpin) {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }
}

impl AsFd for ConnectionStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(self.stream().as_read()).poll_read(cx, buf);
        }
        let bytes = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..bytes]);
        self.prefix.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream().as_write()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream().as_write()).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // nothing is kept back
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream().as_write()).poll_shutdown(cx)
    }
}
