//! A connection that was adopted.

use std::{
    io::{self, IoSlice},
    mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tracing::Span;

use super::{channel::Channel, prepared::Prepared, stream::ConnectionStream};
use crate::{
    close_in_background,
    handoff::{Address, ending::end_connection, span::ConnectionSpan},
};

/// A client's connection that this process has adopted, from
/// [`Incoming`](crate::handoff::Incoming).
///
/// ```
/// use fdwire::handoff::Connection;
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// async fn echo(mut connection: Connection) -> std::io::Result<()> {
///     let mut buffer = [0; 1024];
///     loop {
///         match connection.read(&mut buffer).await? {
///             0 => return Ok(()), // the connection is ended here
///             bytes => connection.write_all(&buffer[..bytes]).await?,
///         }
///     }
/// }
/// ```
///
/// A read first returns the bytes that the dispatcher had already read, then those that come from
/// the client.
///
/// Dropping a `Connection` **ends the connection** at once, even if another process still has a
/// copy, because the client may wait for the end. `shutdown` of tokio's `AsyncWriteExt` ends the
/// sending direction only.
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

/// The parts of a [`Connection`], from [`Connection::into_parts`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ConnectionParts {
    /// The socket. Shut it down to end the connection: dropping the stream only closes this copy,
    /// and another process may have one.
    pub stream: ConnectionStream,
    /// The bytes that the dispatcher had read and that are not consumed. They come before those
    /// that the socket still has.
    pub prefix: Bytes,
    /// The address of the client.
    pub peer: Address,
    /// The address that the client has connected to.
    pub local: Address,
    /// The metadata from the dispatcher's application.
    pub metadata: Bytes,
    /// The descriptors that [came with it](Connection::bundle_mut).
    pub bundle: Vec<OwnedFd>,
    /// The guard that counts the connection as active. Keep it until the connection has ended.
    pub serving: ServingGuard,
}

/// A guard that counts as one active connection until it is dropped. The dispatcher may choose
/// workers by the number of their active connections ([`Strategy`](crate::handoff::Strategy)), and
/// a drain waits for all of them.
#[derive(Debug)]
pub struct ServingGuard {
    channel: Arc<Channel>,
    span: ConnectionSpan,
}

impl Connection {
    /// Returns a connection whose adoption was sent to the dispatcher.
    pub(super) fn adopted(prepared: Prepared, channel: &Arc<Channel>) -> Self {
        let Prepared { cookie, stream, peer, local, prefix, metadata, bundle } = prepared;
        let span = ConnectionSpan::serve(cookie, &peer, &local);
        let serving = ServingGuard { channel: Arc::clone(channel), span };
        let stream = EndOnDrop(Some(stream));
        Self { stream, prefix, peer, local, metadata, bundle: Bundle(bundle), serving }
    }

    /// Returns the address of the client.
    pub fn peer_addr(&self) -> &Address {
        &self.peer
    }

    /// Returns the address that the client has connected to.
    pub fn local_addr(&self) -> &Address {
        &self.local
    }

    /// Returns the metadata from the dispatcher's application; empty if there is none.
    pub fn metadata(&self) -> &Bytes {
        &self.metadata
    }

    /// Returns the descriptors that belong to the connection, such as the upstream connection of a
    /// proxy's client. They are in the order in which
    /// [`Accepted::with_fd`](crate::handoff::Accepted::with_fd) added them. Take out those that
    /// you use; the others are closed with the connection.
    pub fn bundle_mut(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.bundle.0
    }

    /// Returns the `tracing` span of this connection, for events of the application that belong to
    /// the connection. The span ends with the connection; see [the list of
    /// spans](crate::watching#spans).
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

    /// Takes the connection apart, for code that needs one of tokio's own streams.
    pub fn into_parts(mut self) -> ConnectionParts {
        let stream = self.stream.0.take().expect(PRESENT);
        let bundle = mem::take(&mut self.bundle.0);
        let Self { prefix, peer, local, metadata, serving, .. } = self;
        ConnectionParts { stream, prefix, peer, local, metadata, bundle, serving }
    }

    /// Returns the socket, which is present until [`into_parts`](Self::into_parts) takes it.
    fn stream(self: Pin<&mut Self>) -> &mut ConnectionStream {
        self.get_mut().stream.0.as_mut().expect(PRESENT)
    }
}

impl Drop for ServingGuard {
    fn drop(&mut self) {
        self.channel.finish();
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.0.as_ref().expect(PRESENT).as_fd()
    }
}

const PRESENT: &str = "only into_parts takes the stream";

/// Ends the connection when it is dropped.
#[derive(Debug)]
struct EndOnDrop(Option<ConnectionStream>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            end_connection(&stream);
        }
    }
}

/// The descriptors that came with a connection. They are closed in the background, because a peer
/// decides how long their last `close` takes.
#[derive(Debug)]
struct Bundle(Vec<OwnedFd>);

impl Drop for Bundle {
    fn drop(&mut self) {
        close_in_background(mem::take(&mut self.0));
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
        Poll::Ready(Ok(())) // nothing is buffered
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream().as_write()).poll_shutdown(cx)
    }
}
