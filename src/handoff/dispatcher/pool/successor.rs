//! Another dispatcher that goes on in the place of this one.

use std::time::Instant;

use super::{Account, Event, Pool, ProcessId, ProcessInfo, Worker, WorkerId};
use crate::handoff::dispatcher::Group;

/// A worker that can be moved, as another dispatcher has to know it.
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
        let stays = |worker: &Worker<C>, account: &Account<C>| {
            worker.removed.is_none() && worker.replacement.is_none() && account.may_move()
        };
        let movable = self.accounts().filter(|(_, worker, account)| stays(worker, account));
        let describe = |(id, worker, account): (WorkerId, &Worker<C>, &Account<C>)| Movable {
            id,
            process: account.process,
            program: worker.program.clone(),
            group: worker.group.clone(),
        };
        movable.map(describe).collect()
    }

    /// Another dispatcher goes on in the place of this one. It takes all connections, as if it were
    /// a worker. Those workers for which there is a new link move to it, and the others leave.
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
            // If everything is given back, the successor tells its workers.
            planned.extend(match worker.is_taken && links.is_empty() {
                true => account.drain(),
                false => account.hand_on(now),
            });
            self.events.extend(account.wake().then_some(Event::Wake(*id)));
        }
        self.put_back(planned);
        self.distribute(now);
    }

    /// Returns true if a worker takes connections of this group. The successor takes all.
    pub(super) fn is_in(&self, group: &Group, id: WorkerId, worker: &Worker<C>) -> bool {
        worker.group == *group || self.successor == Some(id)
    }

    /// The process of a worker comes from another dispatcher.
    pub(in crate::handoff::dispatcher) fn take_worker(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.is_taken = true;
        }
    }

    /// Returns true if the process of a worker is this dispatcher's to end. It is not if another
    /// dispatcher goes on with it, or if it comes from another one and has not said hello.
    pub(in crate::handoff::dispatcher) fn is_ours(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_some_and(|worker| worker.is_ours(self.is_succeeded()))
    }

    /// Returns true if another dispatcher goes on in the place of this one.
    pub(in crate::handoff::dispatcher) fn is_succeeded(&self) -> bool {
        self.successor.is_some()
    }

    /// Returns true if a worker has not gone on at its new link yet.
    pub(in crate::handoff::dispatcher) fn needs_link(&self, id: WorkerId) -> bool {
        let account = self.workers.get(&id).and_then(|worker| worker.account.as_ref());
        account.is_some_and(|account| account.has_next_link)
    }

    /// Returns the workers that have moved, and whose links here are open.
    pub(in crate::handoff::dispatcher) fn moved(&self) -> Vec<WorkerId> {
        let moved = self.accounts().filter(|(_, _, account)| account.has_moved());
        moved.map(|(id, ..)| id).collect()
    }

    /// This dispatcher goes on after all. Workers for which there is a new link move back; the
    /// others leave, and are started again if they are to be.
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
                account.tell_to_drain(None, now);
            }
            self.events.extend(account.wake().then_some(Event::Wake(*id)));
        }
        self.remove(successor, None, now);
    }

    /// A worker that has moved back is about to say hello at its new link. It can adopt nothing
    /// more at the one before.
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
        self.put_back(unanswered.into_iter().chain(remains.unseen));
        self.distribute(now);
    }
}
