//! The end of a worker, and of the dispatcher.

use std::{
    process::ExitStatus,
    time::{Duration, Instant},
};

use super::{
    Event, Failure, Leftover, Phase, Pool, ProcessId, ProcessInfo, ProcessState, Remains,
    RetireCause, WorkerExit, WorkerId,
};
use crate::handoff::dispatcher::Group;

impl<C> Pool<C> {
    /// A worker is gone: it can adopt nothing more, and everything that it had sent was received.
    /// The last `unsent` offers have not been sent to it. Returns true if the end of its process
    /// matters: it may hold copies of what it was sent, or the dispatcher keeps some for it.
    pub(in crate::handoff::dispatcher) fn retire(
        &mut self,
        id: WorkerId,
        cause: &RetireCause,
        unsent: usize,
        state: ProcessState,
        now: Instant,
    ) -> bool {
        self.totals.retired.count(cause);
        let is_ours = self.is_ours(id);
        let worker = self.workers.get_mut(&id);
        let Some((worker, account)) =
            worker.and_then(|worker| worker.account.take().map(|account| (worker, account)))
        else {
            return false;
        };
        let ProcessInfo { id: process, pid, is_child } = account.process;
        let status = match state {
            ProcessState::Ended(status) => status,
            ProcessState::Lives { .. } => None,
        };
        worker.retired.count(cause);
        worker.last_exit = Some(WorkerExit {
            cause: cause.clone(),
            pid,
            status,
            lifetime: now.saturating_duration_since(account.since),
            unanswered: account.pending(),
            active: account.active(),
            restart_in: None,
        });
        if !account.clock.is_greeted() && matches!(cause, RetireCause::Misbehaved(_)) {
            self.totals.refused_workers += 1;
        }
        // A connection is not to blame for the end of another dispatcher.
        let has_failed = *cause != RetireCause::Drained && self.successor != Some(id);
        let Remains { mut unanswered, unseen, repeated } = account.retire(unsent);
        self.totals.offered_again -= repeated;

        // Its process may hold these as long as it lives.
        let may_hold_copies = match state {
            ProcessState::Lives { has_received } if !unanswered.is_empty() => {
                let fds = unanswered.iter().map(|pending| pending.fds).sum();
                self.stale.add_holder(process, if has_received { 0 } else { fds });
                true
            }
            _ => false,
        };
        for pending in &mut unanswered {
            pending.on_unanswered(id, has_failed);
            if may_hold_copies && !pending.holders.contains(&process) {
                pending.holders.push(process);
            }
        }

        self.put_back(unanswered.into_iter().chain(unseen));
        if let ProcessState::Ended(status) = state {
            self.on_process_end(process, status);
        } else if is_child && is_ours {
            self.leftovers.insert(process, Leftover { worker: id, pid });
        }
        self.on_new_gone(id, now);
        self.distribute(now);
        may_hold_copies || self.stale.are_kept_for(process)
    }

    /// A process has ended, and its copies with it.
    pub(in crate::handoff::dispatcher) fn on_process_end(
        &mut self,
        process: ProcessId,
        status: Option<ExitStatus>,
    ) {
        if let Some(Leftover { worker, pid }) = self.leftovers.remove(&process)
            && let Some(exit) =
                self.workers.get_mut(&worker).and_then(|worker| worker.last_exit.as_mut())
            && exit.pid == pid
        // otherwise another process of this worker has left meanwhile
        {
            exit.status = status;
        }
        self.stale.on_process_end(process, &mut self.events);
    }

    /// The number of processes that the dispatcher has started and that have not ended, though
    /// their links have.
    pub(in crate::handoff::dispatcher) fn leftover(&self) -> usize {
        self.leftovers.len()
    }

    /// The number of those of one worker.
    pub(in crate::handoff::dispatcher) fn leftover_of(&self, id: WorkerId) -> usize {
        self.leftovers.values().filter(|leftover| leftover.worker == id).count()
    }

    /// A worker that has left is going to be started again.
    pub(in crate::handoff::dispatcher) fn restart_in(&mut self, id: WorkerId, wait: Duration) {
        if let Some(exit) = self.workers.get_mut(&id).and_then(|worker| worker.last_exit.as_mut()) {
            exit.restart_in = Some(wait);
        }
    }

    /// Keeps the dispatcher's copy of a connection that a process has adopted, as long as one of
    /// the holders may have another.
    pub(in crate::handoff::dispatcher) fn keep(
        &mut self,
        connection: C,
        adopter: ProcessId,
        holders: Vec<ProcessId>,
    ) {
        self.stale.keep(connection, adopter, holders, &mut self.events);
    }

    /// Nothing more is taken. Workers have until then.
    pub(in crate::handoff::dispatcher) fn drain(&mut self, until: Option<Instant>, now: Instant) {
        self.phase = self.phase.max(Phase::Draining);
        self.drain_until = until;
        self.groups.remove_tickets();
        self.roll_all_back(now);
    }

    pub(in crate::handoff::dispatcher) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Returns true if nothing is taken from now on, whatever was accepted before.
    pub(in crate::handoff::dispatcher) fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// No worker adopts what waits, and all workers leave.
    pub(in crate::handoff::dispatcher) fn close(&mut self, now: Instant) {
        self.phase = Phase::Closed;
        for connection in self.groups.take_connections() {
            self.events.push(Event::Failed { connection, failure: Failure::Draining });
        }
        for id in Vec::from_iter(self.workers.keys().copied()) {
            self.remove(id, self.drain_until, now);
        }
    }

    /// Returns true if waiting changes nothing for the connections that are on their way: what
    /// waits does so for nobody.
    pub(in crate::handoff::dispatcher) fn is_settled(&self) -> bool {
        let has_worker = |group: &Group| {
            self.workers.values().any(|worker| worker.removed.is_none() && worker.group == *group)
        };
        let mut waited_for = self.groups.iter().filter(|(_, state)| state.queue.connections() > 0);
        self.pending() == 0 && !waited_for.any(|(group, _)| has_worker(group))
    }
}
