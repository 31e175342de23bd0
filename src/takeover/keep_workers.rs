//! The methods by which a dispatcher keeps its workers through a takeover, and accepts for them.

use std::io;

use super::{Accepts, Gated, Phase, Server};
use crate::handoff::{Dispatcher, IntoListener, TakenWorker, WorkerCommand, WorkerId};

impl Server {
    /// Keeps the workers of a [hand-off](crate::handoff) through takeovers. The dispatcher takes
    /// the workers of the server that this one has replaced, whose ids are returned. In the next
    /// takeover it passes on all of its workers. Call this once, as soon as this process serves.
    ///
    /// The workers keep their links and their connections. Connections that no worker has adopted
    /// move along. If the takeover is undone, everything comes back. A worker that can't be moved,
    /// because its version is too old or it is about to leave, finishes its connections.
    ///
    /// A worker that an earlier process has started is not a child of this one. The dispatcher
    /// notices its end all the same, and [kills](crate::handoff::DispatcherBuilder::kill_hung) it
    /// if it hangs. The closure returns the command by which such a worker is [started
    /// again](WorkerCommand::restart), or `None`.
    ///
    /// Once this process has been replaced and may exit, [drain](Dispatcher::drain) the dispatcher:
    /// that waits until the other process has all connections.
    ///
    /// ```no_run
    /// # fn worker() -> tokio::process::Command { tokio::process::Command::new("worker") }
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
    ///     finished = server.finish() => println!("{finished}"),
    /// }
    /// dispatcher.drain(None).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `InvalidData` if the server before this one has sent something that does not describe
    /// workers. Then no worker is taken, and the dispatcher's own workers are kept all the same.
    pub fn keep_workers(
        &self,
        dispatcher: &Dispatcher,
        restart: impl FnMut(&TakenWorker) -> Option<WorkerCommand>,
    ) -> io::Result<Vec<WorkerId>> {
        let received = self.shared.with_workers(|workers| workers.keep(dispatcher.clone()));
        // The closure is foreign code, so no lock is held.
        let taken = dispatcher.take_workers(received, restart)?;
        let ids = taken.workers().to_vec();
        self.shared.with_workers(|workers| workers.set_taken(taken));
        Ok(ids)
    }
}

impl<L: Accepts + IntoListener> Gated<L> {
    /// Accepts connections and [hands them over](Dispatcher::serve) while this process serves.
    /// Returns when another process has taken over for good, or the dispatcher drains.
    ///
    /// # Errors
    /// The errors of [`Dispatcher::serve`], and `EMFILE` or `ENFILE` if the socket can't be copied.
    ///
    /// # Cancel safety
    /// Connections that were accepted are handed over even if this is dropped.
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
