//! Which worker gets which connection: every decision of a dispatcher, as one value without I/O.
//!
//! The tasks tell the pool what happens ([`on_message`](Pool::on_message),
//! [`on_timeout`](Pool::on_timeout), [`retire`](Pool::retire)), send what
//! [`next_message`](Pool::next_message) returns, and act on its [events](Pool::take_events) when it
//! is unlocked. It has no clock: they bring the time along. `C` is a connection; the tests run the
//! same code on numbers.
//!
//! Each connection has one owner at any time. It waits in the [`Queue`] of its group, or it is in
//! the [`Account`] of one worker, or it has left in an [`Event`], or its copy is among the
//! [`StaleCopies`].

mod account;
mod choice;
mod clock;
mod end;
mod fences;
mod groups;
#[cfg(test)]
mod model;
mod numbers;
#[cfg(test)]
mod peer;
mod pending;
mod queue;
mod replacement;
mod stale;
#[cfg(test)]
mod succeeded;
mod successor;
#[cfg(test)]
mod tests;
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
pub(super) use numbers::Totals;
pub(super) use pending::Failure;
use pending::Pending;
#[cfg(doc)]
use queue::Queue;
pub(super) use queue::TicketId;
use queue::Waiter;
use replacement::Replacement;
pub(super) use replacement::{Outcome, Refusal, ReplacementId};
pub(super) use stale::StaleCopies;

use super::{Group, RetireCause, RetireCounts, WorkerExit, WorkerId, WorkerStats, builder::Config};
use crate::handoff::protocol::{FromWorker, RejectReason, ToWorker};

/// The number of a process that has, or had, a link. A worker that is started again is another
/// process.
pub(super) type ProcessId = u64;

/// The process at the other end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ProcessInfo {
    pub(super) id: ProcessId,
    pub(super) pid: Option<u32>,
    /// The dispatcher has started it.
    pub(super) is_child: bool,
}

/// A process whose link ends, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessState {
    /// It has ended, with this status if the dispatcher has started it.
    Ended(Option<ExitStatus>),
    /// It may live, and hold copies of what it was sent. Unless it has received all of that,
    /// descriptors may still be in flight.
    Lives { has_received: bool },
}

/// All workers of a dispatcher, and all connections that it has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Pool<C> {
    config: Config,
    workers: BTreeMap<WorkerId, Worker<C>>,
    groups: Groups<C>,
    phase: Phase,
    /// The time by which the drain is to be over that was asked for last.
    drain_until: Option<Instant>,
    /// The account of the dispatcher that has replaced this one, and gets all connections.
    successor: Option<WorkerId>,
    /// Workers that get nothing until they have answered, because a suspect has waited for too
    /// long: at most one in each group.
    kept_free: Vec<WorkerId>,
    pub(super) stale: StaleCopies<C>,
    leftovers: BTreeMap<ProcessId, Leftover>,
    /// The workers that have left for good most recently.
    departed: VecDeque<WorkerStats>,
    replacements: BTreeMap<ReplacementId, Replacement>,
    last_replacement: u64,
    fences: Fences,
    events: Vec<Event<C>>,
    /// The number of plans, by which workers take turns.
    plans: u64,
    last_worker: u64,
    pub(super) totals: Totals,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Phase {
    Open,
    /// Nothing is taken but with a permit.
    Draining,
    /// Nothing is taken.
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Worker<C> {
    group: Group,
    /// `None` until its process is started again.
    account: Option<Account<C>>,
    /// The program that the dispatcher has started.
    program: Option<String>,
    restarts: u64,
    adopted: u64,
    rejected: u64,
    retired: RetireCounts,
    last_exit: Option<WorkerExit>,
    /// Its process comes from another dispatcher.
    is_taken: bool,
    /// It is to drain, until that time if there is one.
    removed: Option<Option<Instant>>,
    /// It is one of the new workers of this replacement, which is not decided yet.
    replacement: Option<ReplacementId>,
    /// The number of the last plan for it.
    last_plan: u64,
}

/// A process that the dispatcher has started and that has not ended, though its link has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leftover {
    worker: WorkerId,
    pid: Option<u32>,
}

/// A step that a task takes once the pool is unlocked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Event<C> {
    /// There is something for a worker's task.
    Wake(WorkerId),
    /// A worker has adopted a connection. The dispatcher's copy goes to
    /// [`StaleCopies::keep`] if there are holders.
    Adopted { connection: C, worker: WorkerId, process: ProcessId, holders: Vec<ProcessId> },
    /// No worker adopts it.
    Failed { connection: C, failure: Failure },
    /// A place is kept in this group for whoever has this ticket. Without a group there is one in
    /// some group, and it is not kept.
    Granted { ticket: TicketId, group: Option<Group> },
    /// A worker hangs, and is fenced later because too many others were.
    FenceDeferred(WorkerId),
    /// The copy is of no use.
    Close(C),
    /// Something has changed that tasks or users may wait for.
    Changed,
    /// The process that served it has ended: so has the connection, whoever holds a copy.
    ShutDown(C),
}

impl<C> Worker<C> {
    /// Returns true if it is not told when it is to leave: the end of its socket tells it. It has
    /// not said hello, so it has nothing; or the dispatcher that it came from goes on with it.
    fn leaves_untold(&self, is_succeeded: bool) -> bool {
        self.account.as_ref().is_some_and(|account| {
            let is_given_back = is_succeeded && self.is_taken && !account.has_moved();
            !account.clock.is_greeted() || is_given_back
        })
    }

    /// Returns true if its process is this dispatcher's to end.
    fn is_ours(&self, is_succeeded: bool) -> bool {
        self.account.as_ref().is_some_and(|account| {
            !account.has_moved() && (!self.is_taken || !self.leaves_untold(is_succeeded))
        })
    }
}

impl<C> Pool<C> {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            workers: BTreeMap::new(),
            groups: Groups::default(),
            phase: Phase::Open,
            drain_until: None,
            successor: None,
            kept_free: Vec::new(),
            stale: StaleCopies::default(),
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

    /// Returns what is to be done since the last call.
    pub(super) fn take_events(&mut self) -> Vec<Event<C>> {
        std::mem::take(&mut self.events)
    }

    // Workers come and go.

    pub(super) fn add_worker(&mut self, group: Group, program: Option<String>) -> WorkerId {
        self.last_worker += 1;
        self.groups.get_mut(&group).workers += 1;
        let id = WorkerId(self.last_worker);
        // Workers that come while the dispatcher drains have nothing to do.
        let removed = (self.phase != Phase::Open).then_some(self.drain_until);
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

    /// A process of this worker is connected, and has to say hello by then.
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

    fn account(&mut self, id: WorkerId) -> Option<&mut Account<C>> {
        self.workers.get_mut(&id)?.account.as_mut()
    }

    fn accounts(&self) -> impl Iterator<Item = (WorkerId, &Worker<C>, &Account<C>)> {
        self.workers.iter().filter_map(|(id, worker)| Some((*id, worker, worker.account.as_ref()?)))
    }

    /// The worker gets nothing more, and has to finish what it has until then. Returns true if
    /// there is such a worker.
    pub(super) fn remove(&mut self, id: WorkerId, until: Option<Instant>, now: Instant) -> bool {
        let is_succeeded = self.is_succeeded();
        let Some(worker) = self.workers.get_mut(&id) else { return false };
        worker.removed = Some(until);
        let leaves_untold = worker.leaves_untold(is_succeeded);
        if let Some(account) = &mut worker.account {
            let planned = account.drain();
            // It leaves at its next timeout, which is now.
            let is_asleep = leaves_untold || account.tell_to_drain(until, now);
            self.events.extend(is_asleep.then_some(Event::Wake(id)));
            self.put_back(planned);
        }
        self.distribute(now);
        true
    }

    /// The worker is gone for good.
    pub(super) fn forget(&mut self, id: WorkerId, now: Instant) {
        self.on_new_gone(id, now);
        self.depart(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        if let Some(account) = worker.account {
            // Its task has panicked, and nobody can know whether it has adopted these.
            let Remains { unanswered, unseen, .. } = account.retire(0);
            self.events
                .extend(unanswered.into_iter().map(|pending| Event::Close(pending.connection)));
            self.put_back(unseen);
        }
        // It still counts, so that what waits for its group is given up if no worker is left.
        self.distribute(now);
        self.groups.get_mut(&worker.group).workers -= 1;
        self.groups.remove_unused();
    }

    pub(super) fn contains(&self, id: WorkerId) -> bool {
        self.workers.contains_key(&id)
    }

    pub(super) fn is_removed(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_none_or(|worker| worker.removed.is_some())
    }

    pub(super) fn has_no_workers(&self) -> bool {
        self.workers.is_empty()
    }

    // Messages to a worker, and from it.

    /// The next message for a worker, to be sent in this order. Its task is woken when there is
    /// another one after `None`.
    pub(super) fn next_message(&mut self, id: WorkerId, now: Instant) -> Option<ToWorker<&C, ()>> {
        let (message, is_repeated) =
            self.workers.get_mut(&id)?.account.as_mut()?.next_message(now)?;
        self.totals.offered_again += u64::from(is_repeated);
        Some(message)
    }

    /// A worker has sent a message. The last `unsent` offers have not been sent to it.
    ///
    /// # Errors
    /// The cause if it is to be retired.
    pub(super) fn on_message(
        &mut self,
        id: WorkerId,
        message: FromWorker,
        unsent: usize,
        now: Instant,
    ) -> Result<(), RetireCause> {
        let Some(worker) = self.workers.get_mut(&id) else { return Ok(()) };
        let Some(account) = &mut worker.account else { return Ok(()) };
        account.clock.on_received(now);
        match message {
            FromWorker::Hello { lowest, highest, max_fds, open } => {
                account.on_hello((lowest, highest), max_fds, open, now)?;
                let is_succeeded = self.successor.is_some_and(|successor| successor != id);
                if is_succeeded && worker.removed.is_none() {
                    account.hand_on(now);
                }
                if let Some(until) = worker.removed {
                    account.drain();
                    account.tell_to_drain(until, now);
                }
                if let Some(replacement) = worker.replacement {
                    self.on_new_ready(replacement, now);
                }
            }
            _ if !account.clock.is_greeted() => {
                return Err(RetireCause::Misbehaved("its first message is not a hello".into()));
            }
            FromWorker::Adopted { first, count } => {
                let adopted = account.on_adopted(first, count, unsent)?;
                self.adopted(id, adopted, now);
            }
            FromWorker::Rejected { first, count, reason } => {
                let rejected = account.on_rejected(first, count, unsent)?;
                let planned =
                    if reason.is_refusal() { account.on_refusal(now) } else { Vec::new() };
                self.rejected(id, rejected, reason, planned);
            }
            FromWorker::Draining => {
                let planned = account.drain();
                self.put_back(planned);
            }
            FromWorker::Goodbye => return Err(RetireCause::Drained),
            number => account.on_number(number)?,
        }
        self.distribute(now);
        Ok(())
    }

    /// A worker that is to be retired has sent this before it was fenced. A complete answer counts,
    /// whatever else it has sent.
    pub(super) fn on_last_message(
        &mut self,
        id: WorkerId,
        message: FromWorker,
        unsent: usize,
        now: Instant,
    ) {
        let Some(account) = self.account(id) else { return };
        match message {
            FromWorker::Adopted { first, count } => {
                let adopted = account.adopted_at_last(first, count, unsent);
                self.adopted(id, adopted, now);
            }
            FromWorker::Rejected { first, count, reason } => {
                let rejected = account.answered_at_last(first, count, unsent);
                self.rejected(id, rejected, reason, Vec::new());
            }
            _ => {}
        }
    }

    /// The messages that a worker has sent before it was fenced can't be read. It may have adopted
    /// everything that it was sent, so no other worker gets that.
    pub(super) fn on_unreadable(&mut self, id: WorkerId, unsent: usize, now: Instant) {
        let Some(account) = self.account(id) else { return };
        let adopted = account.adopt_all(unsent);
        self.adopted(id, adopted, now);
    }

    fn adopted(
        &mut self,
        id: WorkerId,
        adopted: impl IntoIterator<Item = Pending<C>>,
        now: Instant,
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(account) = &worker.account else { return };
        let process = account.process.id;
        for Pending { connection, since, holders, .. } in adopted {
            worker.adopted += 1;
            self.totals.adopted += 1;
            self.totals.adoption_times.record(now.saturating_duration_since(since));
            self.events.push(Event::Adopted { connection, worker: id, process, holders });
        }
    }

    fn rejected(
        &mut self,
        id: WorkerId,
        rejected: Vec<Pending<C>>,
        reason: RejectReason,
        planned: Vec<Pending<C>>,
    ) {
        let mut again = rejected;
        again.iter_mut().for_each(|pending| pending.on_rejected(id, reason));
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.rejected += again.len() as u64;
        }
        again.extend(planned);
        self.put_back(again);
    }

    // Time.

    /// Does what is due for a worker. `was_able` is false if nothing could be sent or received
    /// until now, through no fault of the worker.
    ///
    /// # Errors
    /// The cause if it is to be retired.
    pub(super) fn on_timeout(
        &mut self,
        id: WorkerId,
        was_able: bool,
        now: Instant,
    ) -> Result<(), RetireCause> {
        let is_succeeded = self.is_succeeded();
        let Self { config, workers, fences, .. } = self;
        let Some(worker) = workers.get_mut(&id) else { return Ok(()) };
        if worker.removed.is_some() && worker.leaves_untold(is_succeeded) {
            return Err(RetireCause::Drained);
        }
        let Some(account) = &mut worker.account else { return Ok(()) };
        if !was_able {
            account.clock.excuse(now);
        }
        let (is_child, mut is_deferred) = (account.process.is_child, false);
        account.on_timeout(now, config, || {
            let may = fences.may_fence(is_child, config, now);
            is_deferred = !may;
            may
        })?;
        let planned = account.take_back_if_silent();
        self.events.extend(is_deferred.then_some(Event::FenceDeferred(id)));
        self.put_back(planned);
        self.distribute(now);
        Ok(())
    }

    /// The next time when [`on_timeout`](Self::on_timeout) has something to do.
    pub(super) fn next_timeout(&self, id: WorkerId) -> Option<Instant> {
        self.workers.get(&id)?.account.as_ref()?.next_timeout(&self.config)
    }
}
