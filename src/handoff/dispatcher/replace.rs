//! Replacing the workers of a group.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::yield_now;
use tracing::{info, warn};

use super::{
    Dispatcher, LONGEST, Shared, WorkerCommand, WorkerId, WorkerStats,
    pool::{Outcome, Refusal, ReplacementId},
};

/// The workers of a group were replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replaced {
    /// The new workers.
    pub new: Vec<WorkerId>,
    /// The workers that have left, in the order of leaving. Their
    /// [`last_exit`](WorkerStats::last_exit) has the reason.
    pub old: Vec<WorkerStats>,
}

impl Replaced {
    /// Returns the number of connections that the old workers had adopted and that had not ended
    /// when they left, as far as the workers have reported. If a process is
    /// [killed](super::DispatcherBuilder::kill_hung), its connections end with it.
    pub fn unfinished(&self) -> u64 {
        let exits = self.old.iter().filter_map(|worker| worker.last_exit.as_ref());
        exits.map(|exit| exit.active).sum()
    }
}

/// The workers of a group were not replaced. The old ones go on, and the new ones have left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotReplaced {
    /// The program of a new worker could not be started. The error has its name.
    #[error(transparent)]
    NotStarted(io::Error),
    /// A new worker was gone before all were ready, or was not ready in time. Its
    /// [`last_exit`](WorkerStats::last_exit) has the reason and the exit status.
    #[error("{}", failure(.0))]
    Failed(Box<WorkerStats>),
    /// New workers of this group are starting already.
    #[error("new workers of this group are starting already")]
    InProgress,
    /// The dispatcher drains.
    #[error("the dispatcher drains")]
    Draining,
    /// There was no command to start new workers with.
    #[error("there is no command to start new workers with")]
    NoCommand,
}

fn failure(worker: &WorkerStats) -> String {
    let program = worker.program.as_deref().unwrap_or_default();
    let Some(exit) = &worker.last_exit else {
        return format!("new worker {} ({program}) is gone", worker.id);
    };
    let pid = exit.pid.map_or_else(String::new, |pid| format!(", pid {pid}"));
    format!("new worker {} ({program}{pid}) is gone: {exit}", worker.id)
}

impl From<Refusal> for NotReplaced {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::InProgress => Self::InProgress,
            Refusal::Draining => Self::Draining,
        }
    }
}

impl Dispatcher {
    /// Replaces the workers of [this group](Self::in_group): starts the new ones, waits until each
    /// has sent its HELLO, and then asks the old ones to finish their connections within this time.
    /// Returns when the old ones have left.
    ///
    /// The old workers are those that the group has when this is called, whether they were started
    /// or have connected. The old ones get all connections until all new ones are ready. From then
    /// on, the new ones get them, and also those that the old ones have not adopted. No connection
    /// takes a further descriptor for that. Each new worker takes two.
    ///
    /// If a new worker fails before all are ready, the new ones are stopped, and the old ones have
    /// noticed nothing. A new worker fails if its program cannot be started, if its process or its
    /// socket ends, or if its HELLO does not come within the
    /// [`hello_timeout`](super::DispatcherBuilder::hello_timeout). This holds even if its command
    /// allows to [start it again](WorkerCommand::restart). After the switch, a new worker that dies
    /// is treated like any other.
    ///
    /// | what happens meanwhile | before the switch | after it |
    /// |---|---|---|
    /// | an old worker dies | it is started again if its command allows it | it has left |
    /// | a new worker dies | the new ones are stopped | it is started again if its command allows it |
    /// | a worker is added | it stays | it stays |
    /// | the dispatcher drains | the new ones are stopped | the old ones go on leaving |
    /// | another call for this group | is [refused](NotReplaced::InProgress) | replaces the new ones |
    ///
    /// **Clients that keep their connection.** An adopted connection stays with its old worker, so
    /// the worker decides what its client sees. If it answers with `Connection: close` once it is
    /// [to drain](crate::handoff::IncomingHandle::is_draining), the client connects again, to a new
    /// worker, and no request fails. Ending a silent connection is different: a request that the
    /// client sends in that moment gets a reset instead of an answer. This is so with any server of
    /// HTTP/1 (RFC 9112, section 9.5). Clients send such a request again if it is idempotent; load
    /// generators such as wrk count an error. So leave silent connections open for longer than
    /// clients pause between requests, with a `within` that is longer still.
    /// [`serve_axum`](crate::handoff::Incoming::serve_axum) ends them after 100 ms.
    ///
    /// ```no_run
    /// # async fn example(dispatcher: fdwire::handoff::Dispatcher)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    ///
    /// use fdwire::handoff::WorkerCommand;
    /// use tokio::process::Command;
    ///
    /// let new = (0..4).map(|_| WorkerCommand::from(Command::new("my-worker")).restart(true));
    /// let replaced = dispatcher.replace_workers(new, Some(Duration::from_secs(30))).await?;
    /// println!("{:?} have come; {} connections were cut", replaced.new, replaced.unfinished());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`NotReplaced`]: the old workers go on, and the new ones have left.
    ///
    /// # Cancel safety
    /// If it is dropped before the switch, the new workers are stopped, and the old ones go on. If
    /// it is dropped after that, the old ones go on leaving.
    pub async fn replace_workers<W: Into<WorkerCommand>>(
        &self,
        new: impl IntoIterator<Item = W>,
        within: Option<Duration>,
    ) -> Result<Replaced, NotReplaced> {
        let commands = Vec::from_iter(new.into_iter().map(Into::into));
        if commands.is_empty() {
            return Err(NotReplaced::NoCommand);
        }
        let (shared, within) = (&self.shared, within.map(|within| within.min(LONGEST)));
        let id = shared.with_pool(|pool| pool.begin_replacement(&self.group, within))?;
        let guard = ReplacementGuard { shared, id };

        // Start the new workers. Each start takes a while, so other tasks get their turn.
        let mut not_started = None;
        for command in commands {
            if !shared.with_pool(|pool| pool.is_starting(id)) {
                break;
            }
            let started = self.start_worker(command, |pool, program| {
                pool.add_new_worker(id, program, Instant::now())
            });
            if let Err(error) = started {
                shared.with_pool(|pool| pool.roll_back(id, None, Instant::now()));
                not_started = Some(error);
                break;
            }
            yield_now().await;
        }
        shared.with_pool(|pool| pool.complete_replacement(id, Instant::now()));

        // The pool decides when all new workers are ready, or when one of them is gone.
        shared.until(|pool| pool.is_replacement_over(id)).await;
        let failed = match guard.end() {
            Some(Outcome::Switched { new, old }) => {
                let replaced = Replaced { new, old };
                let unfinished = replaced.unfinished();
                info!(group = %self.group, unfinished, "workers were replaced");
                return Ok(replaced);
            }
            Some(Outcome::RolledBack { failed }) => failed,
            None => None,
        };

        // Report why the old workers go on.
        let error = match (not_started, failed) {
            (Some(error), _) => NotReplaced::NotStarted(error),
            (None, Some(failed)) => NotReplaced::Failed(Box::new(failed)),
            (None, None) => NotReplaced::Draining,
        };
        warn!(group = %self.group, %error, "workers were not replaced");
        Err(error)
    }
}

/// Ends the replacement when nobody waits for it any longer.
struct ReplacementGuard<'a> {
    shared: &'a Arc<Shared>,
    id: ReplacementId,
}

impl ReplacementGuard<'_> {
    fn end(&self) -> Option<Outcome> {
        self.shared.with_pool(|pool| pool.end_replacement(self.id, Instant::now()))
    }
}

impl Drop for ReplacementGuard<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
