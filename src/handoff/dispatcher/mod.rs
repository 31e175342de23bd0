//! The dispatcher. [`Dispatcher`] is what its users see; the [`pool`] decides everything; a
//! [`worker_task`] moves the bytes and descriptors of one worker.

mod accepted;
mod accepting;
mod builder;
mod dispatching;
mod group;
mod handover;
mod joint_task;
mod key;
mod pauses;
mod pool;
mod preparing;
mod process;
mod replace;
mod serve;
mod shared;
mod spawn;
mod started;
mod stats;
mod succession;
mod task_signal;
mod times;
mod worker_task;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use accepted::{Accepted, DispatchError, NotDispatched, Unadopted};
use builder::Config;
pub use builder::{DispatcherBuilder, Strategy};
pub use dispatching::{DispatchPermit, Dispatching};
use dispatching::{dispatch, reserve};
pub use group::Group;
use pool::Admission;
pub use replace::{NotReplaced, Replaced};
pub use serve::IntoListener;
use shared::{Shared, WorkerEntryGuard};
pub use spawn::WorkerCommand;
pub use stats::{
    GroupStats, RetireCause, RetireCounts, Stats, WorkerExit, WorkerId, WorkerState, WorkerStats,
};
pub use succession::{Succession, TakenWorker, TakenWorkers};
pub use times::AdoptionTimes;
use worker_task::WorkerTask;

use super::{Address, Transport, protocol};
use crate::Socket;

/// No time is longer: an `Instant` cannot be as far away as a `Duration` may say. 30 years.
const LONGEST: Duration = Duration::from_secs(30 * 365 * 86_400);

fn after(within: Duration) -> Instant {
    Instant::now() + within.min(LONGEST)
}

/// Hands accepted connections to worker processes. Cheap to clone: clones are the same dispatcher.
///
/// **What is promised.** A connection is given to the application of at most one worker, and is
/// never lost before that worker has adopted it, whatever dies, hangs, refuses or overflows, as
/// long as the dispatcher lives. The dispatcher keeps a copy of each connection until the answer;
/// what a worker leaves unanswered goes to another one. A connection that was adopted ends with its
/// worker.
///
/// **How much.** Workers say how many connections they take. When none takes any, connections wait:
/// in [`serve`](Self::serve) in the kernel's backlog, not accepted.
///
/// When the last clone is dropped, it [drains](Self::drain) without a limit.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Socket, SocketKind, handoff::Dispatcher};
/// use tokio::net::{TcpListener, TcpStream};
///
/// let dispatcher = Dispatcher::new();
/// let (here, there) = Socket::pair(SocketKind::SeqPacket)?;
/// dispatcher.add_worker(here); // `there` usually belongs to another process
///
/// let listener = TcpListener::bind("127.0.0.1:0").await?;
/// # let client = TcpStream::connect(listener.local_addr()?).await?;
/// let (connection, _) = listener.accept().await?;
/// let handed_over = dispatcher.dispatch(connection); // ready when a worker has adopted it
/// # drop((there, handed_over)); Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Dispatcher {
    shared: Arc<Shared>,
    /// Of the workers and connections that come through this clone.
    group: Group,
    _last: Arc<DrainOnLastDrop>,
}

impl Dispatcher {
    /// Returns a dispatcher with the default settings.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[expect(clippy::new_without_default, reason = "a `default` should not panic")]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Returns a builder, to change settings.
    pub fn builder() -> DispatcherBuilder {
        DispatcherBuilder::new()
    }

    fn with_config(config: Config) -> Self {
        let shared = Shared::new(config);
        let last = Arc::new(DrainOnLastDrop(Arc::clone(&shared)));
        Self { shared, group: Group::default(), _last: last }
    }

    /// Returns a clone for one group: workers that are started or added through it belong to the
    /// group, and connections that are dispatched or served through it go to the workers of the
    /// group, unless a connection [names another](Accepted::group). The rest is about the whole
    /// dispatcher: [`stats`](Self::stats), [`drain`](Self::drain),
    /// [`remove_worker`](Self::remove_worker).
    ///
    /// A worker has no say in its group. For workers that connect, the path decides: one
    /// [`serve_workers`](Self::serve_workers) for each group, or
    /// [`add_worker`](Self::add_worker) after a look at the
    /// [credentials](Socket::peer_cred) of the one that has connected.
    ///
    /// The [strategy](Strategy) chooses inside of a group. A connection whose group has no workers
    /// waits for one, and holds up no connection of another group. Limits on offers, fences and
    /// descriptors in flight are those of the whole dispatcher, and one place in flight is left to
    /// each worker whatever the others do.
    ///
    /// ```no_run
    /// # fn example(dispatcher: fdwire::handoff::Dispatcher) -> std::io::Result<()> {
    /// use tokio::process::Command;
    ///
    /// dispatcher.in_group("images").spawn_worker(Command::new("image-worker"))?;
    /// dispatcher.in_group("api").spawn_worker(Command::new("api-worker"))?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn in_group(&self, group: impl Into<Group>) -> Self {
        Self { group: group.into(), ..self.clone() }
    }

    /// Takes a worker that is at the other end of this socket. Until it says hello, it gets
    /// nothing.
    ///
    /// The worker is gone when its socket ends. A worker may connect in one process and serve in
    /// another, as a program does that daemonizes: the end of the process that has connected does
    /// not matter as long as the socket is open. So if a worker dies whose child processes have its
    /// socket open, too, only its silence tells
    /// ([`hang_timeout`](DispatcherBuilder::hang_timeout)). The death of a worker that the
    /// dispatcher [starts](Self::spawn_worker) is noticed at once.
    pub fn add_worker(&self, socket: Socket) -> WorkerId {
        let _context = self.shared.runtime.enter();
        let process = self.shared.processes().peer_of(&socket);
        let id = self.shared.act(|pool| pool.add_worker(self.group.clone(), None));
        let task = WorkerTask::new(Arc::clone(&self.shared), id, socket, process);
        self.run(id, task);
        id
    }

    /// Runs a worker that is not started again.
    fn run(&self, id: WorkerId, task: WorkerTask) {
        let shared = Arc::clone(&self.shared);
        let entry = WorkerEntryGuard::new(&shared, id);
        self.shared.tasks.add(async move {
            let _entry = entry;
            task.run().await;
            shared.log_exit(id);
        });
    }

    /// Tells a worker to finish what it has, within this time, and waits until it has left. It gets
    /// no more connections, and is not started again. Returns whether there was such a worker.
    ///
    /// # Cancel safety
    /// It leaves also if this is dropped, once it was polled.
    pub async fn remove_worker(&self, id: WorkerId, within: Option<Duration>) -> bool {
        let until = within.map(after);
        let removed = self.shared.act(|pool| pool.remove(id, until, Instant::now()));
        self.shared.changed();
        self.shared.until(|pool| !pool.contains(id)).await;
        removed
    }

    /// Hands a connection over, and begins at once: the future only waits for the outcome, which is
    /// the worker that has adopted it. As long as no worker has room, and also as long as there are
    /// no workers, the connection waits for one.
    ///
    /// # Errors
    /// [`DispatchError`], which brings the connection back: too many offers, or the dispatcher
    /// drains.
    ///
    /// # Cancel safety
    /// If the future is dropped, the connection is handed over all the same; should that fail, its
    /// client sees the end. To be able to stop before anything has begun,
    /// [`reserve`](Self::reserve) first.
    pub fn dispatch(&self, connection: impl Into<Accepted>) -> Dispatching {
        dispatch(&self.shared, connection.into(), &self.group, Admission::None)
    }

    /// Waits until a worker has room for a connection, and keeps a place free for it: for those who
    /// have a connection only then, or may be cancelled.
    ///
    /// Places of a worker that leaves are gone with it; a connection dispatched with such a permit
    /// is the next to be offered.
    ///
    /// # Errors
    /// `None` when the dispatcher drains.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped; the place in the queue is.
    pub async fn reserve(&self) -> Option<DispatchPermit> {
        reserve(&self.shared, Some(&self.group)).await
    }

    /// The numbers of the dispatcher and of its workers.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Ends it, for all clones: [`serve`](Self::serve) accepts what waits in the kernel's backlog
    /// and ends, no more connections are taken, those that there are get handed over (for half of
    /// the time at most), all workers finish what they have adopted, and it waits until they have
    /// left. Those that have not after this time are cut off; [their
    /// processes](DispatcherBuilder::kill_hung) are killed if the dispatcher has started them.
    ///
    /// A connection that is not handed over by then is given back.
    ///
    /// # Cancel safety
    /// Draining goes on if this is dropped, once it was polled. Call it again to wait, or to set
    /// another limit.
    pub async fn drain(&self, within: Option<Duration>) {
        let _ = self.shared.start_drain(within).await; // it does not panic
    }
}

/// Lives as long as any clone of the dispatcher.
#[derive(Debug)]
struct DrainOnLastDrop(Arc<Shared>);

impl Drop for DrainOnLastDrop {
    fn drop(&mut self) {
        if self.0.act(|pool| pool.is_open()) {
            drop(self.0.start_drain(None));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    /// Overlapping ones too, behind one that goes on waiting.
    #[tokio::test]
    async fn places_that_nobody_waits_for_do_not_pile_up() {
        let dispatcher = Dispatcher::builder().build();
        let first = dispatcher.reserve();
        let mut first = pin!(first);
        assert!(first.as_mut().now_or_never().is_none());
        let mut before = Box::pin(dispatcher.reserve());
        for _ in 0..1000 {
            let mut next = Box::pin(dispatcher.reserve());
            assert!(next.as_mut().now_or_never().is_none());
            before = next;
        }
        assert!(before.now_or_never().is_none());
        assert!(dispatcher.shared.act(|pool| pool.waiters()) <= 2);
        assert!(first.now_or_never().is_none());
    }
}
