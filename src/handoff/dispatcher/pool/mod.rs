//! The choice of a worker for each connection: every decision of a dispatcher, as one value without
//! I/O.
//!
//! The tasks report to the pool what happens ([`on_message`](Pool::on_message),
//! [`on_timeout`](Pool::on_timeout), [`retire`](Pool::retire)), and send what
//! [`next_message`](Pool::next_message) returns. After they have unlocked the pool, they act on its
//! [events](Pool::take_events). The pool has no clock, so each call gets the current time. `C` is a
//! connection; the tests run the same code on numbers.
//!
//! Each connection has exactly one owner at any time. It waits in the [`Queue`] of its group, or it
//! is in the [`Account`] of one worker, or it has left in an [`Event`], or its copy is among the
//! [`KeptCopies`].
//!
//! The words of the protocol are explained [above](crate::handoff). The pool adds these:
//!
//! | word | meaning |
//! |---|---|
//! | plan | to choose a worker for a connection; until its offer is made, the worker can still be changed |
//! | made | an offer is made when the worker's task has taken it from the pool |
//! | unsent | the last offers that were made, and that the task has not sent to the worker yet |
//! | pending | (of an account) planned, or offered and not answered; [`Pending`] is any connection that no worker has adopted |
//! | slot | room at a worker for one connection; a group's reserved slots are kept for callers |
//! | ticket | the place in a queue of a caller that waits for a slot, and has no connection yet |
//! | failure | an offer after which the worker was gone, or could not use the connection |
//! | suspect | a connection that may crash its workers, and has one attempt left |
//! | holder | the process of a fenced worker that may still hold a copy of a connection |
//! | silent | late with its answer to a ping; the worker gets nothing until it answers |

mod account;
mod choice;
mod end;
mod fences;
mod groups;
mod kept;
mod messages;
#[cfg(test)]
mod model;
mod numbers;
mod offers;
#[cfg(test)]
mod peer;
mod pending;
mod queue;
mod replacement;
#[cfg(test)]
mod succeeded;
mod successor;
#[cfg(test)]
mod tests;
mod timeouts;
#[cfg(test)]
mod world;

use std::{
    collections::{BTreeMap, VecDeque},
    process::ExitStatus,
    time::Instant,
};

use account::{Account, Remains};
pub(super) use choice::Admission;
use fences::Fences;
use groups::Groups;
use kept::KeptCopies;
pub(super) use numbers::Totals;
use pending::Pending;
pub(super) use pending::{GiveUpReason, Needs};
#[cfg(doc)]
use queue::Queue;
pub(super) use queue::TicketId;
use queue::Waiter;
use replacement::Replacement;
pub(super) use replacement::{Outcome, Refusal, ReplacementId};
use timeouts::Drain;

use super::{Group, RetireCause, RetireCounts, WorkerExit, WorkerId, WorkerStats, builder::Config};

/// The number of a process that has, or had, a link. A worker that is started again has a new
/// process, and so a new number.
pub(super) type ProcessId = u64;

/// The process at the other end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ProcessInfo {
    pub(super) id: ProcessId,
    pub(super) pid: Option<u32>,
    /// The dispatcher has started this process.
    pub(super) is_child: bool,
}

/// The known state of a process whose link ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessState {
    /// The process has ended, with this status if the dispatcher has started it.
    Ended(Option<ExitStatus>),
    /// The process may live, and may hold copies of what it was sent. Unless it has received
    /// everything, descriptors may still be in flight to it.
    Lives { has_received: bool },
}

/// All workers of a dispatcher, and all connections that it has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Pool<C> {
    config: Config,
    workers: BTreeMap<WorkerId, Worker<C>>,
    groups: Groups<C>,
    phase: PoolPhase,
    /// The deadline of the latest [drain](Pool::drain).
    drain_until: Option<Instant>,
    /// The account of the dispatcher that has replaced this one, and gets all connections.
    successor: Option<WorkerId>,
    /// Workers for which nothing is planned at present, so that they become free for a suspect that
    /// has waited too long. At most one in each group, chosen anew each time.
    kept_free: Vec<WorkerId>,
    pub(super) kept: KeptCopies<C>,
    /// Started processes that have not ended although their links have.
    leftovers: BTreeMap<ProcessId, Leftover>,
    /// The workers that have left for good most recently.
    departed: VecDeque<WorkerStats>,
    replacements: BTreeMap<ReplacementId, Replacement>,
    last_replacement: u64,
    fences: Fences,
    /// Events that [`take_events`](Self::take_events) has not returned yet.
    events: Vec<Event<C>>,
    /// The number of plans made so far. Workers take turns by the number of their last plan.
    plans: u64,
    last_worker: u64,
    pub(super) totals: Totals,
}

/// The phases of a dispatcher, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum PoolPhase {
    Open,
    /// Only connections with an [`Admission`] other than `None` are taken.
    Draining,
    /// No connection is taken.
    Closed,
}

/// A worker, with the account of its present link.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Worker<C> {
    group: Group,
    /// `None` while no process of the worker is connected.
    account: Option<Account<C>>,
    /// The program of the worker, if the dispatcher has started it.
    program: Option<String>,
    restarts: u64,
    adopted: u64,
    rejected: u64,
    retired: RetireCounts,
    last_exit: Option<WorkerExit>,
    /// The process of the worker was taken over from another dispatcher.
    is_taken: bool,
    /// `Some` if the worker has to drain and leave.
    removed: Option<Drain>,
    /// The undecided replacement of which this worker is a new worker.
    replacement: Option<ReplacementId>,
    /// The number of the last plan for this worker. Compared with those of other workers.
    last_plan: u64,
}

/// A process that the dispatcher has started and that has not ended, though its link has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leftover {
    worker: WorkerId,
    pid: Option<u32>,
}

/// A step for a task to take after it has unlocked the pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Event<C> {
    /// The task of this worker has something to do.
    Wake(WorkerId),
    /// A worker has adopted a connection. The dispatcher's copy goes to
    /// [`KeptCopies::keep`] if there are holders.
    Adopted { connection: C, worker: WorkerId, process: ProcessId, holders: Vec<ProcessId> },
    /// The dispatcher has given up this connection.
    GivenUp { connection: C, reason: GiveUpReason },
    /// A worker has room for the caller with this ticket. With a group, a slot there is reserved
    /// for the caller. Without one, some group has a slot, which is not reserved.
    Granted { ticket: TicketId, group: Option<Group> },
    /// A worker is hung. Fencing it is deferred, because too many workers were fenced recently.
    FenceDeferred(WorkerId),
    /// This copy of a connection is no longer needed, and has to be closed.
    Close(C),
    /// Something has changed that tasks or callers may wait for.
    Changed,
    /// The process that served this connection has ended. So the connection has to be shut down,
    /// even if other processes hold copies.
    ShutDown(C),
}

impl<C> Worker<C> {
    /// Returns true if the worker gets no DRAIN when it has to leave: its link just ends. That is
    /// so if it has not sent HELLO and so has no connections, or if it is given back to the
    /// dispatcher from which it was taken over.
    fn leaves_without_drain(&self, is_succeeded: bool) -> bool {
        self.account.as_ref().is_some_and(|account| {
            let is_given_back = is_succeeded && self.is_taken && !account.has_moved();
            !account.timeouts.is_greeted() || is_given_back
        })
    }

    /// Returns true if this dispatcher is responsible for the end of the worker's process.
    fn is_ours(&self, is_succeeded: bool) -> bool {
        self.account.as_ref().is_some_and(|account| {
            !account.has_moved() && (!self.is_taken || !self.leaves_without_drain(is_succeeded))
        })
    }
}

impl<C> Pool<C> {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            workers: BTreeMap::new(),
            groups: Groups::default(),
            phase: PoolPhase::Open,
            drain_until: None,
            successor: None,
            kept_free: Vec::new(),
            kept: KeptCopies::default(),
            leftovers: BTreeMap::new(),
            departed: VecDeque::new(),
            replacements: BTreeMap::new(),
            last_replacement: 0,
            fences: Fences::default(),
            events: Vec::new(),
            plans: 0,
            last_worker: 0,
            totals: Totals::default(),
        }
    }

    /// Takes out the events since the last call.
    pub(super) fn take_events(&mut self) -> Vec<Event<C>> {
        std::mem::take(&mut self.events)
    }

    // Adding and removing workers.

    /// Adds a worker that is not connected yet.
    pub(super) fn add_worker(&mut self, group: Group, program: Option<String>) -> WorkerId {
        self.last_worker += 1;
        self.groups.get_mut(&group).workers += 1;
        let id = WorkerId(self.last_worker);
        // A worker that comes while the dispatcher drains has to leave at once.
        let removed = (self.phase != PoolPhase::Open).then_some(Drain { until: self.drain_until });
        let worker = Worker {
            group,
            account: None,
            program,
            restarts: 0,
            adopted: 0,
            rejected: 0,
            retired: RetireCounts::default(),
            last_exit: None,
            is_taken: false,
            removed,
            replacement: None,
            last_plan: 0,
        };
        self.workers.insert(id, worker);
        id
    }

    /// Opens the account of a worker's process, which is connected now and has to send HELLO by
    /// `hello_by`.
    pub(super) fn connect(
        &mut self,
        id: WorkerId,
        process: ProcessInfo,
        hello_by: Instant,
        now: Instant,
    ) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.restarts += u64::from(worker.last_exit.is_some());
            let mut account = Account::new(process, hello_by, now);
            account.is_held_back = worker.replacement.is_some();
            worker.account = Some(account);
            worker.is_taken = false;
        }
    }

    /// Returns the account of a worker, if a process of it is connected.
    fn account(&mut self, id: WorkerId) -> Option<&mut Account<C>> {
        self.workers.get_mut(&id)?.account.as_mut()
    }

    fn accounts(&self) -> impl Iterator<Item = (WorkerId, &Worker<C>, &Account<C>)> {
        self.workers.iter().filter_map(|(id, worker)| Some((*id, worker, worker.account.as_ref()?)))
    }

    /// Drains a worker, which has to finish its connections by `until` and then leaves for good.
    /// Returns false if there is no such worker.
    pub(super) fn remove(&mut self, id: WorkerId, until: Option<Instant>, now: Instant) -> bool {
        let is_succeeded = self.is_succeeded();
        let Some(worker) = self.workers.get_mut(&id) else { return false };
        let drain = Drain { until };
        worker.removed = Some(drain);
        let leaves_without_drain = worker.leaves_without_drain(is_succeeded);
        if let Some(account) = &mut worker.account {
            let planned = account.drain();
            // A worker that gets no DRAIN is retired by `on_timeout`, which its woken task calls.
            let must_wake = leaves_without_drain || account.send_drain(drain, now);
            self.events.extend(must_wake.then_some(Event::Wake(id)));
            self.put_back(planned);
        }
        self.distribute(now);
        true
    }

    /// Forgets a worker that has left for good.
    pub(super) fn forget(&mut self, id: WorkerId, now: Instant) {
        self.on_new_gone(id, now);
        self.depart(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        if let Some(account) = worker.account {
            // The account is still open only if the worker's task has panicked. The worker may have
            // adopted the offers that it was sent, so no other worker gets these.
            let Remains { unanswered, never_sent, .. } = account.retire(0);
            self.events
                .extend(unanswered.into_iter().map(|pending| Event::Close(pending.connection)));
            self.put_back(never_sent);
        }
        // The worker still counts here, so that its group is served once more. Connections that no
        // worker is left for are given up then.
        self.distribute(now);
        self.groups.get_mut(&worker.group).workers -= 1;
        self.groups.remove_unused();
    }

    pub(super) fn contains(&self, id: WorkerId) -> bool {
        self.workers.contains_key(&id)
    }

    /// Returns true if a worker has to leave, or has left.
    pub(super) fn is_removed(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_none_or(|worker| worker.removed.is_some())
    }

    pub(super) fn has_no_workers(&self) -> bool {
        self.workers.is_empty()
    }

    // Timeouts.

    /// Does what is due for a worker. `was_able` is false if nothing could be sent or received
    /// until now, through no fault of the worker.
    ///
    /// # Errors
    /// Returns the cause if the worker has to be retired.
    pub(super) fn on_timeout(
        &mut self,
        id: WorkerId,
        was_able: bool,
        now: Instant,
    ) -> Result<(), RetireCause> {
        let is_succeeded = self.is_succeeded();
        let Self { config, workers, fences, .. } = self;
        let Some(worker) = workers.get_mut(&id) else { return Ok(()) };
        if worker.removed.is_some() && worker.leaves_without_drain(is_succeeded) {
            return Err(RetireCause::Drained);
        }
        let Some(account) = &mut worker.account else { return Ok(()) };
        if !was_able {
            account.timeouts.excuse(now);
        }
        // The closure is called only if the worker is hung.
        let (is_child, mut is_deferred) = (account.process.is_child, false);
        account.on_timeout(now, config, || {
            let may = fences.may_fence(is_child, config, now);
            is_deferred = !may;
            may
        })?;
        // Others get what was planned for a worker that does not answer.
        let planned = account.take_back_if_silent();
        self.events.extend(is_deferred.then_some(Event::FenceDeferred(id)));
        self.put_back(planned);
        self.distribute(now);
        Ok(())
    }

    /// Returns the next time at which [`on_timeout`](Self::on_timeout) has something to do.
    pub(super) fn next_timeout(&self, id: WorkerId) -> Option<Instant> {
        self.workers.get(&id)?.account.as_ref()?.next_timeout(&self.config)
    }
}
