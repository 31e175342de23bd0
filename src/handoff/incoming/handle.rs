use std::{
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};

use tokio::{
    select,
    time::{Instant, sleep_until},
};

use super::{
    channel::{Channel, WorkerPhase},
    end::IncomingEnd,
    stats::IncomingStats,
};
use crate::Error;

/// A handle of an [`Incoming`](super::Incoming): it drains the worker and waits for its
/// end. It keeps no connection and no link open.
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
///     // Wait for requests that are on their way, because axum ends silent connections at once.
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
    pub(super) channel: Arc<Channel>,
}

impl IncomingHandle {
    /// Stops taking connections. Those that wait go back to the dispatcher, and the stream ends.
    /// When the adopted connections have ended, the worker sends a goodbye to the dispatcher.
    pub fn drain(&self) {
        self.channel.drain();
    }

    /// Returns true if this worker takes no more connections, for whatever reason. HTTP answers
    /// should have `Connection: close` from then on: it ends a connection that is kept alive
    /// without cutting off a request that is on its way.
    pub fn is_draining(&self) -> bool {
        !matches!(*self.channel.phase().borrow(), WorkerPhase::Open)
    }

    /// Waits until this worker takes no more connections, for whatever reason. End silent
    /// connections a moment later, with `with_graceful_shutdown` of axum or `graceful_shutdown` of
    /// hyper. At once would be too early, because requests may be on their way: see the
    /// [traps](crate::handoff#traps).
    pub fn drain_requested(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut phase = self.channel.phase();
        async move {
            let _ = phase.wait_for(|phase| !matches!(phase, WorkerPhase::Open)).await;
        }
    }

    /// Returns the numbers of this worker.
    pub fn stats(&self) -> IncomingStats {
        self.channel.stats()
    }

    /// Returns the time until which the dispatcher waits for the adopted connections to end.
    /// Returns `None` if the dispatcher has not asked this worker to drain, or has set no time.
    pub fn drain_deadline(&self) -> Option<Instant> {
        match *self.channel.phase().borrow() {
            WorkerPhase::Draining { deadline } => deadline,
            _ => None,
        }
    }

    /// Waits until the [deadline](Self::drain_deadline) of the drain is no further away than
    /// `margin`. If you end the remaining connections then, the dispatcher still gets the goodbye
    /// in time. Waits forever if the drain has no deadline, or if the link has ended before.
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
                    WorkerPhase::Draining { deadline } => deadline,
                    _ => None,
                };
                let margin_reached = async {
                    match deadline {
                        Some(deadline) => {
                            sleep_until(deadline.checked_sub(margin).unwrap_or(deadline)).await
                        }
                        None => pending().await,
                    }
                };
                select! {
                    () = margin_reached => return,
                    // A drain has begun, or has another deadline now.
                    changed = phase.changed() => if changed.is_err() {
                        pending().await
                    }
                }
            }
        }
    }

    /// Waits until this worker has nothing more to do: its link to the dispatcher has ended, and so
    /// has every connection that it has adopted. Await this future before the process ends, so that
    /// no client is cut off, whatever has ended the link.
    ///
    /// A connection ends when its [`Connection`](super::Connection) is dropped, or its
    /// [`ServingGuard`](crate::handoff::ServingGuard).
    pub fn ended(&self) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        self.end_of(|phase| match phase {
            WorkerPhase::Finished(end) => Some(end.clone()),
            _ => None,
        })
    }

    /// Waits for the end of the link to the dispatcher. Adopted connections go on, except after a
    /// drain, which has waited for them. Use it in a worker that connects again, or that has to
    /// notice at once that it was [fenced](IncomingEnd::Fenced).
    pub fn link_ended(&self) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        self.end_of(|phase| match phase {
            WorkerPhase::Unlinked(end) | WorkerPhase::Finished(end) => Some(end.clone()),
            _ => None,
        })
    }

    /// Waits for a phase in which `end` returns `Some`.
    fn end_of(
        &self,
        end: fn(&WorkerPhase) -> Option<IncomingEnd>,
    ) -> impl Future<Output = IncomingEnd> + Send + 'static + use<> {
        let mut phase = self.channel.phase();
        async move {
            let ended = phase.wait_for(|phase| end(phase).is_some()).await;
            // The channel is not dropped before its last connection has ended.
            ended
                .ok()
                .and_then(|phase| end(&phase))
                .unwrap_or_else(|| IncomingEnd::Failed(Arc::new(Error::Closed)))
        }
    }
}
