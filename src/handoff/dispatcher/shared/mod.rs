//! The pool, its lock, and the actions that follow from its decisions.

mod drain;
mod slot;
mod source;
mod worker_entry;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    process::ExitStatus,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
};
use tracing::{debug, info, warn};

use super::{
    Config, DispatchError, Group, NotDispatched, RetireCause, Stats, WorkerId,
    handover::{Copies, Handover, shut_down},
    joint_task::JointTask,
    pauses::Pauses,
    pool::{Admission, Event, GiveUpReason, Pool, ProcessId, TicketId},
    processes::Processes,
    task_signal::TaskSignal,
};
use crate::Socket;
pub(super) use slot::Slot;
pub(super) use source::Source;
pub(super) use worker_entry::WorkerEntryGuard;

/// Everything that the tasks of a dispatcher share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: Config,
    pool: Mutex<Pool<Box<Handover>>>,
    processes: Mutex<Processes>,
    /// The signals that wake the workers' tasks.
    signals: Mutex<HashMap<WorkerId, Arc<TaskSignal>>>,
    pub(super) new_links: Mutex<NewLinks>,
    /// Callers that wait for a slot. May be locked while the pool is locked, never the other way
    /// around.
    callers: Mutex<HashMap<TicketId, oneshot::Sender<Slot>>>,
    changes: watch::Sender<()>,
    pub(super) pauses: Pauses,
    given_back: AtomicU64,
    lost: AtomicU64,
    /// True if it was logged that connections are closed because too many wait for their group.
    pub(super) has_warned_of_crowd: AtomicBool,
    /// True if it was logged that a connection is closed because it cannot be offered.
    has_warned_of_unsendable: AtomicBool,
    /// The number of [`Source`]s.
    sources: AtomicUsize,
    /// True if processes of retired workers have to be killed now.
    pub(super) kill: watch::Sender<bool>,
    pub(super) runtime: Handle,
    /// Runs the links of the workers, and the accept loops.
    pub(super) tasks: JointTask,
}

/// The new links of workers that move, until the workers' tasks take them.
#[derive(Debug, Default)]
pub(super) struct NewLinks {
    /// The workers' ends.
    pub(super) theirs: HashMap<WorkerId, OwnedFd>,
    /// This dispatcher's ends, for workers that it takes back.
    pub(super) ours: HashMap<WorkerId, Socket>,
}

impl NewLinks {
    /// Takes the ends of one worker's new link: the worker's, and this dispatcher's.
    pub(super) fn remove(&mut self, id: WorkerId) -> (Option<OwnedFd>, Option<Socket>) {
        (self.theirs.remove(&id), self.ours.remove(&id))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(config: Config) -> Arc<Self> {
        let runtime = Handle::current();
        Arc::new(Self {
            config,
            pool: Mutex::new(Pool::new(config)),
            processes: Mutex::default(),
            signals: Mutex::default(),
            new_links: Mutex::default(),
            callers: Mutex::default(),
            changes: watch::Sender::new(()),
            pauses: Pauses::default(),
            given_back: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            has_warned_of_crowd: AtomicBool::new(false),
            has_warned_of_unsendable: AtomicBool::new(false),
            sources: AtomicUsize::new(0),
            kill: watch::Sender::new(false),
            tasks: JointTask::spawn(&runtime),
            runtime,
        })
    }

    /// Locks the pool, calls a function with it, unlocks it, and then acts on its events.
    pub(super) fn with_pool<T>(
        self: &Arc<Self>,
        call: impl FnOnce(&mut Pool<Box<Handover>>) -> T,
    ) -> T {
        let (outcome, events, drains) = {
            let mut pool = lock(&self.pool);
            let outcome = call(&mut pool);
            (outcome, pool.take_events(), !pool.is_open())
        };
        if !events.is_empty() {
            self.handle(events);
            if drains {
                self.changed(); // the drain may wait for the last connection
            }
        }
        outcome
    }

    /// Acts on the pool's events. Nothing is locked, because wakers and subscribers of `tracing`
    /// are foreign code.
    fn handle(self: &Arc<Self>, events: Vec<Event<Box<Handover>>>) {
        let (mut given_up, mut useless) = (Vec::new(), Copies::new());
        for event in events {
            match event {
                Event::Wake(id) => {
                    let signal = lock(&self.signals).get(&id).cloned();
                    signal.into_iter().for_each(|signal| signal.set());
                }
                Event::Adopted { mut connection, worker, process, holders } => {
                    connection.adopted_by(worker);
                    if holders.is_empty() {
                        useless.extend(connection.into_copies());
                    } else {
                        self.with_pool(|pool| pool.keep(connection, process, holders));
                    }
                }
                Event::GivenUp { connection, reason } => given_up.push((connection, reason)),
                Event::Granted { ticket, group } => {
                    let caller = lock(&self.callers).remove(&ticket);
                    let slot = Slot::new(self, group);
                    // If nobody waits, dropping the slot frees it.
                    drop(caller.map(|caller| caller.send(slot)));
                }
                Event::FenceDeferred(id) => {
                    warn!(
                        worker = %id,
                        "worker is hung, but too many were fenced recently; leaving it alone"
                    );
                }
                Event::Changed => self.changed(),
                Event::Close(connection) => useless.extend(connection.into_copies()),
                Event::ShutDown(connection) => connection.shut_down(),
            }
        }
        useless.close();
        self.give_back(given_up);
    }

    fn give_back(&self, given_up: Vec<(Box<Handover>, GiveUpReason)>) {
        // All callers get their connections back before anything is logged, because logging may
        // panic.
        let outcomes = Vec::from_iter(given_up.into_iter().map(|(connection, reason)| {
            let reason = match reason {
                GiveUpReason::TooManyOffers { offers, last } => {
                    NotDispatched::TooManyOffers { offers, last }
                }
                GiveUpReason::Draining => NotDispatched::Draining,
            };
            // Count it before the caller gets it, because the caller may look at the numbers then.
            let was_awaited = connection.is_awaited();
            let count = if was_awaited { &self.given_back } else { &self.lost };
            count.fetch_add(1, Relaxed);
            let (text, is_given_back) = (reason.to_string(), connection.fail(reason));
            if was_awaited && !is_given_back {
                self.given_back.fetch_sub(1, Relaxed);
                self.lost.fetch_add(1, Relaxed);
            }
            (text, is_given_back)
        }));
        for (reason, is_given_back) in outcomes {
            if is_given_back {
                warn!(reason, "connection given back: no worker adopted it");
            } else {
                warn!(
                    reason,
                    "connection closed: no worker adopted it and nobody was waiting for it"
                );
            }
        }
    }

    /// Counts a connection that was closed because it could not be offered to any worker.
    pub(super) fn count_lost(self: &Arc<Self>) {
        self.with_pool(|pool| pool.totals.dispatched += 1);
        self.lost.fetch_add(1, Relaxed);
    }

    /// Closes and counts an accepted connection that cannot be offered to any worker.
    pub(super) fn refuse_unsendable(self: &Arc<Self>, unsendable: DispatchError) {
        let DispatchError { reason, connection } = unsendable;
        connection.socket.into_iter().for_each(shut_down);
        self.count_lost();
        // Clients may cause many of these, so only the first one is logged as a warning.
        if !self.has_warned_of_unsendable.swap(true, Relaxed) {
            warn!(error = %reason, "connection closed: it cannot be offered to a worker");
        }
        debug!(error = %reason, "connection closed: it cannot be offered to a worker");
    }

    // Processes, tasks, and callers that wait for a slot.

    pub(super) fn processes(&self) -> MutexGuard<'_, Processes> {
        lock(&self.processes)
    }

    pub(super) fn process_ended(self: &Arc<Self>, process: ProcessId, status: Option<ExitStatus>) {
        self.with_pool(|pool| pool.on_process_end(process, status));
        self.changed();
    }

    pub(super) fn add_signal(&self, id: WorkerId, signal: Arc<TaskSignal>) {
        lock(&self.signals).insert(id, signal);
    }

    /// Hands a connection over to its group, or to `default` if it names none.
    pub(super) fn dispatch(
        self: &Arc<Self>,
        mut connection: Box<Handover>,
        default: &Group,
        admission: Admission,
    ) {
        let needs = connection.needs(default);
        connection.set_group(needs.group.clone());
        self.with_pool(|pool| pool.dispatch(connection, needs, admission, Instant::now()));
    }

    /// Returns a free slot in a group, or else a ticket of its queue. Without a group, the slot may
    /// be in any group and is not kept. `None` if the dispatcher drains.
    pub(super) fn wait_for_slot(
        self: &Arc<Self>,
        group: Option<&Group>,
    ) -> Option<Result<Slot, (TicketId, oneshot::Receiver<Slot>)>> {
        self.with_pool(|pool| {
            let has_slot = match group {
                Some(group) => pool.try_reserve(group),
                None => pool.has_slot(),
            };
            if has_slot {
                return Some(Ok(Slot::new(self, group.cloned())));
            }
            pool.is_open().then(|| {
                let (caller, granted) = oneshot::channel();
                let ticket = pool.wait_for_slot(group, Instant::now());
                lock(&self.callers).insert(ticket, caller);
                Err((ticket, granted))
            })
        })
    }

    /// Returns the right of a connection to be dispatched without a slot. `None` once a drain hands
    /// nothing more over.
    pub(super) fn admit_until_closed(self: &Arc<Self>) -> Option<Slot> {
        let is_closed = self.with_pool(|pool| pool.is_closed());
        (!is_closed).then(|| Slot::new(self, None))
    }

    pub(super) fn stop_waiting(self: &Arc<Self>, group: Option<&Group>, ticket: TicketId) {
        self.with_pool(|pool| pool.cancel(group, ticket, Instant::now()));
        let caller = lock(&self.callers).remove(&ticket);
        drop(caller); // after the unlock, because this wakes a task
    }

    /// Wakes every [`until`](Self::until) waiter. Called after any change except those of a single
    /// connection; while draining, after those too.
    pub(super) fn changed(&self) {
        self.changes.send_replace(());
    }

    pub(super) async fn until(&self, mut condition: impl FnMut(&Pool<Box<Handover>>) -> bool) {
        let mut changes = self.changes.subscribe();
        while !condition(&lock(&self.pool)) {
            let _ = changes.changed().await; // the sender is in `self`
        }
    }

    pub(super) fn stats(&self) -> Stats {
        let pool = lock(&self.pool);
        let (totals, now) = (pool.totals, Instant::now());
        let (accept_pauses, accept_paused_for) = self.pauses.stats(now);
        Stats {
            groups: pool.groups(now).collect(),
            workers: pool.workers().collect(),
            dispatched: totals.dispatched,
            adopted: totals.adopted,
            offered_again: totals.offered_again,
            given_back: self.given_back.load(Relaxed),
            lost: self.lost.load(Relaxed),
            waiting: pool.waiting(),
            in_flight: pool.in_flight(),
            send_shortages: totals.send_shortages,
            leftover: pool.leftover(),
            retired: totals.retired,
            refused_workers: totals.refused_workers,
            departed: pool.departed().cloned().collect(),
            adoption_times: totals.adoption_times,
            slot_wait: pool.slot_wait(now),
            accept_pauses,
            accept_paused_for,
        }
    }

    /// Logs that a worker has left, and why.
    pub(super) fn log_exit(&self, id: WorkerId) {
        let worker = lock(&self.pool).worker(id);
        let Some((program, exit)) =
            worker.and_then(|worker| Some((worker.program, worker.last_exit?)))
        else {
            return;
        };
        let (pid, unanswered) = (exit.pid, exit.unanswered);
        match exit.cause {
            RetireCause::Drained => info!(worker = %id, program, pid, "worker has drained"),
            _ => warn!(worker = %id, program, pid, unanswered, "worker is gone: {exit}"),
        }
    }
}
