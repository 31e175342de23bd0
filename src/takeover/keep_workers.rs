//! The calls by which a dispatcher goes on with workers, and accepts for them.

use std::io;

use super::{Accepts, Gated, Phase, Server};
use crate::handoff::{Dispatcher, IntoListener, TakenWorker, WorkerCommand, WorkerId};

impl Server {
    /// Keeps the workers of a [hand-off](crate::handoff) through takeovers: the dispatcher goes on
    /// with those of the server that this one has replaced, which it returns, and passes all of its
    /// own on to the next one. Call it once, as soon as this process serves.
    ///
    /// Workers notice nothing, and keep their connections. Connections that no worker has adopted
    /// move along. If the takeover is undone, everything comes back. A worker that is too old to be
    /// moved, or is about to leave, finishes what it has.
    ///
    /// Workers that the first process has started are children of none of the later ones: these
    /// know of their ends, and [kill](crate::handoff::DispatcherBuilder::kill_hung) those that
    /// hang.
    /// The closure returns the command by which such a worker is [started
    /// again](WorkerCommand::restart), if it is to be.
    ///
    /// Once this process has been replaced and may leave, [drain](Dispatcher::drain) the
    /// dispatcher: that waits until the other one has all connections.
    ///
    /// ```no_run
    /// # fn worker() -> tokio::process::Command { unimplemented!() }
    /// # type Outcome = Result<(), Box<dyn std::error::Error>>;
    /// # async fn front(server: fdwire::takeover::Server) -> Outcome {
    /// use fdwire::handoff::{Dispatcher, WorkerCommand};
    /// use tokio::net::TcpListener;
    ///
    /// let dispatcher = Dispatcher::builder().build();
    /// let command = || WorkerCommand::from(worker()).restart(true);
    /// let taken = server.keep_workers(&dispatcher, |_| Some(command()))?;
    /// for _ in taken.len()..4 {
    ///     dispatcher.spawn_worker(command())?;
    /// }
    /// let http = server.gated::<TcpListener>("http", 0)?;
    /// tokio::select! {
    ///     served = http.dispatch_to(&dispatcher) => served?,
    ///     finished = server.finish() => println!("{finished:?}"),
    /// }
    /// dispatcher.drain(None).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `InvalidData` if the server before this one has sent something else than workers. Then none
    /// is taken, and the dispatcher's own are kept all the same.
    pub fn keep_workers(
        &self,
        dispatcher: &Dispatcher,
        restart: impl FnMut(&TakenWorker) -> Option<WorkerCommand>,
    ) -> io::Result<Vec<WorkerId>> {
        let coming = self.shared.with_workers(|workers| workers.keep(dispatcher.clone()));
        // The closure is foreign code, so nothing is locked.
        let taken = dispatcher.take_workers(coming, restart)?;
        let ids = taken.workers().to_vec();
        self.shared.with_workers(|workers| workers.took(taken));
        Ok(ids)
    }
}

impl<L: Accepts + IntoListener> Gated<L> {
    /// Accepts connections and [hands them over](Dispatcher::serve) while this process serves.
    /// Returns when another process has taken over for good, or the dispatcher drains.
    ///
    /// # Errors
    /// The errors of [`Dispatcher::serve`], and of making a descriptor.
    ///
    /// # Cancel safety
    /// Accepted connections are handed over also if this is dropped.
    pub async fn dispatch_to(&self, dispatcher: &Dispatcher) -> io::Result<()> {
        loop {
            let phase = self.until_phase(|phase| phase != Phase::Draining).await;
            if phase == Phase::Replaced {
                return Ok(());
            }
            let Some(listener) = self.copy()? else { continue };
            tokio::select! {
                biased;
                _ = self.until_phase(|phase| phase != Phase::Serving) => {}
                served = dispatcher.serve(listener) => return served,
            }
        }
    }
}
