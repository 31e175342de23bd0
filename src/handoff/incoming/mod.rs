//! The worker's side: connections that a dispatcher hands over.

#[cfg(feature = "axum")]
mod axum;
pub(in crate::handoff) mod book;
mod builder;
mod channel;
mod connection;
mod end;
mod handle;
mod headroom;
mod prepared;
mod settings;
mod stats;
mod stream;

use std::{
    future::poll_fn,
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use smallvec::SmallVec;

use crate::Socket;
pub use builder::IncomingBuilder;
use channel::Channel;
pub use connection::{Connection, ConnectionParts, ServingGuard};
pub use end::IncomingEnd;
pub use handle::IncomingHandle;
use settings::Settings;
pub use stats::IncomingStats;
pub use stream::ConnectionStream;

/// Connections that a dispatcher hands to this process, as a [`Stream`].
///
/// A connection is **adopted** when the application asks for it: the adoption is sent to the
/// dispatcher right before the stream yields the connection. Connections that wait here and that
/// nobody has asked for stay the dispatcher's. It gives them to another worker if this one is busy
/// or dies.
///
/// A task on the runtime serves the link to the dispatcher, even if the application asks for
/// nothing. It reports how many connections have ended, rejects the connections that the dispatcher
/// recalls, and answers pings. If the application blocks every thread of the runtime, no ping is
/// answered, so the dispatcher fences the worker as hung.
///
/// Ask for connections in a spawned task, as below. In a multi-thread runtime, a loop in `main`
/// runs on a thread that does nothing else. Waking that thread for each connection takes about a
/// fifth more CPU.
///
/// The stream ends when this worker takes no more connections: because the dispatcher or the
/// application ([`IncomingHandle::drain`]) drains it, or because the dispatcher has gone. Adopted
/// connections go on. When the last of them has ended, the worker sends a goodbye to the
/// dispatcher. Dropping an `Incoming` drains it as well.
///
/// ```no_run
/// # #[tokio::main] async fn main() -> std::io::Result<()> {
/// use fdwire::handoff::Incoming;
/// use tokio::io::AsyncWriteExt;
///
/// let mut incoming = Incoming::from_stdin()?; // in a process that the dispatcher has started
/// let handle = incoming.handle();
/// tokio::spawn(async move {
///     while let Some(mut connection) = incoming.next().await {
///         tokio::spawn(async move { connection.write_all(b"hello\n").await });
///     }
/// });
/// // Every connection has ended. The dispatcher got the goodbye, or is gone.
/// println!("{}", handle.ended().await);
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// The futures of [`next`](Self::next) and [`next_batch`](Self::next_batch) can be dropped at any
/// time without losing a connection.
#[must_use = "a worker gets connections only when it asks for them"]
#[derive(Debug)]
pub struct Incoming {
    channel: Arc<Channel>,
}

impl Incoming {
    /// Returns a builder to change the defaults.
    pub fn builder() -> IncomingBuilder {
        IncomingBuilder::default()
    }

    /// Receives connections from the dispatcher that started this process and gave it a socket as
    /// standard input.
    ///
    /// Standard input becomes `/dev/null`, so that no program that the application starts can read
    /// offers from it. Call this once, before the application starts a program: see
    /// [`Socket::from_stdin`].
    ///
    /// # Errors
    /// The errors of [`Socket::from_stdin`].
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub fn from_stdin() -> io::Result<Self> {
        Self::builder().from_stdin()
    }

    /// Receives connections from the dispatcher that listens at a path, on a socket of kind
    /// [`SocketKind::SeqPacket`](crate::SocketKind::SeqPacket).
    ///
    /// # Errors
    /// The errors of [`Socket::connect`].
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::builder().connect(path).await
    }

    /// Receives connections from the dispatcher at the other end of a socket.
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub fn new(socket: Socket) -> Self {
        Self::builder().build(socket)
    }

    fn open(socket: Socket, settings: Settings) -> Self {
        Self { channel: Channel::open(socket, settings) }
    }

    /// Adopts the next connection. Returns `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// No connection is lost if this future is dropped.
    pub async fn next(&mut self) -> Option<Connection> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Adopts all connections that wait, at least one and at most `max`, with one answer for all of
    /// them. Returns `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// No connection is lost if this future is dropped.
    pub async fn next_batch(&mut self, max: usize) -> Option<Vec<Connection>> {
        poll_fn(|cx| self.poll_batch(cx, max.max(1))).await
    }

    fn poll_batch<B: FromIterator<Connection>>(
        &mut self,
        cx: &Context<'_>,
        max: usize,
    ) -> Poll<Option<B>> {
        let adopted = ready!(self.channel.poll_adopt(cx, max));
        if adopted.is_empty() {
            return Poll::Ready(None);
        }
        let connections =
            adopted.into_iter().map(|prepared| Connection::adopted(prepared, &self.channel));
        Poll::Ready(Some(connections.collect()))
    }

    /// Returns a handle, to drain this worker and to wait for its end from other tasks.
    pub fn handle(&self) -> IncomingHandle {
        IncomingHandle { channel: Arc::clone(&self.channel) }
    }
}

impl Stream for Incoming {
    type Item = Connection;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Connection>> {
        let batch = ready!(self.get_mut().poll_batch::<SmallVec<[_; 1]>>(cx, 1));
        Poll::Ready(batch.and_then(|mut one| one.pop()))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.channel.abandon();
    }
}
