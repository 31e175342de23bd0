//! The worker's side: connections that a dispatcher hands over.

#[cfg(feature = "axum")]
mod axum;
pub(in crate::handoff) mod book;
mod channel;
mod headroom;
mod stats;

use std::{
    future::{Future, pending, poll_fn},
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use smallvec::SmallVec;
use tokio::{
    select,
    time::{Instant, sleep_until},
};

use super::{Connection, protocol::MAX_OFFER_FDS};
use crate::{Error, Socket, SocketKind};
pub(in crate::handoff) use channel::Channel;
use channel::Phase;
pub use stats::IncomingStats;

/// Connections that a dispatcher hands to this process, as a [`Stream`].
///
/// A connection is **adopted** when it is asked for: the dispatcher is told so right before the
/// stream yields it. What waits and was not asked for stays the dispatcher's, who gives it to
/// another worker if this one is busy or dies.
///
/// A task on the runtime answers for the process meanwhile, whether or not the application asks for
/// a connection: it reports how many connections have ended, gives back what the dispatcher
/// recalls, and answers its pings. An application that blocks every thread of the runtime does not
/// answer them, and is taken for one that hangs.
///
/// Ask for connections in a spawned task, as below. A loop in `main` of a multi-thread runtime runs
/// on a thread that does nothing else, and to wake that one for each connection takes about a fifth
/// more CPU.
///
/// The stream ends when this worker takes no more connections: at the dispatcher's wish or the
/// application's ([`IncomingHandle::drain`]), or because the dispatcher has gone. Connections that
/// were adopted go on. When the last of them has ended the dispatcher is told goodbye. Dropping it
/// is a drain as well.
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
/// // Every connection has ended, and the dispatcher knows or has gone.
/// println!("{:?}", handle.ended().await);
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// [`next`](Self::next) and [`next_batch`](Self::next_batch) can be dropped at any await and called
/// again: nothing is lost.
#[must_use = "a worker gets connections only when it asks for them"]
#[derive(Debug)]
pub struct Incoming {
    channel: Arc<Channel>,
}

impl Incoming {
    /// To set what is not as usual.
    pub fn builder() -> IncomingBuilder {
        IncomingBuilder::default()
    }

    /// Connections from the dispatcher that started this process, and gave it a socket as standard
    /// input.
    ///
    /// Standard input becomes `/dev/null`, so that no program that the application starts can read
    /// offers from it. Call it once, before the application starts any: see [`Socket::from_stdin`].
    ///
    /// # Errors
    /// The errors of [`Socket::from_stdin`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn from_stdin() -> io::Result<Self> {
        Self::builder().from_stdin()
    }

    /// Connections from the dispatcher that listens at a path, on a socket of kind
    /// [`SocketKind::SeqPacket`].
    ///
    /// # Errors
    /// The errors of [`Socket::connect`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::builder().connect(path).await
    }

    /// Connections from the dispatcher at the other end of a socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn new(socket: Socket) -> Self {
        Self::builder().build(socket)
    }

    /// Adopts the next connection. `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn next(&mut self) -> Option<Connection> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Adopts all connections that wait, at most `max` and at least one, with one answer for all of
    /// them. `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
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

    /// A handle, to drain and to learn of the end from elsewhere.
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

/// Drains an [`Incoming`] and tells of its end, from wherever it is needed. Keeps nothing open.
///
/// ```no_run
/// # #[cfg(feature = "axum")]
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use std::time::Duration;
///
/// use axum::{Router, routing::get};
/// use fdwire::handoff::Incoming;
/// use tokio::time::sleep;
///
/// let incoming = Incoming::from_stdin()?;
/// let handle = incoming.handle();
/// let app = Router::new().route("/", get(|| async { "hello" }));
/// let requested = handle.drain_requested();
/// let stop = async {
///     requested.await;
///     // For requests that are on their way: axum ends silent connections at once.
///     sleep(Duration::from_millis(100)).await;
/// };
/// let serving = axum::serve(incoming, app).with_graceful_shutdown(stop);
/// tokio::spawn(async move { serving.await }).await??;
/// handle.ended().await;
/// # Ok(()) }
/// # #[cfg(not(feature = "axum"))] fn main() {}
/// ```
#[derive(Debug, Clone)]
pub struct IncomingHandle {
    channel: Arc<Channel>,
}

impl IncomingHandle {
    /// Takes no more connections: those that wait go back to the dispatcher, the stream ends, and
    /// when the adopted ones have ended the dispatcher is told goodbye.
    pub fn drain(&self) {
        self.channel.drain();
    }

    /// Whether no more connections are taken, for whatever reason. Then `Connection: close` belongs
    /// into an HTTP answer, and ends a connection that is kept alive without cutting a request that
    /// is on its way.
    pub fn is_draining(&self) -> bool {
        !matches!(*self.channel.phase().borrow(), Phase::Open)
    }

    /// Waits until no more connections are taken, for whatever reason: a while later is the time to
    /// end what is silent, as `with_graceful_shutdown` of axum and `graceful_shutdown` of hyper do.
    /// Requests may be on their way there: see the [traps](super#traps).
    pub fn drain_requested(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut phase = self.channel.phase();
        async move {
            let _ = phase.wait_for(|phase| !matches!(phase, Phase::Open)).await;
        }
    }

    /// Returns the numbers of this worker, for whoever watches it.
    pub fn stats(&self) -> IncomingStats {
        self.channel.stats()
    }

    /// When the dispatcher will wait no longer for the adopted connections to end. `None` as long
    /// as it has not asked, or where it has set no time.
    pub fn drain_deadline(&self) -> Option<Instant> {
        match *self.channel.phase().borrow() {
            Phase::Draining { deadline } => deadline,
            _ => None,
        }
    }

    /// Waits until the [deadline](Self::drain_deadline) of the drain is no further away than
    /// `margin`: the time to end the connections that are left, so that the dispatcher still hears
    /// a goodbye. Never ends if the drain has no deadline, or if the link has ended before.
    ///
    /// ```no_run
    /// # async fn serve(_: fdwire::handoff::Connection) {}
    /// # use fdwire::handoff::{Connection, IncomingHandle};
    /// # async fn example(connection: Connection, handle: IncomingHandle) {
    /// use std::time::Duration;
    ///
    /// tokio::select! {
    ///     () = serve(connection) => {}
    ///     () = handle.drain_over(Duration::from_millis(500)) => println!("a connection is cut"),
    /// }
    /// # }
    /// ```
    pub fn drain_over(
        &self,
        margin: Duration,
    ) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut phase = self.channel.phase();
        async move {
            loop {
                let deadline = match *phase.borrow_and_update() {
                    Phase::Draining { deadline } => deadline,
                    _ => None,
                };
                let over = async {
                    match deadline {
                        Some(it) => sleep_until(it.checked_sub(margin).unwrap_or(it)).await,
                        None => pending().await,
                    }
                };
                select! {
                    () = over => return,
                    // A drain has begun, or has another deadline now.
                    changed = phase.changed() => if changed.is_err() {
                        pending().await
                    }
                }
            }
        }
    }

    /// Waits until this worker has nothing more to do: its link to the dispatcher has ended, and so
    /// has every connection that it has adopted. Await it before the process ends, and no client is
    /// cut off, whatever has ended the link.
    ///
    /// A connection ends when its [`Connection`] is dropped, or its
    /// [`ServingGuard`](super::ServingGuard).
    pub fn ended(&self) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        self.end_of(|phase| match phase {
            Phase::Finished(end) => Some(end.clone()),
            _ => None,
        })
    }

    /// Waits for the end of the link to the dispatcher. Adopted connections go on, except after a
    /// drain, which has waited for them. For a worker that connects again, or that has to know at
    /// once that it was [fenced](IncomingEnd::Fenced).
    pub fn link_ended(&self) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        self.end_of(|phase| match phase {
            Phase::Unlinked(end) | Phase::Finished(end) => Some(end.clone()),
            _ => None,
        })
    }

    fn end_of(
        &self,
        end: fn(&Phase) -> Option<IncomingEnd>,
    ) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        let mut phase = self.channel.phase();
        async move {
            let ended = phase.wait_for(|phase| end(phase).is_some()).await;
            // It cannot be closed before: a connection keeps the channel.
            ended
                .ok()
                .and_then(|phase| end(&phase))
                .unwrap_or_else(|| IncomingEnd::Failed(Arc::new(Error::Closed)))
        }
    }
}

/// How the link to a dispatcher has ended. Adopted connections outlive it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum IncomingEnd {
    /// In order: everything that was adopted has ended, and the dispatcher was told.
    Drained,
    /// The dispatcher has died, or has closed its end without a word.
    DispatcherGone,
    /// The dispatcher takes no more answers from this worker, usually because it got none in time,
    /// and gives to others what was not adopted. It lives, so a worker may connect again.
    Fenced,
    /// The dispatcher broke the protocol, or the socket failed.
    Failed(Arc<Error>),
}

/// The settings of an [`Incoming`].
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::handoff::Incoming;
///
/// let incoming = Incoming::builder().max_connections(500).connect("/run/front.sock").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct IncomingBuilder(Settings);

#[derive(Debug, Clone, Copy)]
struct Settings {
    window: u64,
    max_connections: u64,
    serve_unanswered: bool,
    max_fds: u8,
}

impl Default for IncomingBuilder {
    fn default() -> Self {
        Self(Settings {
            window: 64,
            max_connections: u64::MAX,
            serve_unanswered: false,
            max_fds: 1,
        })
    }
}

impl IncomingBuilder {
    /// Most connections that are on their way to this worker or wait in it to be adopted, 1 to 253.
    /// Default: 64.
    ///
    /// Too few, and the worker waits for the dispatcher between connections. Each takes a
    /// descriptor here, and those on their way count against the dispatcher's `RLIMIT_NOFILE`, over
    /// all workers.
    pub const fn window(mut self, connections: usize) -> Self {
        self.0.window = if connections == 0 { 1 } else { connections as u64 };
        self
    }

    /// Most connections at a time, from when they are asked for until they have ended. By default
    /// as many as there is room for below `RLIMIT_NOFILE`, which bounds them in any case: an eighth
    /// of it, at most 64 descriptors, is left to the application.
    pub const fn max_connections(mut self, connections: usize) -> Self {
        self.0.max_connections = connections as u64;
        self
    }

    /// Whether connections that wait are served when the dispatcher has gone. By default they are
    /// closed.
    ///
    /// The dispatcher may have fenced this worker right before it died, and offered them to another
    /// one; then two workers would serve one connection. A dispatcher reports the fence, but that
    /// may not arrive: for example, if this worker had not read what was sent before. By default
    /// they are lost with the dispatcher for sure.
    pub const fn serve_unanswered(mut self, yes: bool) -> Self {
        self.0.serve_unanswered = yes;
        self
    }

    /// The most descriptors that a connection may have [with its bundle](super::Accepted::with_fd),
    /// 1 to [`MAX_OFFER_FDS`]. Default: 1, the connection alone.
    ///
    /// The worker keeps that many free for each connection that it asks for.
    pub const fn max_fds(mut self, fds: usize) -> Self {
        self.0.max_fds = if fds == 0 {
            1
        } else if fds > MAX_OFFER_FDS {
            MAX_OFFER_FDS as u8
        } else {
            fds as u8
        };
        self
    }

    /// As [`Incoming::from_stdin`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn from_stdin(self) -> io::Result<Incoming> {
        Ok(self.build(Socket::from_stdin()?))
    }

    /// As [`Incoming::connect`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub async fn connect(self, path: impl AsRef<Path>) -> io::Result<Incoming> {
        Ok(self.build(Socket::connect(path, SocketKind::SeqPacket).await?))
    }

    /// As [`Incoming::new`].
    ///
    /// # Panics
    /// As there.
    pub fn build(self, socket: Socket) -> Incoming {
        Incoming { channel: Channel::open(socket, self.0) }
    }
}
