//! The methods of [`Dispatcher`] that accept connections and workers.

use std::{future::Future, io, pin::pin};

use futures::future::{Either, select};
use tokio::time::sleep;
use tracing::warn;

use super::{
    Accepted, Dispatcher, IntoListener,
    accepting::{Accepting, BACK_OFF, is_final},
    preparing::Preparing,
};
use crate::Listener;

impl Dispatcher {
    /// Accepts connections and hands them over to the workers of [this group](Self::in_group),
    /// until the dispatcher drains. Takes a listener of tokio or std, of TCP or Unix sockets.
    ///
    /// It accepts a connection only if a worker has room for it. The others wait in the kernel's
    /// backlog, where they take no descriptor. The last 16 descriptors of the process (an eighth of
    /// `RLIMIT_NOFILE`, if that is less) are a reserve, because starting a worker takes
    /// descriptors, too. When only the reserve is left, it accepts as long as fewer than 8
    /// connections are on their way. At `EMFILE` it waits until descriptors are free.
    ///
    /// A connection that finds no worker [after too many
    /// offers](super::NotDispatched::TooManyOffers), or in the time of a drain, is shut down and
    /// [counted](super::Stats::lost).
    ///
    /// **The end.** A listener that is closed takes its backlog along: the kernel resets those
    /// connections. So keep this future until the dispatcher has [drained](Self::drain), and let
    /// that end it. First it accepts the connections in the backlog (4,096 connections at most),
    /// and then it closes the listener. A client whose connection is established between the last
    /// `accept` and that moment, or that connects later, is not served, unless another process has
    /// the listener too: a [successor](crate::takeover).
    ///
    /// The work is done in a task of the dispatcher, from the first poll until this future is
    /// dropped.
    ///
    /// # Errors
    /// The errors of taking the listener out of its event loop, `InvalidInput` if it was shut down,
    /// and `Other` if the runtime that the dispatcher was built in has ended.
    ///
    /// # Cancel safety
    /// Accepted connections are handed over even if this is dropped. The listener is closed at
    /// once. If no other process has a copy, the kernel resets the connections in the backlog.
    pub async fn serve(&self, listener: impl IntoListener) -> io::Result<()> {
        self.accept(listener, None).await
    }

    /// Like [`serve`](Self::serve), with a function that prepares each connection: it may set
    /// socket options, read the first bytes, choose the group, and add metadata. It returns `None`
    /// for a connection that is not to be handed over, which it has dropped or keeps.
    ///
    /// Each connection is prepared in a task of its own, so a peer that sends nothing holds up no
    /// others. Two limits bound what such peers take: the
    /// [number](super::DispatcherBuilder::max_preparing) of connections that are being prepared,
    /// and the [time](super::DispatcherBuilder::prepare_timeout) for each. A connection that is not
    /// prepared in time is closed and [counted](super::Stats::lost), as is one whose function
    /// panics.
    ///
    /// Connections are accepted only when a worker of any group has a free slot, because the
    /// function may choose [the group](Accepted::group). The slot is not kept during the
    /// preparation: a connection that is prepared waits for one again, and still counts as being
    /// prepared. While the dispatcher drains, connections that are being prepared are handed over,
    /// too.
    ///
    /// **Groups do not wait for each other.** If a group has no worker with room and another one
    /// has, prepared connections of the first one would in the end take the whole number, and
    /// nothing more would be accepted. So if several groups have workers, each has at most half of
    /// the number that the others leave: with the default of 1,024 the first stuck group gets 512,
    /// the next one 256, and so on. All groups without workers count as one. A connection beyond
    /// its group's share is shut down and [counted](super::Stats::lost), since its group is not
    /// known before it is accepted. For a client that should wait in the kernel's backlog instead,
    /// give its group [a listener of its own](Self::in_group).
    ///
    /// ```no_run
    /// # async fn example(
    /// #     dispatcher: fdwire::handoff::Dispatcher, listener: tokio::net::TcpListener,
    /// # ) -> std::io::Result<()> {
    /// use fdwire::handoff::Accepted;
    /// use tokio::net::TcpStream;
    ///
    /// // All connections that begin with the same byte go to the same worker (`Strategy::ByKey`).
    /// let prepare = async |stream: TcpStream| {
    ///     stream.set_nodelay(true).ok()?;
    ///     let mut first = [0];
    ///     stream.peek(&mut first).await.ok()?; // the worker reads it again
    ///     Some(Accepted::from(stream).key(first))
    /// };
    /// dispatcher.serve_with(listener, move |stream| prepare(stream)).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// The errors of [`serve`](Self::serve).
    ///
    /// # Cancel safety
    /// The same as that of [`serve`](Self::serve). Connections that are being prepared are handed
    /// over even if this is dropped.
    pub async fn serve_with<L, P, F>(&self, listener: L, prepare: P) -> io::Result<()>
    where
        L: IntoListener,
        P: Fn(L::Stream) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Accepted>> + Send + 'static,
    {
        self.accept(listener, Some(Preparing::new::<L, P, F>(&self.shared.config, prepare))).await
    }

    async fn accept(
        &self,
        listener: impl IntoListener,
        preparing: Option<Preparing>,
    ) -> io::Result<()> {
        let (listener, transport, local) = listener.into_listener()?;
        let accepting = Accepting::new(self, listener, transport, local, preparing)?;
        self.shared.tasks.run(accepting.run()).await?
    }

    /// Takes the workers that connect to this listener, until the dispatcher drains: see
    /// [`add_worker`](Self::add_worker).
    ///
    /// # Errors
    /// The errors of accept(2) that do not go away by themselves.
    ///
    /// # Cancel safety
    /// Only the listener is lost if this is dropped.
    pub async fn serve_workers(&self, listener: Listener) -> io::Result<()> {
        loop {
            let accepted = pin!(listener.accept());
            match select(accepted, pin!(self.shared.until(|pool| !pool.is_open()))).await {
                Either::Left((Ok(socket), _)) => drop(self.add_worker(socket)),
                Either::Left((Err(error), _)) if is_final(&error) => return Err(error),
                Either::Left((Err(error), _)) => {
                    warn!(%error, "workers cannot be accepted for a while");
                    sleep(BACK_OFF).await;
                }
                Either::Right(_) => return Ok(()),
            }
        }
    }
}
