//! The choice of who waits, and of who gets which connection.

use std::time::Instant;

use super::{Account, Event, Failure, Pending, Phase, Pool, TicketId, Waiter, Worker};
use crate::handoff::dispatcher::{Group, Strategy, WorkerId, key::order_of};

/// The choices for a connection.
enum Choice {
    Plan(WorkerId),
    /// No worker has room for it.
    Wait,
    GiveUp,
}

/// The number of failures, beyond the limit of offers, after which a connection does not wait for
/// workers that have connected and adopted nothing.
const STRANGERS: u32 = 32;

/// The right of a connection to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::handoff::dispatcher) enum Admission {
    /// None: while the dispatcher drains it is not taken.
    None,
    /// It was accepted before the dispatcher has drained.
    Late,
    /// A place is kept for it in this group.
    Reserved(Group),
}

impl<C> Pool<C> {
    /// Takes a connection for a group.
    pub(in crate::handoff::dispatcher) fn dispatch(
        &mut self,
        connection: C,
        group: Group,
        (key, fds): (u64, usize),
        admission: Admission,
        now: Instant,
    ) {
        self.totals.dispatched += 1;
        if let Admission::Reserved(group) = &admission {
            self.groups.get_mut(group).reserved -= 1;
        }
        let is_taken = match self.phase {
            Phase::Open => true,
            Phase::Draining => admission != Admission::None,
            Phase::Closed => false,
        };
        if !is_taken {
            return self.events.push(Event::Failed { connection, failure: Failure::Draining });
        }
        let has_slot = admission == Admission::Reserved(group.clone());
        let pending = Pending::new(connection, group, key, fds, now);
        if !has_slot {
            self.groups.push_back(pending);
            return self.distribute(now);
        }
        // The place that it had may be gone with its worker. Then it is the first to wait.
        match self.choose(&pending) {
            Choice::Plan(id) => self.plan(id, pending),
            _ => {
                self.groups.push_front(pending);
                self.distribute(now); // a bundle that no worker takes leaves its place to others
            }
        }
    }

    /// Reserves a place in a group, if one is free and nobody waits for it.
    pub(in crate::handoff::dispatcher) fn try_reserve(&mut self, group: &Group) -> bool {
        let nobody_waits = self.groups.get(group).is_some_and(|group| group.queue.is_empty());
        let is_free = self.is_open() && nobody_waits && self.free(group) > 0;
        if is_free {
            self.groups.get_mut(group).reserved += 1;
        }
        is_free
    }

    /// Returns true if there is a free place in any group.
    pub(in crate::handoff::dispatcher) fn has_slot(&self) -> bool {
        self.is_open() && self.groups.iter().any(|(group, _)| self.free(group) > 0)
    }

    /// Waits for a place in a group, which [`Event::Granted`] reserves; without a group until there
    /// is one in any, which is not reserved.
    pub(in crate::handoff::dispatcher) fn wait_for_slot(
        &mut self,
        group: Option<&Group>,
        now: Instant,
    ) -> TicketId {
        let ticket = match group {
            Some(group) => self.groups.add_ticket(group, now),
            None => self.groups.add_ticket_for_any(now),
        };
        self.distribute(now); // what waits before it may wait for something else
        ticket
    }

    /// Returns true if one more user may wait for a place in this group while it holds an accepted
    /// connection. See [`Groups::may_wait`](super::groups::Groups::may_wait).
    pub(in crate::handoff::dispatcher) fn may_wait(&self, group: &Group) -> bool {
        // Whatever waits, half of the descriptors are left.
        let most = self.config.max_preparing.min(self.config.max_in_flight);
        self.groups.may_wait(group, most)
    }

    /// Nobody waits with this ticket.
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

    pub(in crate::handoff::dispatcher) fn give_up_slot(&mut self, group: &Group, now: Instant) {
        self.groups.get_mut(group).reserved -= 1;
        self.distribute(now);
    }

    /// They wait again, before all others and in their order.
    pub(super) fn put_back(
        &mut self,
        again: impl IntoIterator<Item = Pending<C>, IntoIter: DoubleEndedIterator>,
    ) {
        for mut pending in again.into_iter().rev() {
            pending.is_alone = false;
            // No worker gets the id of one that has left for good.
            pending.failed_with.retain(|id| self.workers.contains_key(id));
            pending.refused_by.retain(|id| self.workers.contains_key(id));
            if self.phase == Phase::Closed {
                self.events.push(Event::Failed {
                    connection: pending.connection,
                    failure: Failure::Draining,
                });
            } else {
                self.groups.push_front(pending);
            }
        }
    }

    /// The number of places in a group that are neither taken nor reserved.
    pub(super) fn free(&self, group: &Group) -> u64 {
        let in_flight = self.in_flight();
        let room: u64 = self
            .accounts()
            .filter(|(id, worker, _)| self.is_in(group, *id, worker))
            .map(|(id, _, account)| self.room(id, account, in_flight))
            .sum();
        room.saturating_sub(self.groups.get(group).map_or(0, |group| group.reserved))
    }

    /// The number of descriptors that were sent, or are going to be, and that no worker is known to
    /// have received.
    pub(in crate::handoff::dispatcher) fn in_flight(&self) -> usize {
        self.stale.fds()
            + self.accounts().map(|(_, _, account)| account.pending_fds()).sum::<usize>()
    }

    /// The number of connections that can be planned for a worker.
    ///
    /// Descriptors in flight are limited for the whole uid, and those of a worker that does not
    /// receive stay there. So each worker gets at most half of what the others leave. However many
    /// workers are stuck, one place is left.
    fn room(&self, id: WorkerId, account: &Account<C>, in_flight: usize) -> u64 {
        if self.kept_free.contains(&id) {
            return 0;
        }
        let own = account.pending_fds();
        let share = (self.config.max_in_flight.saturating_sub(in_flight - own) / 2).max(1);
        account.room().min(share.saturating_sub(own) as u64)
    }

    /// Gives out what can be given out.
    pub(super) fn distribute(&mut self, now: Instant) {
        self.kept_free.clear();
        if self.groups.are_settled() {
            return; // the usual case, after each message of a worker
        }
        let is_succeeded = self.is_succeeded();
        let mut next = self.groups.next_to_serve(None, is_succeeded);
        while let Some(group) = next {
            self.distribute_in(&group, now);
            next = self.groups.next_to_serve(Some(&group), is_succeeded);
        }
        self.groups.remove_unused();
        if self.groups.waits_for_any() && self.has_slot() {
            let tickets = self.groups.take_tickets_for_any();
            self.events.extend(tickets.map(|ticket| Event::Granted { ticket, group: None }));
        }
    }

    /// The same in one group, in the order of waiting.
    fn distribute_in(&mut self, group: &Group, now: Instant) {
        let (mut from, mut is_one_kept_free) = (i64::MIN, false);
        while let Some((place, waiter)) = self.groups.get_mut(group).queue.next(from) {
            from = place + 1;
            let Waiter::Connection(pending) = waiter else {
                if self.free(group) == 0 {
                    return;
                }
                let state = self.groups.get_mut(group);
                let ticket = state.queue.grant(place);
                state.reserved += 1;
                self.events.push(Event::Granted { ticket, group: Some(group.clone()) });
                continue;
            };
            // A suspect waits for a worker of its own, and others go before it, for some time.
            let is_suspect = pending.is_suspect(self.config.max_offers);
            let since = is_suspect.then(|| *pending.suspect_since.get_or_insert(now));
            let is_overdue = since.is_some_and(|since| now >= since + self.config.recall_after);
            // These may wait for a worker that others have no need of, so they do not hold up those
            // behind them.
            let is_special = pending.is_at_last_attempt(self.config.max_offers) || pending.fds > 1;
            // Connections that were offered before go before those that have a place reserved for a
            // connection to come.
            let is_new = pending.offers == 0;
            let Some(pending) = self.groups.get_mut(group).queue.take(place) else { continue };
            let choice =
                if is_new && self.free(group) == 0 { Choice::Wait } else { self.choose(&pending) };
            match choice {
                Choice::Plan(id) => self.plan(id, pending),
                Choice::GiveUp => {
                    let failure = pending.too_many_offers();
                    self.events.push(Event::Failed { connection: pending.connection, failure });
                }
                Choice::Wait => {
                    if is_overdue && !is_one_kept_free {
                        let best = self.best(&pending, |_, account| account.room() > 0);
                        self.kept_free.extend(best);
                        is_one_kept_free = best.is_some();
                    }
                    let queue = &mut self.groups.get_mut(group).queue;
                    queue.put(place, Waiter::Connection(pending));
                    if !is_special {
                        return;
                    }
                }
            }
        }
    }

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

    /// The worker that is to get a connection, of those that fit.
    fn best(
        &self,
        pending: &Pending<C>,
        fits: impl Fn(WorkerId, &Account<C>) -> bool,
    ) -> Option<WorkerId> {
        let only_others =
            pending.is_at_last_attempt(self.config.max_offers) && !self.is_failed_by_all(pending);
        let fitting = self.accounts().filter(|(id, worker, account)| {
            self.is_in(&pending.group, *id, worker)
                && fits(*id, account)
                && account.takes(pending.fds)
                && !(only_others && pending.failed_with.contains(id))
        });
        // Rather a worker that has not had it. One that has adopted nothing yet may be as bad as
        // those that failed with it, such as a process that comes up again and again and dies.
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

    /// Returns true if no worker of its group is left that might take a connection and has not
    /// failed with it.
    ///
    /// A process that connects again and again, and dies each time, is a new worker each time. So
    /// after many failures, workers that have connected and adopted nothing do not count: they
    /// would keep the connection forever.
    fn is_failed_by_all(&self, pending: &Pending<C>) -> bool {
        let trusts_strangers = pending.failures < self.config.max_offers.saturating_add(STRANGERS);
        let may_take = |id: WorkerId, worker: &Worker<C>| match &worker.account {
            _ if worker.removed.is_some() || !self.is_in(&pending.group, id, worker) => false,
            Some(account) if account.is_draining() => false,
            // It takes no bundles, or no bundle of this size.
            Some(account) if account.clock.is_greeted() && !account.takes(pending.fds) => false,
            _ if trusts_strangers || worker.program.is_some() => true,
            Some(account) => account.has_adopted(),
            None => false,
        };
        self.workers
            .iter()
            .all(|(id, worker)| pending.failed_with.contains(id) || !may_take(*id, worker))
    }

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
