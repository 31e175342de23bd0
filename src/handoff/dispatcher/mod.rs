//! The dispatcher. [`Dispatcher`] is its public face, the [`pool`] decides everything, and a
//! [`worker_task`] moves the bytes and descriptors of one worker.

mod accepted;
mod accepting;
mod builder;
mod dispatching;
mod envelope;
mod group;
mod handover;
mod into_listener;
mod joint_task;
mod key;
mod last_messages;
mod pauses;
mod pidfd;
mod pool;
mod preparing;
mod process;
mod processes;
mod replace;
mod sending;
mod serve;
mod shared;
mod spawn;
mod started;
mod stats;
mod succession;
mod task_signal;
mod times;
mod watch;
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
pub use into_listener::IntoListener;
pub use replace::{NotReplaced, Replaced};
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

/// The longest time that is used, 30 years. An `Instant` cannot be as far away as a `Duration` may
/// be long.
const LONGEST: Duration = Duration::from_secs(30 * 365 * 86_400);

fn after(within: Duration) -> Instant {
    Instant::now() + within.min(LONGEST)
}

/// Hands accepted connections to worker processes. Cheap to clone: clones are the same dispatcher.
///
/// **The promise.** A connection is given to the application of at most one worker, and is never
/// lost before that worker has adopted it, whatever dies, hangs, refuses or overflows, as long as
/// the dispatcher lives. The dispatcher keeps a copy of each connection until the worker has
/// answered. A connection that a worker leaves unanswered goes to another one. An adopted
/// connection ends with its worker.
///
/// **Flow control.** Each worker reports how many connections it takes. If no worker takes any,
/// connections wait. [`serve`](Self::serve) does not accept them then: they wait in the kernel's
/// backlog.
///
/// When the last clone is dropped, the dispatcher [drains](Self::drain) without a time limit.
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
    /// The group of workers and connections that come through this clone.
    group: Group,
    _last: Arc<DrainOnLastDrop>,
}

impl Dispatcher {
    /// Returns a dispatcher with the default settings.
    ///
    /// # Panics
    /// Panics outside of a tokio runtime.
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
    /// group, unless a connection [names another](Accepted::group). The other methods concern the
    /// whole dispatcher: [`stats`](Self::stats), [`drain`](Self::drain),
    /// [`remove_worker`](Self::remove_worker).
    ///
    /// A worker cannot choose its group. For workers that connect, have one path with
    /// [`serve_workers`](Self::serve_workers) for each group, or check the
    /// [credentials](Socket::peer_cred) of each worker before you [add](Self::add_worker) it.
    ///
    /// The [strategy](Strategy) chooses a worker inside of the group. A connection whose group has
    /// no workers waits for one, and holds up no connection of another group. The limits on offers,
    /// fences and descriptors in flight are those of the whole dispatcher. Even if other workers
    /// use up the limit of descriptors in flight, each worker can still get one connection at a
    /// time.
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

    /// Adds the worker at the other end of this socket. It gets connections after its HELLO.
    ///
    /// The worker counts as gone when its socket ends. The end of the process that has connected
    /// does not matter as long as the socket is open, because a worker may connect in one process
    /// and serve in another, as a program that daemonizes does. So if a worker dies while a child
    /// process of its own has the socket open, the dispatcher notices it only by the missing
    /// answers to pings ([`hang_timeout`](DispatcherBuilder::hang_timeout)). It notices the death
    /// of a worker that it has [started](Self::spawn_worker) at once.
    pub fn add_worker(&self, socket: Socket) -> WorkerId {
        let _context = self.shared.runtime.enter();
        let process = self.shared.processes().peer_of(&socket);
        let id = self.shared.with_pool(|pool| pool.add_worker(self.group.clone(), None));
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

    /// Asks a worker to finish its connections within this time, and waits until it has left. It
    /// gets no more connections, and is not started again. Returns true if there was such a worker.
    ///
    /// # Cancel safety
    /// Once this was polled, the worker leaves even if this is dropped.
    pub async fn remove_worker(&self, id: WorkerId, within: Option<Duration>) -> bool {
        let until = within.map(after);
        let removed = self.shared.with_pool(|pool| pool.remove(id, until, Instant::now()));
        self.shared.changed();
        self.shared.until(|pool| !pool.contains(id)).await;
        removed
    }

    /// Hands a connection over. This begins at once, and the future only waits for the outcome: the
    /// worker that has adopted the connection. If no worker has room, or if there are no workers,
    /// the connection waits for one.
    ///
    /// # Errors
    /// A [`DispatchError`], which returns the connection, if it was offered too often or cannot be
    /// sent, or if the dispatcher drains.
    ///
    /// # Cancel safety
    /// If the future is dropped, the connection is handed over all the same. If that fails, its
    /// client sees the end. To be able to cancel before anything has begun,
    /// [`reserve`](Self::reserve) a slot first.
    pub fn dispatch(&self, connection: impl Into<Accepted>) -> Dispatching {
        dispatch(&self.shared, connection.into(), &self.group, None)
    }

    /// Waits until a worker has room for a connection, and keeps the slot free. Use it to accept a
    /// connection only if a worker has room for it, or to wait in a future that may be dropped.
    ///
    /// The slots of a worker that leaves are gone with it. A connection that is dispatched with
    /// such a permit is the next to be offered.
    ///
    /// Returns `None` when the dispatcher drains.
    ///
    /// # Cancel safety
    /// If the future is dropped, only its position in the queue is lost.
    pub async fn reserve(&self) -> Option<DispatchPermit> {
        reserve(&self.shared, &self.group).await
    }

    /// Returns the numbers of the dispatcher and of its workers.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Ends the dispatcher, for all clones, and waits until its workers have left:
    ///
    /// 1. [`serve`](Self::serve) accepts the connections in the kernel's backlog and ends. No more
    ///    connections are taken.
    /// 2. Connections that wait are handed over, for half of the time at most. Then those that are
    ///    left are given back.
    /// 3. All workers finish the connections that they have adopted, and leave.
    /// 4. At the end of the time, workers that are left are cut off. [Their
    ///    processes](DispatcherBuilder::kill_hung) are killed if the dispatcher has started them.
    ///
    /// # Cancel safety
    /// Once this was polled, draining goes on even if this is dropped. Call it again to wait, or to
    /// set another limit.
    pub async fn drain(&self, within: Option<Duration>) {
        let _ = self.shared.start_drain(within).await; // it does not panic
    }
}

/// Lives as long as any clone of the dispatcher.
#[derive(Debug)]
struct DrainOnLastDrop(Arc<Shared>);

impl Drop for DrainOnLastDrop {
    fn drop(&mut self) {
        if self.0.with_pool(|pool| pool.is_open()) {
            drop(self.0.start_drain(None));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    /// Callers that overlap, behind one that goes on waiting, leave nothing behind.
    #[tokio::test]
    async fn positions_in_the_queue_that_nobody_waits_for_do_not_pile_up() {
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
        assert!(dispatcher.shared.with_pool(|pool| pool.waiters()) <= 2);
        assert!(first.now_or_never().is_none());
    }
}
