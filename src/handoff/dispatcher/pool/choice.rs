//! Who waits, and who gets what.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Instant,
};

use super::{Account, Event, Failure, Pending, Phase, Pool, TicketId, Waiter, Worker};
use crate::handoff::dispatcher::{Strategy, WorkerId};

/// What can be done with a connection.
enum Choice {
    Plan(WorkerId),
    /// No worker has room for it.
    Wait,
    GiveUp,
}

/// The number of failures, beyond the limit of offers, after which a connection does not wait for
/// workers that have connected and adopted nothing.
const STRANGERS: u32 = 32;

impl<C> Pool<C> {
    /// Takes a connection. It comes with a permit if `reserved` is true.
    pub(in crate::handoff::dispatcher) fn dispatch(
        &mut self,
        connection: C,
        key: u64,
        fds: usize,
        reserved: bool,
        now: Instant,
    ) {
        self.totals.dispatched += 1;
        self.reserved -= u64::from(reserved);
        if self.phase == Phase::Closed || self.phase == Phase::Draining && !reserved {
            return self.events.push(Event::Failed { connection, failure: Failure::Draining });
        }
        let pending = Pending::new(connection, key, fds, now);
        if !reserved {
            self.queue.push_back(Waiter::Connection(pending));
            return self.distribute(now);
        }
        // The place that it had may be gone with its worker. Then it is the first to wait.
        match self.choose(&pending) {
            Choice::Plan(id) => self.plan(id, pending),
            _ => {
                self.queue.push_front(pending);
                self.distribute(now); // a bundle that no worker takes leaves its place to others
            }
        }
    }

    /// Reserves a place, if one is free and nobody waits for it.
    pub(in crate::handoff::dispatcher) fn try_reserve(&mut self) -> bool {
        let free = self.is_open() && self.queue.is_empty() && self.free() > 0;
        self.reserved += u64::from(free);
        free
    }

    /// Reserves a place that may not be free: its connection waits then. Also while the dispatcher
    /// drains, for connections that were accepted before that. Returns false if nothing is taken
    /// any more.
    pub(in crate::handoff::dispatcher) fn reserve_late(&mut self) -> bool {
        self.reserved += u64::from(!self.is_closed());
        !self.is_closed()
    }

    /// Waits for a place, which [`Event::Granted`] reserves.
    pub(in crate::handoff::dispatcher) fn wait_for_place(&mut self, now: Instant) -> TicketId {
        let ticket = self.queue.push_back(Waiter::Ticket(now));
        self.distribute(now); // what waits before it may wait for something else
        ticket
    }

    /// Nobody waits with this ticket.
    pub(in crate::handoff::dispatcher) fn cancel(&mut self, ticket: TicketId, now: Instant) {
        if self.queue.remove_ticket(ticket) {
            self.distribute(now);
        }
    }

    pub(in crate::handoff::dispatcher) fn give_up_place(&mut self, now: Instant) {
        self.reserved -= 1;
        self.distribute(now);
    }

    /// They wait again, before all others and in their order.
    pub(super) fn put_back(
        &mut self,
        again: impl IntoIterator<Item = Pending<C>, IntoIter: DoubleEndedIterator>,
    ) {
        for mut pending in again.into_iter().rev() {
            pending.is_alone = false;
            if self.phase == Phase::Closed {
                self.events.push(Event::Failed {
                    connection: pending.connection,
                    failure: Failure::Draining,
                });
            } else {
                self.queue.push_front(pending);
            }
        }
    }

    /// The number of places that are neither taken nor reserved.
    pub(super) fn free(&self) -> u64 {
        let in_flight = self.in_flight();
        let room: u64 =
            self.accounts().map(|(id, _, account)| self.room(id, account, in_flight)).sum();
        room.saturating_sub(self.reserved)
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
        if self.held == Some(id) {
            return 0;
        }
        let own = account.pending_fds();
        let share = (self.config.max_in_flight.saturating_sub(in_flight - own) / 2).max(1);
        account.room().min(share.saturating_sub(own) as u64)
    }

    /// Gives out what can be given out, in the order of waiting.
    pub(super) fn distribute(&mut self, now: Instant) {
        self.held = None;
        let mut from = i64::MIN;
        while let Some((place, waiter)) = self.queue.next(from) {
            from = place + 1;
            let Waiter::Connection(pending) = waiter else {
                if self.free() == 0 {
                    return;
                }
                let ticket = self.queue.grant(place);
                self.reserved += 1;
                self.events.push(Event::Granted(ticket));
                continue;
            };
            // A suspect waits for a worker of its own, and others go before it, for some time.
            let is_suspect = pending.is_suspect(self.config.max_offers);
            let since = is_suspect.then(|| *pending.suspect_since.get_or_insert(now));
            let is_overdue = since.is_some_and(|since| now >= since + self.config.recall_after);
            // These may wait for a worker that others have no need of, so they do not hold up those
            // behind them.
            let is_special = pending.is_at_last_attempt(self.config.max_offers) || pending.fds > 1;
            // Those that were offered before go before those that have a place reserved for a
            // connection to come.
            let is_new = pending.offers == 0;
            let Some(pending) = self.queue.take(place) else { continue };
            let choice =
                if is_new && self.free() == 0 { Choice::Wait } else { self.choose(&pending) };
            match choice {
                Choice::Plan(id) => self.plan(id, pending),
                Choice::GiveUp => {
                    let failure = pending.too_many_offers();
                    self.events.push(Event::Failed { connection: pending.connection, failure });
                }
                Choice::Wait => {
                    if is_overdue && self.held.is_none() {
                        self.held = self.best(&pending, |_, account| account.room() > 0);
                    }
                    self.queue.put(place, pending);
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
        let fitting = self.accounts().filter(|(id, _, account)| {
            fits(*id, account)
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

    /// Returns true if no worker is left that might take a connection and has not failed with it.
    ///
    /// A process that connects again and again, and dies each time, is a new worker each time. So
    /// after many failures, workers that have connected and adopted nothing do not count: they
    /// would keep the connection forever.
    fn is_failed_by_all(&self, pending: &Pending<C>) -> bool {
        let trusts_strangers = pending.failures < self.config.max_offers.saturating_add(STRANGERS);
        let may_take = |worker: &Worker<C>| match &worker.account {
            _ if worker.removed.is_some() => false,
            Some(account) if account.is_draining() => false,
            // It takes no bundles, or no bundle of this size.
            Some(account) if account.clock.is_greeted() && !account.takes(pending.fds) => false,
            _ if trusts_strangers || worker.program.is_some() => true,
            Some(account) => account.has_adopted(),
            None => false,
        };
        self.workers
            .iter()
            .all(|(id, worker)| pending.failed_with.contains(id) || !may_take(worker))
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

/// Where a worker stands in the order in which a key prefers workers (rendezvous hashing): it
/// changes for the keys of a worker that leaves, and for no others.
fn order_of(key: u64, worker: WorkerId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, worker).hash(&mut hasher);
    hasher.finish()
}
