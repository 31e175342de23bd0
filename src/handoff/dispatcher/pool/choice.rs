//! Who waits, and who gets what.

use std::hash::{DefaultHasher, Hash, Hasher};

use tokio::{sync::oneshot, time::Instant};

use super::{Link, Pool};
use crate::handoff::dispatcher::{NotDispatched, Permit, Strategy, Unadopted, WorkerId, job::Job};

/// Most offers of a connection, whatever became of them.
const MAX_OFFERS: u32 = 100;

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "those that wait in numbers are connections")]
pub(super) enum Waiter {
    Connection(Job),
    /// Until then the permit counts for nothing.
    Place(oneshot::Sender<Permit>, Permit),
}

impl Waiter {
    fn is_given_up(&self) -> bool {
        matches!(self, Self::Place(waiter, _) if waiter.is_closed())
    }
}

impl Pool {
    /// Takes a connection; `reserved` if a permit has come with it.
    pub(in crate::handoff::dispatcher) fn dispatch(&mut self, job: Job, reserved: bool) {
        self.totals.dispatched += 1;
        if reserved {
            self.reserved -= 1;
        }
        if self.over || self.closed && !reserved {
            return self.failed.push((job, NotDispatched::Draining));
        }
        if reserved {
            // The place that it had may be gone with its worker. Then it is the first to wait.
            match self.pick(&job) {
                Some(id) => self.assign(id, job),
                None => self.waiting.push_front(Waiter::Connection(job)),
            }
        } else {
            self.waiting.push_back(Waiter::Connection(job));
            self.distribute();
        }
    }

    /// Reserves a place, if one is free and nobody waits for it.
    pub(in crate::handoff::dispatcher) fn try_reserve(&mut self) -> bool {
        let free = !self.closed && self.waiting.is_empty() && self.free() > 0;
        self.reserved += u64::from(free);
        free
    }

    /// Has `place` wait for one.
    pub(in crate::handoff::dispatcher) fn wait_for_place(&mut self, waiter: oneshot::Sender<Permit>, permit: Permit) {
        // Who asks again and again, and gives up each time, leaves one place in the queue and not many.
        while self.waiting.back().is_some_and(Waiter::is_given_up) {
            self.waiting.pop_back();
        }
        self.waiting.push_back(Waiter::Place(waiter, permit));
    }

    pub(in crate::handoff::dispatcher) fn give_up_place(&mut self) {
        self.reserved -= 1;
        self.distribute();
    }

    /// Nobody gets a permit any more. Workers have until then.
    pub(in crate::handoff::dispatcher) fn close(&mut self, until: Option<Instant>) {
        self.closed = true;
        self.until = until;
        self.waiting.retain(|waiter| matches!(waiter, Waiter::Connection(_)));
    }

    /// No worker adopts what waits.
    pub(in crate::handoff::dispatcher) fn fail_waiting(&mut self) {
        self.over = true;
        for waiter in std::mem::take(&mut self.waiting) {
            if let Waiter::Connection(job) = waiter {
                self.failed.push((job, NotDispatched::Draining));
            }
        }
    }

    pub(in crate::handoff::dispatcher) fn waiting_connections(&self) -> usize {
        self.waiting.iter().filter(|waiter| matches!(waiter, Waiter::Connection(_))).count()
    }

    #[cfg(test)]
    pub(in crate::handoff::dispatcher) fn waiting_in_all(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn unless_too_often(&mut self, job: Job, last: Unadopted) -> Option<Job> {
        if job.failures < self.config.max_offers && job.offers < MAX_OFFERS {
            return Some(job);
        }
        let offers = job.offers;
        self.failed.push((job, NotDispatched::TooManyOffers { offers, last }));
        None
    }

    /// To be the first ones again, in their order.
    pub(super) fn put_back(&mut self, jobs: impl IntoIterator<Item = Job, IntoIter: DoubleEndedIterator>) {
        for job in jobs.into_iter().rev() {
            match self.over {
                true => self.failed.push((job, NotDispatched::Draining)),
                false => self.waiting.push_front(Waiter::Connection(job)),
            }
        }
    }

    /// Places that are neither taken nor reserved.
    fn free(&self) -> u64 {
        let room: u64 = self.workers.values().flat_map(|worker| &worker.link).map(Link::room).sum();
        room.saturating_sub(self.reserved)
    }

    /// Gives out what can be given out, in the order of waiting.
    pub(super) fn distribute(&mut self) {
        while let Some(first) = self.waiting.pop_front() {
            match first {
                Waiter::Connection(job) => {
                    // One that was offered before goes before those that have a place reserved for one not accepted yet.
                    let worker = if job.offers == 0 && self.free() == 0 { None } else { self.pick(&job) };
                    match worker {
                        Some(id) => self.assign(id, job),
                        None => return self.waiting.push_front(Waiter::Connection(job)),
                    }
                }
                given_up if given_up.is_given_up() => {}
                Waiter::Place(waiter, permit) => {
                    if self.free() == 0 {
                        return self.waiting.push_front(Waiter::Place(waiter, permit));
                    }
                    self.reserved += u64::from(permit.grant(waiter));
                }
            }
        }
    }

    /// One that may be what its workers die of is offered for the last time to a worker that has no other, so that no other
    /// is taken for it.
    fn is_suspect(&self, job: &Job) -> bool {
        job.failures > 0 && job.failures + 1 >= self.config.max_offers
    }

    fn pick(&self, job: &Job) -> Option<WorkerId> {
        let suspect = self.is_suspect(job);
        let rejected_by = job.last.map(|(link, _)| link);
        let with_room = self.workers.iter().filter_map(|(id, worker)| {
            let link = worker.link.as_ref()?;
            let fit = link.room() > 0 && (!suspect || link.unanswered == 0);
            fit.then_some((id, worker, link))
        });
        // Rather not the one that has just rejected it.
        let preference = |link: &Link| rejected_by == Some(link.number);
        match self.config.strategy {
            Strategy::LeastLoaded => with_room
                .min_by_key(|(_, worker, link)| (preference(link), link.active() + link.unanswered, worker.turn))
                .map(|(id, ..)| *id),
            Strategy::RoundRobin => {
                with_room.min_by_key(|(_, worker, link)| (preference(link), worker.turn)).map(|(id, ..)| *id)
            }
            Strategy::ByKey => {
                let key = job.key();
                with_room.min_by_key(|(id, _, link)| (preference(link), rank(key, **id))).map(|(id, ..)| *id)
            }
        }
    }

    fn assign(&mut self, id: WorkerId, job: Job) {
        self.turn += 1;
        let (turn, alone) = (self.turn, self.is_suspect(&job));
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(link) = &mut worker.link else { return };
        worker.turn = turn;
        link.offered += 1;
        link.unanswered += 1;
        link.alone = alone;
        link.assigned.push_back(job);
        link.bell.ring();
    }
}

/// Where a worker stands in the order in which a key prefers workers (rendezvous hashing): it changes for the keys of a
/// worker that leaves, and for no others.
fn rank(key: u64, worker: WorkerId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, worker).hash(&mut hasher);
    hasher.finish()
}
