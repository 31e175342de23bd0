//! The replacement of this dispatcher by another one, its successor.

use std::time::Instant;

use super::{Account, Drain, Event, Pool, ProcessId, ProcessInfo, Worker, WorkerId};
use crate::handoff::dispatcher::Group;

/// The description of a worker that can be moved, for the other dispatcher.
#[derive(Debug, Clone)]
pub(in crate::handoff::dispatcher) struct Movable {
    pub(in crate::handoff::dispatcher) id: WorkerId,
    pub(in crate::handoff::dispatcher) process: ProcessInfo,
    pub(in crate::handoff::dispatcher) program: Option<String>,
    pub(in crate::handoff::dispatcher) group: Group,
}

impl<C> Pool<C> {
    /// Returns the workers that can be moved to another dispatcher.
    pub(in crate::handoff::dispatcher) fn movable(&self) -> Vec<Movable> {
        let can_move = |worker: &Worker<C>, account: &Account<C>| {
            worker.removed.is_none() && worker.replacement.is_none() && account.may_move()
        };
        let movable = self.accounts().filter(|(_, worker, account)| can_move(worker, account));
        let describe = |(id, worker, account): (WorkerId, &Worker<C>, &Account<C>)| Movable {
            id,
            process: account.process,
            program: worker.program.clone(),
            group: worker.group.clone(),
        };
        movable.map(describe).collect()
    }

    /// Lets a successor replace this dispatcher. The successor gets all connections, as if it were
    /// a worker. Workers that have a new link move to it, and all others drain.
    pub(in crate::handoff::dispatcher) fn succeed(
        &mut self,
        successor: WorkerId,
        links: &[(WorkerId, ProcessId)],
        now: Instant,
    ) {
        self.roll_all_back(now);
        self.successor = Some(successor);
        let mut planned = Vec::new();
        for (id, worker) in self.workers.iter_mut().filter(|(id, _)| **id != successor) {
            let Some(account) = &mut worker.account else { continue };
            account.has_next_link = links.contains(&(*id, account.process.id));
            // Without any links, everything is given back to the dispatcher from which this one had
            // taken it. A worker that was taken over then gets its DRAIN or MOVE from there.
            let is_given_back = worker.is_taken && links.is_empty();
            planned.extend(if is_given_back { account.drain() } else { account.hand_on(now) });
            self.events.extend(account.must_wake().then_some(Event::Wake(*id)));
        }
        self.put_back(planned);
        self.distribute(now);
    }

    /// Returns true if a worker takes connections of this group. The successor takes those of all
    /// groups.
    pub(super) fn is_in(&self, group: &Group, id: WorkerId, worker: &Worker<C>) -> bool {
        worker.group == *group || self.successor == Some(id)
    }

    /// Notes that the process of a worker was taken over from another dispatcher.
    pub(in crate::handoff::dispatcher) fn take_worker(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.is_taken = true;
        }
    }

    /// Returns true if this dispatcher is responsible for the end of a worker's process. It is not
    /// if the worker has moved away, or if it was taken over and has not sent HELLO yet.
    pub(in crate::handoff::dispatcher) fn is_ours(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_some_and(|worker| worker.is_ours(self.is_succeeded()))
    }

    /// Returns true if a successor has replaced this dispatcher.
    pub(in crate::handoff::dispatcher) fn is_succeeded(&self) -> bool {
        self.successor.is_some()
    }

    /// Returns true if a worker needs its new link, to which it may not have moved yet.
    pub(in crate::handoff::dispatcher) fn needs_link(&self, id: WorkerId) -> bool {
        let account = self.workers.get(&id).and_then(|worker| worker.account.as_ref());
        account.is_some_and(|account| account.has_next_link)
    }

    /// Returns the workers that were sent a MOVE and whose links here are still open.
    pub(in crate::handoff::dispatcher) fn moved(&self) -> Vec<WorkerId> {
        let moved = self.accounts().filter(|(_, _, account)| account.has_moved());
        moved.map(|(id, ..)| id).collect()
    }

    /// Lets this dispatcher serve again, because its successor has failed. Of the workers that have
    /// moved, those with a new link move back, and the others drain. These are started again if
    /// their commands say so.
    pub(in crate::handoff::dispatcher) fn take_back(&mut self, links: &[WorkerId], now: Instant) {
        let Some(successor) = self.successor.take() else { return };
        for (id, worker) in &mut self.workers {
            let Some(account) = &mut worker.account else { continue };
            account.has_next_link = false;
            if !account.has_moved() {
                continue;
            }
            if links.contains(id) {
                account.move_away();
            } else {
                account.send_drain(Drain { until: None }, now);
            }
            self.events.extend(account.must_wake().then_some(Event::Wake(*id)));
        }
        self.remove(successor, None, now);
    }

    /// Opens a new account for a worker that has moved back and is about to send HELLO at its new
    /// link. The worker can adopt nothing more at the earlier link, so what is left there is put
    /// back into the queue.
    pub(in crate::handoff::dispatcher) fn relink(
        &mut self,
        id: WorkerId,
        unsent: usize,
        hello_by: Instant,
        now: Instant,
    ) {
        let Some(account) = self.account(id) else { return };
        let next = Account::new(account.process, hello_by, now);
        let remains = std::mem::replace(account, next).retire(unsent);
        self.totals.offered_again -= remains.repeated;
        let mut unanswered = remains.unanswered;
        unanswered.iter_mut().for_each(|pending| pending.on_unanswered(id, false));
        self.put_back(unanswered.into_iter().chain(remains.never_sent));
        self.distribute(now);
    }
}
