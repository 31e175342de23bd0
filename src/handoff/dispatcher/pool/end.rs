//! The end of a worker, of its process, and of the dispatcher.

use std::{
    process::ExitStatus,
    time::{Duration, Instant},
};

use super::{
    Event, GiveUpReason, Leftover, Pool, PoolPhase, ProcessId, ProcessInfo, ProcessState, Remains,
    RetireCause, WorkerExit, WorkerId,
};
use crate::handoff::dispatcher::Group;

impl<C> Pool<C> {
    /// Retires a worker that can adopt nothing more, after everything that it had sent was
    /// received. The last `unsent` of its offers were not sent.
    ///
    /// Returns true if the caller has to report the [end of its process](Self::on_process_end):
    /// either the process may hold copies of offers, or the dispatcher keeps copies of connections
    /// that it has adopted.
    pub(in crate::handoff::dispatcher) fn retire(
        &mut self,
        id: WorkerId,
        cause: &RetireCause,
        unsent: usize,
        state: ProcessState,
        now: Instant,
    ) -> bool {
        // Close the account, and note how the worker has ended.
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
        if !account.timeouts.is_greeted() && matches!(cause, RetireCause::Misbehaved(_)) {
            self.totals.refused_workers += 1;
        }
        // Take what is left in the account. If the successor fails, which is another dispatcher, no
        // connection is to blame for that.
        let has_failed = *cause != RetireCause::Drained && self.successor != Some(id);
        let Remains { mut unanswered, never_sent, repeated } = account.retire(unsent);
        self.totals.offered_again -= repeated;

        // The process may hold copies of the offers that it was sent, for as long as it lives.
        let may_hold_copies = match state {
            ProcessState::Lives { has_received } if !unanswered.is_empty() => {
                let fds = unanswered.iter().map(|pending| pending.fds).sum();
                self.kept.add_holder(process, if has_received { 0 } else { fds });
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

        // Others get these connections. The end of the process is handled apart from that.
        self.put_back(unanswered.into_iter().chain(never_sent));
        if let ProcessState::Ended(status) = state {
            self.on_process_end(process, status);
        } else if is_child && is_ours {
            self.leftovers.insert(process, Leftover { worker: id, pid });
        }
        self.on_new_gone(id, now);
        self.distribute(now);
        may_hold_copies || self.kept.are_kept_for(process)
    }

    /// Notes that a process has ended. Its copies of connections have ended with it.
    pub(in crate::handoff::dispatcher) fn on_process_end(
        &mut self,
        process: ProcessId,
        status: Option<ExitStatus>,
    ) {
        if let Some(Leftover { worker, pid }) = self.leftovers.remove(&process)
            && let Some(exit) =
                self.workers.get_mut(&worker).and_then(|worker| worker.last_exit.as_mut())
            // If the pids differ, a later process of this worker has left meanwhile.
            && exit.pid == pid
        {
            exit.status = status;
        }
        self.kept.on_process_end(process, &mut self.events);
    }

    /// The number of processes that the dispatcher has started, whose links have ended, and that
    /// have not ended themselves.
    pub(in crate::handoff::dispatcher) fn leftover(&self) -> usize {
        self.leftovers.len()
    }

    /// The number of such processes of one worker.
    pub(in crate::handoff::dispatcher) fn leftover_of(&self, id: WorkerId) -> usize {
        self.leftovers.values().filter(|leftover| leftover.worker == id).count()
    }

    /// Notes that a worker that has left is going to be started again after this time.
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
        self.kept.keep(connection, adopter, holders, &mut self.events);
    }

    /// Begins a drain: from now on no connection is taken with
    /// [`Admission::None`](super::Admission). Workers get `until` as their deadline when the pool
    /// is closed.
    pub(in crate::handoff::dispatcher) fn drain(&mut self, until: Option<Instant>, now: Instant) {
        self.phase = self.phase.max(PoolPhase::Draining);
        self.drain_until = until;
        self.groups.remove_tickets();
        self.roll_all_back(now);
    }

    pub(in crate::handoff::dispatcher) fn is_open(&self) -> bool {
        self.phase == PoolPhase::Open
    }

    /// Returns true if no connection is taken, not even one that was accepted before the drain.
    pub(in crate::handoff::dispatcher) fn is_closed(&self) -> bool {
        self.phase == PoolPhase::Closed
    }

    /// Gives up all connections that wait, and lets all workers drain and leave.
    pub(in crate::handoff::dispatcher) fn close(&mut self, now: Instant) {
        self.phase = PoolPhase::Closed;
        for connection in self.groups.take_connections() {
            self.events.push(Event::GivenUp { connection, reason: GiveUpReason::Draining });
        }
        for id in Vec::from_iter(self.workers.keys().copied()) {
            self.remove(id, self.drain_until, now);
        }
    }

    /// Returns true if a longer wait would help no connection: none is planned or offered, and
    /// those that wait have no worker in their group.
    pub(in crate::handoff::dispatcher) fn is_settled(&self) -> bool {
        let has_worker = |group: &Group| {
            self.workers.values().any(|worker| worker.removed.is_none() && worker.group == *group)
        };
        let mut waited_for = self.groups.iter().filter(|(_, state)| state.queue.connections() > 0);
        self.pending() == 0 && !waited_for.any(|(group, _)| has_worker(group))
    }
}
