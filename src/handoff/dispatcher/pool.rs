//! Which worker gets which connection: all of a dispatcher's state that its workers share. No system call but for closing, and
//! nothing waits here.

mod choice;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use choice::Waiter;
use tokio::time::Instant;

use super::{
    Cause, NotDispatched, Retired, Unadopted, WorkerId, WorkerState,
    bell::Bell,
    builder::Config,
    copies::Copies,
    job::{Job, LinkId},
    protocol::RejectReason,
};

/// Most offers that a worker gets without an answer, whatever it asks for: as many descriptors as one call takes. Dispatchers
/// hold a copy of each, so the descriptors in flight stay below the limit on them (`ETOOMANYREFS`).
const MAX_UNANSWERED: u64 = 253;

#[derive(Debug)]
pub(super) struct Pool {
    config: Config,
    pub(super) workers: BTreeMap<WorkerId, Worker>,
    waiting: VecDeque<Waiter>,
    /// Permits given out.
    reserved: u64,
    /// Nothing is taken any more, but with a permit.
    pub(super) closed: bool,
    /// Nothing is taken any more at all.
    over: bool,
    /// The limit of the drain that was asked for last.
    pub(super) until: Option<Instant>,
    /// Processes of retired workers that have not ended.
    pub(super) leftover: usize,
    pub(super) copies: Copies,
    fences: VecDeque<Instant>,
    /// To be given back once the pool is unlocked.
    pub(super) failed: Vec<(Job, NotDispatched)>,
    turn: u64,
    last_worker: u64,
    last_link: LinkId,
    pub(super) totals: Totals,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Totals {
    pub(super) dispatched: u64,
    pub(super) adopted: u64,
    pub(super) offered_again: u64,
    pub(super) given_back: u64,
    pub(super) lost: u64,
    pub(super) retired: Retired,
}

#[derive(Debug, Default)]
pub(super) struct Worker {
    /// `None` until its process is started again.
    pub(super) link: Option<Link>,
    pub(super) restarts: u64,
    pub(super) adopted: u64,
    pub(super) rejected: u64,
    /// Why its process before this one left.
    pub(super) left: Option<Cause>,
    /// To be told to drain, until when.
    pub(super) removed: Option<Option<Instant>>,
    /// Its place in the turns of round robin, and among the equally loaded.
    turn: u64,
}

/// What the pool knows of a worker that is there.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) number: LinkId,
    pub(super) pid: Option<u32>,
    pub(super) state: WorkerState,
    /// Rung when there is something for it: assigned connections, or its removal.
    pub(super) bell: Arc<Bell>,
    assigned: VecDeque<Job>,
    demand: u64,
    /// Offers made, the assigned ones among them.
    offered: u64,
    pub(super) unanswered: u64,
    pub(super) adopted: u64,
    pub(super) finished: u64,
    /// It has a connection that is to be its only one until it has answered.
    alone: bool,
}

/// What a worker has said, to be entered at once.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) demand: Option<u64>,
    /// What it was not sent by then is for others.
    pub(super) has_refused: bool,
    pub(super) finished: Option<u64>,
    pub(super) draining: bool,
    pub(super) offered_again: u64,
    pub(super) adopted: Vec<Job>,
    pub(super) rejected: Vec<(Job, RejectReason)>,
    /// It has refused before they were sent.
    pub(super) unsent: VecDeque<Job>,
}

impl Link {
    pub(super) fn room(&self) -> u64 {
        match self.state {
            WorkerState::Ready if !self.alone => {
                self.demand.saturating_sub(self.offered).min(MAX_UNANSWERED.saturating_sub(self.unanswered))
            }
            _ => 0,
        }
    }

    pub(super) fn active(&self) -> u64 {
        self.adopted - self.finished
    }
}

impl Pool {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            workers: BTreeMap::new(),
            waiting: VecDeque::new(),
            reserved: 0,
            closed: false,
            over: false,
            until: None,
            leftover: 0,
            copies: Copies::default(),
            fences: VecDeque::new(),
            failed: Vec::new(),
            turn: 0,
            last_worker: 0,
            last_link: 0,
            totals: Totals::default(),
        }
    }

    // Workers come and go.

    pub(super) fn add_worker(&mut self) -> WorkerId {
        self.last_worker += 1;
        let id = WorkerId(self.last_worker);
        // Those added while the dispatcher drains have nothing to do.
        let removed = self.closed.then_some(self.until);
        self.workers.insert(id, Worker { removed, ..Worker::default() });
        id
    }

    /// A process of this worker is connected.
    pub(super) fn connected(&mut self, id: WorkerId, pid: Option<u32>, bell: Arc<Bell>) -> LinkId {
        self.last_link += 1;
        let number = self.last_link;
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.link = Some(Link {
                number,
                pid,
                state: WorkerState::Starting,
                bell,
                assigned: VecDeque::new(),
                demand: 0,
                offered: 0,
                unanswered: 0,
                adopted: 0,
                finished: 0,
                alone: false,
            });
        }
        number
    }

    fn link(&mut self, id: WorkerId) -> Option<&mut Link> {
        self.workers.get_mut(&id)?.link.as_mut()
    }

    pub(super) fn set_state(&mut self, id: WorkerId, state: WorkerState) {
        if let Some(link) = self.link(id)
            && link.state != WorkerState::Draining
        {
            link.state = state;
            self.distribute();
        }
    }

    /// No more connections for this worker. Returns whether there is such a worker.
    pub(super) fn remove(&mut self, id: WorkerId, until: Option<Instant>) -> bool {
        let Some(worker) = self.workers.get_mut(&id) else { return false };
        worker.removed = Some(until);
        if let Some(link) = &mut worker.link {
            link.bell.ring();
        }
        self.no_more_for(id);
        true
    }

    /// The worker takes no more: what it was not sent yet goes to others.
    fn no_more_for(&mut self, id: WorkerId) {
        let Some(link) = self.link(id) else { return };
        link.state = WorkerState::Draining;
        let unsent = std::mem::take(&mut link.assigned);
        link.unanswered -= unsent.len() as u64;
        link.offered -= unsent.len() as u64;
        self.put_back(unsent);
        self.distribute();
    }

    /// The worker is gone. `unanswered` is what it was sent and had not answered, `unsent` what it was not even sent.
    pub(super) fn retired(
        &mut self,
        id: WorkerId,
        cause: &Cause,
        unanswered: impl Iterator<Item = Job>,
        unsent: VecDeque<Job>,
        may_hold_copies: bool,
    ) {
        let retired = &mut self.totals.retired;
        *match cause {
            Cause::Ended => &mut retired.ended,
            Cause::Hung => &mut retired.hung,
            Cause::Misbehaved(_) => &mut retired.misbehaved,
            Cause::Drained => &mut retired.drained,
            Cause::Overdue => &mut retired.overdue,
        } += 1;
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.left = Some(cause.clone());
        let Some(link) = worker.link.take() else { return };
        if may_hold_copies {
            self.copies.add_holder(link.number);
        }
        self.put_back(link.assigned);
        self.put_back(unsent);
        let mut again = Vec::new();
        for mut job in unanswered {
            job.failures += u32::from(*cause != Cause::Drained);
            job.last = Some((link.number, Unadopted::Unanswered));
            if may_hold_copies {
                job.holders.push(link.number);
            }
            again.extend(self.unless_too_often(job, Unadopted::Unanswered));
        }
        self.put_back(again);
        self.distribute();
    }

    /// To be left out if too many workers were fenced lately.
    pub(super) fn may_fence(&mut self, now: Instant) -> bool {
        while self.fences.front().is_some_and(|fence| *fence + self.config.fence_window <= now) {
            self.fences.pop_front();
        }
        let may = self.fences.len() < self.config.max_fences;
        if may {
            self.fences.push_back(now);
        }
        may
    }

    // Connections go.

    /// Connections assigned to a worker, to be offered to it.
    pub(super) fn take_assigned(&mut self, id: WorkerId, most: usize, into: &mut VecDeque<Job>) {
        if let Some(link) = self.link(id) {
            let most = most.min(link.assigned.len());
            into.extend(link.assigned.drain(..most));
        }
    }

    /// Enters what a worker has said. What becomes of the connections that it adopted is up to the caller.
    pub(super) fn heard(&mut self, id: WorkerId, heard: &mut Heard) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(link) = &mut worker.link else { return };
        let number = link.number;
        let (adopted, rejected) = (heard.adopted.len() as u64, heard.rejected.len() as u64);
        link.demand = heard.demand.take().unwrap_or(link.demand);
        let mut unsent = std::mem::take(&mut heard.unsent);
        if std::mem::take(&mut heard.has_refused) {
            unsent.append(&mut link.assigned);
        }
        link.offered -= unsent.len() as u64;
        link.unanswered -= unsent.len() as u64;
        link.adopted += adopted;
        link.unanswered -= adopted + rejected;
        link.finished = heard.finished.take().unwrap_or(link.finished);
        link.alone &= link.unanswered > 0;
        worker.adopted += adopted;
        worker.rejected += rejected;
        self.totals.adopted += adopted;
        self.totals.offered_again += std::mem::take(&mut heard.offered_again);
        let mut again = Vec::new();
        for (mut job, reason) in heard.rejected.drain(..) {
            job.failures += u32::from(reason == RejectReason::Unusable);
            job.last = Some((number, Unadopted::Rejected(reason)));
            again.extend(self.unless_too_often(job, Unadopted::Rejected(reason)));
        }
        again.extend(unsent);
        self.put_back(again);
        if std::mem::take(&mut heard.draining) {
            self.no_more_for(id);
        }
        self.distribute();
    }

    /// Number of connections that were neither adopted nor given back.
    pub(super) fn on_their_way(&self) -> usize {
        self.waiting_connections() + self.unanswered()
    }

    /// Whether waiting changes nothing any more for those that are on their way: what waits does so for nobody.
    pub(super) fn is_settled(&self) -> bool {
        let nobody_comes = self.workers.values().all(|worker| worker.removed.is_some());
        self.unanswered() == 0 && (nobody_comes || self.waiting_connections() == 0)
    }

    fn unanswered(&self) -> usize {
        self.workers.values().flat_map(|worker| &worker.link).map(|link| link.unanswered as usize).sum()
    }
}
