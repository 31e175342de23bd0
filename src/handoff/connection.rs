//! A connection that was adopted.

use std::{
    io::{self, IoSlice},
    net,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix,
    },
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use nix::{
    libc,
    sys::socket::{self, Shutdown, SockType, getsockopt, setsockopt, sockopt},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::{Address, Transport, incoming::Channel, protocol::Offer};
use crate::{Error, sys};

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
/// Dropping it **ends the connection** at once, also where another process still has a copy of it: that is what a client waits for.
/// `shutdown` of tokio's `AsyncWriteExt` ends the sending direction only.
///
/// Socket options are set through [`AsFd`].
#[derive(Debug)]
pub struct Connection {
    stream: EndOnDrop,
    read: Bytes,
    peer: Address,
    local: Address,
    metadata: Bytes,
    bundle: Vec<OwnedFd>,
    serving: Serving,
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

/// What a [`Connection`] consists of, from [`Connection::into_parts`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ConnectionParts {
    /// The socket. Dropping it closes it, which ends the connection only if no other process has a copy: shut it down.
    pub stream: ConnectionStream,
    /// What was read from it and is not consumed. Comes before what the socket still has.
    pub read: Bytes,
    /// Address of the client.
    pub peer: Address,
    /// Address that it has connected to.
    pub local: Address,
    /// What the dispatcher's application says about it.
    pub metadata: Bytes,
    /// The descriptors that [came with it](Connection::bundle_mut).
    pub bundle: Vec<OwnedFd>,
    /// To be kept until the connection has ended.
    pub serving: Serving,
}

/// Counts as a connection that is being served until it is dropped: the dispatcher goes by it when it chooses a worker, and a drain
/// waits for it.
#[derive(Debug)]
pub struct Serving(Arc<Channel>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.finish();
    }
}

impl Connection {
    /// Makes a connection of an offer whose adoption the dispatcher has been told. `None` where the system refuses: the connection has
    /// ended then.
    pub(super) fn adopted(offer: Offer, channel: &Arc<Channel>) -> Option<Self> {
        let Offer { transport, peer, local, read, metadata, fd, bundle, .. } = offer;
        let serving = Serving(Arc::clone(channel));
        match ConnectionStream::new(transport, fd) {
            Ok(stream) => Some(Self { stream: EndOnDrop(Some(stream)), read, peer, local, metadata, bundle, serving }),
            Err(error) => {
                tracing::warn!(%error, %peer, "cannot serve an adopted connection, it is closed");
                None
            }
        }
    }

    /// Address of the client.
    pub fn peer_addr(&self) -> &Address {
        &self.peer
    }

    /// Address that the client has connected to.
    pub fn local_addr(&self) -> &Address {
        &self.local
    }

    /// What the dispatcher's application says about it; empty if it says nothing.
    pub fn metadata(&self) -> &Bytes {
        &self.metadata
    }

    /// The descriptors that belong to the connection, such as the upstream connection of a proxy's client: those of
    /// [`Accepted::with_fd`](super::Accepted::with_fd), in its order. Take out what you use; the rest is closed with the connection.
    pub fn bundle_mut(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.bundle
    }

    /// Takes it apart, for what wants tokio's own streams.
    pub fn into_parts(mut self) -> ConnectionParts {
        let stream = self.stream.0.take().expect(PRESENT);
        let Self { read, peer, local, metadata, bundle, serving, .. } = self;
        ConnectionParts { stream, read, peer, local, metadata, bundle, serving }
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

/// Ends a connection for every holder, so that the client sees it at once. To be closed next, which then does not block.
pub(super) fn end_connection(connection: &impl AsFd) {
    let connection = connection.as_fd();
    // An error says that it has ended.
    let _ = socket::shutdown(connection.as_raw_fd(), Shutdown::Both);
    // With a time to linger the last `close` would block for it, non-blocking or not.
    if getsockopt(&connection, sockopt::Linger).is_ok_and(|linger| linger.l_onoff != 0 && linger.l_linger > 0) {
        let _ = setsockopt(&connection, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
    }
}

/// Whether the descriptor of an offer is a connection of its transport. Changes nothing about it.
///
/// # Errors
/// When it is not the one that the offer is about: descriptors and offers have lost step.
pub(super) fn check(offer: &Offer) -> Result<bool, Error> {
    if !getsockopt(&offer.fd, sys::Cookie).is_ok_and(|cookie| cookie == offer.cookie) {
        return Err(Error::invalid("the descriptor of an offer is not the one that it describes"));
    }
    let is_stream_of = |domains: &[i32]| {
        getsockopt(&offer.fd, sys::Domain).is_ok_and(|domain| domains.contains(&domain))
            && getsockopt(&offer.fd, sockopt::SockType) == Ok(SockType::Stream)
    };
    Ok(match offer.transport {
        // The first says it all, and mostly so. Other protocols, such as MPTCP, speak for TCP too.
        Transport::Tcp => {
            getsockopt(&offer.fd, sys::Protocol) == Ok(libc::IPPROTO_TCP)
                || is_stream_of(&[libc::AF_INET, libc::AF_INET6])
        }
        Transport::UnixStream => is_stream_of(&[libc::AF_UNIX]),
    })
}

impl ConnectionStream {
    /// Makes the socket non-blocking, for every holder: so not before it is ours.
    fn new(transport: Transport, fd: OwnedFd) -> io::Result<Self> {
        match transport {
            Transport::Tcp => {
                let stream = net::TcpStream::from(fd);
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream).map(Self::Tcp)
            }
            Transport::UnixStream => {
                let stream = unix::net::UnixStream::from(fd);
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream).map(Self::Unix)
            }
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
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(self.stream().as_read()).poll_read(cx, buf);
        }
        let bytes = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..bytes]);
        self.read.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
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
