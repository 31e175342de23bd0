//! The dispatcher: [`Dispatcher`] is what its users see; the [`pool`] knows who gets what; a [`link`] is one worker.

mod accepted;
mod bell;
mod builder;
mod copies;
mod dispatching;
mod job;
mod ledger;
mod link;
mod pool;
mod process;
mod serve;
mod spawn;
mod stats;

use std::{
    future::Future,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

pub use accepted::{Accepted, DispatchError, NotDispatched, Unadopted};
use builder::Config;
pub use builder::{DispatcherBuilder, Strategy};
use dispatching::dispatch;
pub use dispatching::{Dispatching, Permit};
use link::Link;
use pool::Pool;
use process::Process;
pub use serve::IntoListener;
pub use spawn::WorkerCommand;
pub use stats::{Cause, Retired, Stats, WorkerId, WorkerState, WorkerStats};

use super::{Address, Transport, protocol};
use crate::Socket;

/// No time is longer: an `Instant` cannot be as far away as a `Duration` may say. 30 years.
const LONGEST: Duration = Duration::from_secs(30 * 365 * 86_400);

fn after(within: Duration) -> Instant {
    Instant::now() + within.min(LONGEST)
}

/// Hands accepted connections to worker processes. Cheap to clone: clones are the same dispatcher.
///
/// **What is promised.** A connection is given to the application of at most one worker, and is never lost before that
/// worker has adopted it, whatever dies, hangs, refuses or overflows, as long as the dispatcher lives. The dispatcher keeps a copy of each
/// connection until the answer; what a worker leaves unanswered goes to another one. A connection that was
/// adopted ends with its worker.
///
/// **How much.** Workers say how many connections they take. When none takes any, connections wait: in
/// [`serve`](Self::serve) in the kernel's backlog, not accepted.
///
/// When the last clone is dropped, it [drains](Self::drain) without a limit.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Socket, SocketKind, handoff::Dispatcher};
/// use tokio::net::{TcpListener, TcpStream};
///
/// let dispatcher = Dispatcher::builder().build();
/// let (here, there) = Socket::pair(SocketKind::SeqPacket)?;
/// dispatcher.add_worker(here); // `there` mostly belongs to another process
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
    _last: Arc<Last>,
}

/// What all tasks of a dispatcher share.
#[derive(Debug)]
struct Shared {
    config: Config,
    pool: Mutex<Pool>,
    changes: watch::Sender<()>,
    /// Whether children that are left over are to be killed.
    kill: watch::Sender<bool>,
    runtime: Handle,
}

impl Shared {
    fn lock(&self) -> Locked<'_> {
        Locked { shared: self, pool: Some(self.pool.lock().unwrap_or_else(|poisoned| poisoned.into_inner())) }
    }

    /// Wakes those who wait [until](Self::until) something is so. Said of all but single connections, and while it drains of these too.
    fn changed(&self) {
        self.changes.send_replace(());
    }

    async fn until(&self, mut condition: impl FnMut(&Pool) -> bool) {
        let mut changes = self.changes.subscribe();
        while !condition(&self.lock()) {
            let _ = changes.changed().await; // the sender is in `self`
        }
    }

    fn start_drain(self: &Arc<Self>, within: Option<Duration>) -> JoinHandle<()> {
        let (half, until) = (within.map(|within| after(within / 2)), within.map(after));
        self.lock().close(until);
        self.changed();
        let shared = Arc::clone(self);
        self.runtime.spawn(async move { shared.drain(half, until).await })
    }

    async fn drain(&self, half: Option<Instant>, until: Option<Instant>) {
        // First everything is handed over that was accepted. Workers that are full may not take it in time.
        at_most(half, self.until(Pool::is_settled)).await;
        {
            let mut pool = self.lock();
            pool.fail_waiting();
            let until = pool.until; // another drain may have been asked for since
            for id in Vec::from_iter(pool.workers.keys().copied()) {
                pool.remove(id, until);
            }
        }
        self.changed();
        self.until(|pool| pool.workers.is_empty()).await;
        at_most(until, self.until(|pool| pool.leftover == 0)).await;
        if self.config.kill_hung {
            self.kill.send_replace(true);
            self.until(|pool| pool.leftover == 0).await;
        }
        info!("the dispatcher has drained");
    }
}

/// The pool, locked. Connections that are given back wake those who wait for them and are logged, which runs the code of others: so
/// when it is unlocked.
struct Locked<'a> {
    shared: &'a Shared,
    /// `None` once it is unlocked.
    pool: Option<MutexGuard<'a, Pool>>,
}

impl Deref for Locked<'_> {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        self.pool.as_ref().expect("unlocked on drop only")
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Pool {
        self.pool.as_mut().expect("unlocked on drop only")
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let failed = std::mem::take(&mut self.failed);
        if failed.is_empty() {
            return;
        }
        let awaited = failed.iter().filter(|(job, _)| job.is_awaited()).count() as u64;
        self.totals.given_back += awaited;
        self.totals.lost += failed.len() as u64 - awaited;
        self.pool = None;
        // All are told before anything is logged, which may panic.
        let told = failed.into_iter().map(|(job, reason)| (reason.to_string(), job.fail(reason)));
        let told = Vec::from_iter(told);
        let given_back = told.iter().filter(|(_, given_back)| *given_back).count() as u64;
        if given_back < awaited {
            let mut pool = self.shared.lock(); // somebody has stopped waiting in this moment
            pool.totals.given_back -= awaited - given_back;
            pool.totals.lost += awaited - given_back;
        }
        for (reason, given_back) in told {
            match given_back {
                true => warn!(reason, "a connection was given back"),
                false => warn!(reason, "a connection was closed, which nobody was there to take back"),
            }
        }
    }
}

async fn at_most(until: Option<Instant>, future: impl Future<Output = ()>) {
    match until {
        Some(until) => drop(timeout_at(until, future).await),
        None => future.await,
    }
}

/// A worker is listed as long as its task lives, also where that panics in a subscriber of `tracing`: nobody waits for it then.
struct Listed {
    shared: Arc<Shared>,
    id: WorkerId,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.shared.lock().workers.remove(&self.id);
        self.shared.changed();
    }
}

/// Lives as long as any clone of the dispatcher.
#[derive(Debug)]
struct Last(Arc<Shared>);

impl Drop for Last {
    fn drop(&mut self) {
        let is_draining = self.0.lock().closed;
        if !is_draining {
            drop(self.0.start_drain(None));
        }
    }
}

impl Dispatcher {
    /// A dispatcher with settings of your own.
    pub fn builder() -> DispatcherBuilder {
        DispatcherBuilder::new()
    }

    fn new(config: Config) -> Self {
        let shared = Arc::new(Shared {
            pool: Mutex::new(Pool::new(config)),
            config,
            changes: watch::Sender::new(()),
            kill: watch::Sender::new(false),
            runtime: Handle::current(),
        });
        Self { _last: Arc::new(Last(Arc::clone(&shared))), shared }
    }

    /// Takes a worker that is at the other end of this socket. Until it says hello, it gets nothing.
    ///
    /// The death of a process that has connected is noticed by its pidfd. At the other end of a pair it is noticed by the
    /// end of the socket, which comes when no process has it open any more; see [`spawn_worker`](Self::spawn_worker).
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn add_worker(&self, socket: Socket) -> WorkerId {
        let id = self.shared.lock().add_worker();
        let process = Process::of_peer(&socket);
        let link = Link::new(Arc::clone(&self.shared), id, socket, process);
        let listed = Listed { shared: Arc::clone(&self.shared), id };
        tokio::spawn(async move {
            link.run().await;
            drop(listed);
        });
        id
    }

    /// Tells a worker to finish what it has, within this time, and waits until it has left. It gets no more connections, and
    /// is not started again. Returns whether there was such a worker.
    ///
    /// # Cancel safety
    /// It leaves also if this is dropped, once it was polled.
    pub async fn remove_worker(&self, id: WorkerId, within: Option<Duration>) -> bool {
        let until = within.map(after);
        let removed = self.shared.lock().remove(id, until);
        self.shared.changed();
        self.shared.until(|pool| !pool.workers.contains_key(&id)).await;
        removed
    }

    /// Hands a connection over, and begins at once: the future only waits for the outcome, which is the worker that has adopted
    /// it. As long as no worker has room, and also as long as there are no workers, the connection waits for one.
    ///
    /// # Errors
    /// [`DispatchError`], which brings the connection back: too many offers, or the dispatcher drains.
    ///
    /// # Cancel safety
    /// If the future is dropped, the connection is handed over all the same; should that fail, its client sees the end. To be
    /// able to stop before anything has begun, [`reserve`](Self::reserve) first.
    pub fn dispatch(&self, connection: impl Into<Accepted>) -> Dispatching {
        dispatch(&self.shared, connection.into(), false)
    }

    /// Waits until a worker has room for a connection, and keeps a place free for it: for those who have a connection only
    /// then, or may be cancelled.
    ///
    /// Places of a worker that leaves are gone with it; a connection dispatched with such a permit is the next to be offered.
    ///
    /// # Errors
    /// `None` when the dispatcher drains.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped; the place in the queue is.
    pub async fn reserve(&self) -> Option<Permit> {
        let granted = {
            let mut pool = self.shared.lock();
            if pool.try_reserve() {
                return Some(Permit { shared: Arc::clone(&self.shared), granted: true });
            }
            if pool.closed {
                return None;
            }
            let (waiter, granted) = oneshot::channel();
            pool.wait_for_place(waiter, Permit { shared: Arc::clone(&self.shared), granted: false });
            granted
        };
        granted.await.ok()
    }

    /// What it has done, and what its workers do.
    pub fn stats(&self) -> Stats {
        let pool = self.shared.lock();
        let totals = pool.totals;
        let workers = pool.workers.iter().map(|(id, worker)| {
            let link = worker.link.as_ref();
            WorkerStats {
                id: *id,
                pid: link.and_then(|link| link.pid),
                state: link.map_or(WorkerState::Restarting, |link| link.state),
                restarts: worker.restarts,
                left: worker.left.clone(),
                room: link.map_or(0, |link| link.room()),
                unanswered: link.map_or(0, |link| link.unanswered),
                active: link.map_or(0, |link| link.active()),
                adopted: worker.adopted,
                rejected: worker.rejected,
            }
        });
        Stats {
            workers: workers.collect(),
            dispatched: totals.dispatched,
            adopted: totals.adopted,
            offered_again: totals.offered_again,
            given_back: totals.given_back,
            lost: totals.lost,
            waiting: pool.waiting_connections(),
            retired: totals.retired,
        }
    }

    /// Ends it, for all clones: takes no more connections, hands over those that it has (for half of the time at most), has all
    /// workers finish what they have adopted, and waits until they have left. Those that have not after this time are cut off;
    /// [their processes](DispatcherBuilder::kill_hung) are killed if the dispatcher has started them.
    ///
    /// What is not handed over by then is given back.
    ///
    /// # Cancel safety
    /// Draining goes on if this is dropped, once it was polled. Call it again to wait, or to set another limit.
    pub async fn drain(&self, within: Option<Duration>) {
        let _ = self.shared.start_drain(within).await; // it does not panic
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn places_that_nobody_waits_for_any_more_do_not_pile_up() {
        let dispatcher = Dispatcher::builder().build();
        let first = dispatcher.reserve();
        let mut first = pin!(first);
        assert!(first.as_mut().now_or_never().is_none());
        for _ in 0..1000 {
            assert!(dispatcher.reserve().now_or_never().is_none());
        }
        assert!(dispatcher.shared.lock().waiting_in_all() <= 2);
        assert!(first.now_or_never().is_none());
    }
}
