//! The end of a worker, and of the dispatcher.

use std::time::Instant;

use super::{Event, Failure, Left, LinkId, Phase, Pool, Remains, RetireCause, WorkerId};

impl<C> Pool<C> {
    /// A worker is gone: it can adopt nothing more, and everything that it had sent was received. The last
    /// `unsent` offers have not been sent to it. `lives` is true if its process may live, with copies of what it was sent.
    pub(in crate::handoff::dispatcher) fn retire(
        &mut self,
        id: WorkerId,
        cause: &RetireCause,
        unsent: usize,
        lives: bool,
        now: Instant,
    ) -> Remains {
        self.totals.retired.count(cause);
        let worker = self.workers.get_mut(&id);
        let Some((worker, account)) = worker.and_then(|worker| worker.account.take().map(|account| (worker, account)))
        else {
            return Remains { has_adopted: false, end_matters: false };
        };
        worker.last_exit = Some(cause.clone());
        let (link, has_adopted) = (account.link, account.has_adopted());
        let Left { mut unanswered, unseen, repeated } = account.retire(unsent);
        self.totals.offered_again -= repeated;
        let may_hold_copies = lives && !unanswered.is_empty();
        if may_hold_copies {
            self.stale.add_holder(link, unanswered.iter().map(|pending| pending.fds).sum());
        }
        for pending in &mut unanswered {
            pending.on_unanswered(id, *cause != RetireCause::Drained);
            pending.holders.extend(may_hold_copies.then_some(link));
        }
        self.put_back(unanswered.into_iter().chain(unseen));
        if !lives {
            self.on_process_end(link);
        }
        let end_matters = may_hold_copies || self.stale.are_kept_for(link);
        self.distribute(now);
        Remains { has_adopted, end_matters }
    }

    /// The process at the other end of a link has ended, and its copies with it.
    pub(in crate::handoff::dispatcher) fn on_process_end(&mut self, link: LinkId) {
        self.stale.on_process_end(link, &mut self.events);
    }

    /// Keeps the dispatcher's copy of a connection that a worker has adopted, as long as one of the holders may have another.
    pub(in crate::handoff::dispatcher) fn keep(&mut self, connection: C, adopter: LinkId, holders: Vec<LinkId>) {
        self.stale.keep(connection, adopter, holders, &mut self.events);
    }

    /// Nothing more is taken. Workers have until then.
    pub(in crate::handoff::dispatcher) fn drain(&mut self, until: Option<Instant>) {
        self.phase = self.phase.max(Phase::Draining);
        self.until = until;
        self.queue.remove_tickets();
    }

    pub(in crate::handoff::dispatcher) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Returns true if nothing is taken any more, whatever was accepted before.
    pub(in crate::handoff::dispatcher) fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// No worker adopts what waits, and all workers leave.
    pub(in crate::handoff::dispatcher) fn close(&mut self, now: Instant) {
        self.phase = Phase::Closed;
        for connection in self.queue.take_connections() {
            self.events.push(Event::Failed { connection, failure: Failure::Draining });
        }
        for id in Vec::from_iter(self.workers.keys().copied()) {
            self.remove(id, self.until, now);
        }
    }

    /// Returns true if waiting changes nothing for the connections that are on their way: what waits does so for nobody.
    pub(in crate::handoff::dispatcher) fn is_settled(&self) -> bool {
        let nobody_comes = self.workers.values().all(|worker| worker.removed.is_some());
        self.pending() == 0 && (nobody_comes || self.queue.connections() == 0)
    }
}
