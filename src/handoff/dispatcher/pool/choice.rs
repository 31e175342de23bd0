//! The choice of a worker for each connection, and of the connections that wait.

use std::time::Instant;

use super::{
    Account, Event, GiveUpReason, Needs, Pending, Pool, PoolPhase, TicketId, Waiter, Worker,
};
use crate::handoff::dispatcher::{Group, Strategy, WorkerId, key::order_of};

/// The choices for a connection.
enum Choice {
    /// Offer the connection to this worker.
    Plan(WorkerId),
    /// Wait until a worker has room for the connection.
    Wait,
    /// Stop offering the connection, because all workers have failed with it.
    GiveUp,
}

/// The number of failures beyond `max_offers` after which only workers that have adopted something
/// count as able to take a connection, unless the dispatcher has started them.
const FAILURES_BEFORE_DISTRUST: u32 = 32;

/// The right of a connection to be taken while the dispatcher drains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::handoff::dispatcher) enum Admission {
    /// The connection has no such right.
    None,
    /// The connection is taken until the pool is closed. It has no slot.
    UntilClosed,
    /// The connection has a reserved slot in this group.
    Reserved(Group),
}

impl<C> Pool<C> {
    /// Takes a connection for its group.
    pub(in crate::handoff::dispatcher) fn dispatch(
        &mut self,
        connection: C,
        needs: Needs,
        admission: Admission,
        now: Instant,
    ) {
        // The connection uses up its reservation, even if it is not taken.
        self.totals.dispatched += 1;
        if let Admission::Reserved(group) = &admission {
            self.groups.get_mut(group).reserved -= 1;
        }
        let is_taken = match self.phase {
            PoolPhase::Open => true,
            PoolPhase::Draining => admission != Admission::None,
            PoolPhase::Closed => false,
        };
        if !is_taken {
            return self.events.push(Event::GivenUp { connection, reason: GiveUpReason::Draining });
        }
        // A slot in another group is of no use. Without one in its own, the connection waits behind
        // all others.
        let has_slot = admission == Admission::Reserved(needs.group.clone());
        let pending = Pending::new(connection, needs, now);
        if !has_slot {
            self.groups.push_back(pending);
            return self.distribute(now);
        }
        // The slot may be gone with its worker. In that case the connection is the first to wait.
        match self.choose(&pending) {
            Choice::Plan(id) => self.plan(id, pending),
            _ => {
                self.groups.push_front(pending);
                self.distribute(now); // if no worker can take it, others can use the slot
            }
        }
    }

    /// Reserves a slot in a group, if one is free and nothing waits in the group's queue. Returns
    /// true if it did.
    pub(in crate::handoff::dispatcher) fn try_reserve(&mut self, group: &Group) -> bool {
        let nobody_waits = self.groups.get(group).is_some_and(|group| group.queue.is_empty());
        let is_free = self.is_open() && nobody_waits && self.free_slots(group) > 0;
        if is_free {
            self.groups.get_mut(group).reserved += 1;
        }
        is_free
    }

    /// Returns true if any group has a free slot.
    pub(in crate::handoff::dispatcher) fn has_slot(&self) -> bool {
        self.is_open() && self.groups.iter().any(|(group, _)| self.free_slots(group) > 0)
    }

    /// Adds a caller to the queue of a group, to wait for a slot there. [`Event::Granted`] reports
    /// the slot, which is reserved. Without a group, the caller waits for a slot in any group, and
    /// the slot is not reserved.
    pub(in crate::handoff::dispatcher) fn wait_for_slot(
        &mut self,
        group: Option<&Group>,
        now: Instant,
    ) -> TicketId {
        let ticket = match group {
            Some(group) => self.groups.add_ticket(group, now),
            None => self.groups.add_ticket_for_any(now),
        };
        self.distribute(now); // a slot may be free, if those in front wait for something else
        ticket
    }

    /// Returns true if one more caller may wait for a slot in this group while it holds an accepted
    /// connection. See [`Groups::may_wait`](super::groups::Groups::may_wait).
    pub(in crate::handoff::dispatcher) fn may_wait(&self, group: &Group) -> bool {
        // `max_in_flight` is half of the descriptors, so the other half is never used by waiting.
        let most = self.config.max_preparing.min(self.config.max_in_flight);
        self.groups.may_wait(group, most)
    }

    /// Removes a ticket, because its caller no longer waits.
    pub(in crate::handoff::dispatcher) fn cancel(
        &mut self,
        group: Option<&Group>,
        ticket: TicketId,
        now: Instant,
    ) {
        if self.groups.remove_ticket(group, ticket) {
            self.distribute(now);
        }
    }

    /// Gives up a reserved slot, so that others can use it.
    pub(in crate::handoff::dispatcher) fn give_up_slot(&mut self, group: &Group, now: Instant) {
        self.groups.get_mut(group).reserved -= 1;
        self.distribute(now);
    }

    /// Puts connections back into their queues, in their order and in front of all others.
    pub(super) fn put_back(
        &mut self,
        again: impl IntoIterator<Item = Pending<C>, IntoIter: DoubleEndedIterator>,
    ) {
        for mut pending in again.into_iter().rev() {
            pending.is_alone = false;
            // Ids are never used again, so those of workers that have left for good are dropped.
            pending.failed_with.retain(|id| self.workers.contains_key(id));
            pending.refused_by.retain(|id| self.workers.contains_key(id));
            if self.phase == PoolPhase::Closed {
                self.events.push(Event::GivenUp {
                    connection: pending.connection,
                    reason: GiveUpReason::Draining,
                });
            } else {
                self.groups.push_front(pending);
            }
        }
    }

    /// The number of slots in a group that are neither in use nor reserved.
    pub(super) fn free_slots(&self, group: &Group) -> u64 {
        let in_flight = self.in_flight();
        let room: u64 = self
            .accounts()
            .filter(|(id, worker, _)| self.is_in(group, *id, worker))
            .map(|(id, _, account)| self.room(id, account, in_flight))
            .sum();
        room.saturating_sub(self.groups.get(group).map_or(0, |group| group.reserved))
    }

    /// The number of descriptors that were sent or are going to be sent, and that no worker is
    /// known to have received.
    pub(in crate::handoff::dispatcher) fn in_flight(&self) -> usize {
        self.kept.fds()
            + self.accounts().map(|(_, _, account)| account.pending_fds()).sum::<usize>()
    }

    /// The number of connections that can be planned for a worker.
    ///
    /// The kernel limits the descriptors in flight of the whole uid, and those sent to a worker
    /// that does not receive stay in flight. So each worker gets at most half of what the others
    /// leave, but always at least one. With a limit of 64, one stuck worker uses 32, the next one
    /// 16, and so on.
    fn room(&self, id: WorkerId, account: &Account<C>, in_flight: usize) -> u64 {
        if self.kept_free.contains(&id) {
            return 0;
        }
        let own = account.pending_fds();
        let share = (self.config.max_in_flight.saturating_sub(in_flight - own) / 2).max(1);
        account.room().min(share.saturating_sub(own) as u64)
    }

    /// Plans an offer for every waiting connection that a worker has room for, and grants free
    /// slots to waiting callers.
    pub(super) fn distribute(&mut self, now: Instant) {
        self.kept_free.clear();
        if self.groups.are_idle() {
            return; // the usual case, after each message of a worker
        }
        let is_succeeded = self.is_succeeded();
        let mut next = self.groups.next_to_serve(None, is_succeeded);
        while let Some(group) = next {
            self.distribute_in(&group, now);
            next = self.groups.next_to_serve(Some(&group), is_succeeded);
        }
        // Callers that wait for a slot in any group get what no group's queue has used.
        self.groups.remove_unused();
        if self.groups.waits_for_any() && self.has_slot() {
            let tickets = self.groups.take_tickets_for_any();
            self.events.extend(tickets.map(|ticket| Event::Granted { ticket, group: None }));
        }
    }

    /// Does in one group what [`distribute`](Self::distribute) does, in the order of its queue.
    ///
    /// If nothing can be done for the first waiter, those behind it usually wait, too. They may
    /// pass a connection that waits for a worker which they do not need:
    ///
    /// - A bundle waits for a worker that takes as many descriptors.
    /// - A connection at its last attempt waits for a worker that has not failed with it.
    /// - A *suspect* is at its last attempt and may crash its worker, so it waits for a worker with
    ///   no other pending connections. If others always pass it, no worker ever becomes free. So
    ///   after `recall_after` the suspect is overdue, and one worker is kept free for it.
    fn distribute_in(&mut self, group: &Group, now: Instant) {
        let mut position = i64::MIN;
        while let Some((next, waiter)) = self.groups.get_mut(group).queue.next(position) {
            position = next;
            let may_go_on = match waiter {
                Waiter::Ticket(_) => self.grant(group, position),
                Waiter::Connection(_) => self.place(group, position, now),
            };
            if !may_go_on {
                return;
            }
            position += 1;
        }
    }

    /// Reserves a slot for the caller at this position. Returns false if there is none.
    fn grant(&mut self, group: &Group, position: i64) -> bool {
        if self.free_slots(group) == 0 {
            return false;
        }
        let state = self.groups.get_mut(group);
        let ticket = state.queue.grant(position);
        state.reserved += 1;
        self.events.push(Event::Granted { ticket, group: Some(group.clone()) });
        true
    }

    /// Plans an offer of the connection at this position, or gives it up, or leaves it there.
    /// Returns false if those behind it have to wait.
    fn place(&mut self, group: &Group, position: i64, now: Instant) -> bool {
        let pending = self.groups.get_mut(group).queue.take(position);
        let mut pending = pending.expect("the caller has found a connection there");
        // A new connection must not use a slot that is reserved for another one. A connection that
        // was offered before may: it goes before those that are still to come.
        let must_wait = pending.offers == 0 && self.free_slots(group) == 0;
        let choice = if must_wait { Choice::Wait } else { self.choose(&pending) };
        match choice {
            Choice::Plan(id) => self.plan(id, pending),
            Choice::GiveUp => {
                let reason = pending.too_many_offers();
                self.events.push(Event::GivenUp { connection: pending.connection, reason });
            }
            Choice::Wait => {
                self.keep_free_for(&mut pending, now);
                let max_offers = self.config.max_offers;
                let may_be_passed = pending.is_at_last_attempt(max_offers) || pending.fds > 1;
                let queue = &mut self.groups.get_mut(group).queue;
                queue.put(position, Waiter::Connection(pending));
                return may_be_passed;
            }
        }
        true
    }

    /// Notes since when a suspect waits. When it is overdue, plans nothing more for the best
    /// worker, so that the worker becomes free for the suspect. There is at most one such worker in
    /// each group.
    fn keep_free_for(&mut self, pending: &mut Pending<C>, now: Instant) {
        if !pending.is_suspect(self.config.max_offers) {
            return;
        }
        let since = *pending.suspect_since.get_or_insert(now);
        if now < since + self.config.recall_after {
            return;
        }
        let is_one_kept_free = self.kept_free.iter().any(|id| {
            self.workers.get(id).is_some_and(|worker| self.is_in(&pending.group, *id, worker))
        });
        if !is_one_kept_free {
            self.kept_free.extend(self.best(pending, |_, account| account.room() > 0));
        }
    }

    /// Chooses a worker for a connection, among those with room for it.
    fn choose(&self, pending: &Pending<C>) -> Choice {
        if pending.failures >= self.config.max_offers && self.is_failed_by_all(pending) {
            return Choice::GiveUp;
        }
        let in_flight = self.in_flight();
        let is_suspect = pending.is_suspect(self.config.max_offers);
        let fits = |id, account: &Account<C>| {
            self.room(id, account, in_flight) > 0 && (!is_suspect || account.pending() == 0)
        };
        self.best(pending, fits).map_or(Choice::Wait, Choice::Plan)
    }

    /// Returns the best worker for a connection, among those for which `fits` returns true.
    fn best(
        &self,
        pending: &Pending<C>,
        fits: impl Fn(WorkerId, &Account<C>) -> bool,
    ) -> Option<WorkerId> {
        // The last attempt goes to a worker that has not failed with the connection, if there is
        // one.
        let only_others =
            pending.is_at_last_attempt(self.config.max_offers) && !self.is_failed_by_all(pending);
        let fitting = self.accounts().filter(|(id, worker, account)| {
            self.is_in(&pending.group, *id, worker)
                && fits(*id, account)
                && account.takes(pending.fds)
                && !(only_others && pending.failed_with.contains(id))
        });
        // Workers that have failed with the connection come last. A worker that has adopted nothing
        // yet may be as bad, such as a process that starts and dies again and again. Among the
        // others, those that have not refused the connection come first. Each strategy compares
        // these ranks before anything of its own.
        let rank_of = |id: &WorkerId, account: &Account<C>| {
            let is_unproven = pending.failures > 0 && !account.has_adopted();
            (pending.failed_with.contains(id), is_unproven, pending.refused_by.contains(id))
        };
        let best = match self.config.strategy {
            Strategy::LeastLoaded => fitting.min_by_key(|(id, worker, account)| {
                (rank_of(id, account), account.active() + account.pending(), worker.last_plan)
            }),
            Strategy::RoundRobin => {
                fitting.min_by_key(|(id, worker, account)| (rank_of(id, account), worker.last_plan))
            }
            Strategy::ByKey => fitting
                .min_by_key(|(id, _, account)| (rank_of(id, account), order_of(pending.key, *id))),
        };
        best.map(|(id, ..)| id)
    }

    /// Returns true if every worker of the connection's group either has failed with it or cannot
    /// take it.
    ///
    /// A process that connects and dies again and again is a new worker each time, so the
    /// connection would never be given up. After many failures, workers that have connected and
    /// adopted nothing therefore count as unable to take it.
    fn is_failed_by_all(&self, pending: &Pending<C>) -> bool {
        let limit = self.config.max_offers.saturating_add(FAILURES_BEFORE_DISTRUST);
        let trusts_all = pending.failures < limit;
        let may_take = |id: WorkerId, worker: &Worker<C>| match &worker.account {
            _ if worker.removed.is_some() || !self.is_in(&pending.group, id, worker) => false,
            Some(account) if account.is_draining() => false,
            // The worker takes no bundles, or no bundle of this size.
            Some(account) if account.timeouts.is_greeted() && !account.takes(pending.fds) => false,
            _ if trusts_all || worker.program.is_some() => true,
            Some(account) => account.has_adopted(),
            None => false,
        };
        self.workers
            .iter()
            .all(|(id, worker)| pending.failed_with.contains(id) || !may_take(*id, worker))
    }

    /// Plans an offer of the connection for a worker.
    fn plan(&mut self, id: WorkerId, mut pending: Pending<C>) {
        self.plans += 1;
        let plan = self.plans;
        pending.is_alone = pending.is_suspect(self.config.max_offers);
        pending.suspect_since = None;
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.last_plan = plan;
        if worker.account.as_mut().is_some_and(|account| account.plan(pending)) {
            self.events.push(Event::Wake(id));
        }
    }
}
