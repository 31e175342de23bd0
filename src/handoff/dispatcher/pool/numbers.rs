//! The statistics of a dispatcher, and the counters behind them.

use std::time::{Duration, Instant};

use super::{Account, Pool, RetireCounts, WorkerId, WorkerStats};
use crate::handoff::dispatcher::{AdoptionTimes, GroupStats, WorkerState};

/// The most workers whose statistics are kept after they have left for good.
const MAX_DEPARTED: usize = 32;

/// Counters of connections and of retired workers since the dispatcher began.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher) struct Totals {
    pub(in crate::handoff::dispatcher) dispatched: u64,
    pub(in crate::handoff::dispatcher) adopted: u64,
    pub(in crate::handoff::dispatcher) offered_again: u64,
    /// How often the kernel lacked a resource to send offers with.
    pub(in crate::handoff::dispatcher) send_shortages: u64,
    pub(in crate::handoff::dispatcher) retired: RetireCounts,
    /// Workers that were retired because they had broken the protocol before the end of the
    /// handshake.
    pub(in crate::handoff::dispatcher) refused_workers: u64,
    pub(in crate::handoff::dispatcher) adoption_times: AdoptionTimes,
}

impl<C> Pool<C> {
    /// The number of connections that a worker has not answered.
    #[cfg(test)]
    pub(in crate::handoff::dispatcher) fn unanswered(&self, id: WorkerId) -> u64 {
        self.workers.get(&id).and_then(|worker| worker.account.as_ref()).map_or(0, Account::pending)
    }

    /// The number of connections that are planned or offered.
    pub(super) fn pending(&self) -> u64 {
        self.accounts().map(|(_, _, account)| account.pending()).sum()
    }

    /// The number of connections that wait for a worker with room.
    pub(in crate::handoff::dispatcher) fn waiting(&self) -> usize {
        self.groups.connections()
    }

    #[cfg(test)]
    pub(in crate::handoff::dispatcher) fn waiters(&self) -> usize {
        self.groups.iter().map(|(_, group)| group.queue.len()).sum()
    }

    /// The number of connections that were neither adopted nor given up.
    pub(in crate::handoff::dispatcher) fn on_their_way(&self) -> u64 {
        self.waiting() as u64 + self.pending()
    }

    /// Returns the statistics of all groups.
    pub(in crate::handoff::dispatcher) fn groups(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = GroupStats> {
        self.groups.iter().map(move |(group, state)| GroupStats {
            group: group.clone(),
            workers: state.workers,
            waiting: state.queue.connections(),
            waiting_for_slot: state.queue.tickets(),
            slot_wait: state.queue.first_ticket().map(|since| now.saturating_duration_since(since)),
        })
    }

    pub(in crate::handoff::dispatcher) fn workers(&self) -> impl Iterator<Item = WorkerStats> {
        self.workers.keys().filter_map(|id| self.worker(*id))
    }

    /// Returns the statistics of a worker, which has not left for good.
    pub(in crate::handoff::dispatcher) fn worker(&self, id: WorkerId) -> Option<WorkerStats> {
        let worker = self.workers.get(&id)?;
        let account = worker.account.as_ref();
        Some(WorkerStats {
            id,
            group: worker.group.clone(),
            program: worker.program.clone(),
            pid: account.and_then(|account| account.process.pid),
            state: account.map_or(WorkerState::Restarting, Account::state),
            restarts: worker.restarts,
            retired: worker.retired,
            last_exit: worker.last_exit.clone(),
            credit: account.map_or(0, Account::room),
            unanswered: account.map_or(0, Account::pending),
            active: account.map_or(0, Account::active),
            adopted: worker.adopted,
            rejected: worker.rejected,
            leftover: self.leftover_of(id),
        })
    }

    /// Returns the workers that have left for good most recently. The first one left first.
    pub(in crate::handoff::dispatcher) fn departed(&self) -> impl Iterator<Item = &WorkerStats> {
        self.departed.iter()
    }

    /// Keeps the statistics of a worker that leaves for good.
    pub(super) fn depart(&mut self, id: WorkerId) {
        let Some(worker) = self.worker(id) else { return };
        if self.departed.len() == MAX_DEPARTED {
            self.departed.pop_front();
        }
        let worker =
            WorkerStats { state: WorkerState::Gone, credit: 0, unanswered: 0, active: 0, ..worker };
        self.on_departed(&worker);
        self.departed.push_back(worker);
    }

    /// Returns how long the first of the callers that wait for a slot has been waiting.
    pub(in crate::handoff::dispatcher) fn slot_wait(&self, now: Instant) -> Option<Duration> {
        self.groups.first_ticket().map(|since| now.saturating_duration_since(since))
    }
}
