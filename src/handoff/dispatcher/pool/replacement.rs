//! The replacement of the workers of a group.
//!
//! The new workers get nothing until all of them have sent HELLO. Then the old workers are asked to
//! drain. If a new worker leaves before that, or the dispatcher drains, the new workers are asked
//! to drain instead:
//!
//! ```text
//! Starting ── all are ready ──> Switched ───> over when the old ones have left
//!     └────── one has left ──> RolledBack ──> over when the new ones have left
//! ```

use std::time::{Duration, Instant};

use super::{Drain, Event, Pool, WorkerId, WorkerStats};
use crate::handoff::dispatcher::Group;

/// The number of a replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::handoff::dispatcher) struct ReplacementId(u64);

/// One replacement, from its beginning until its caller has taken the outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Replacement {
    group: Group,
    phase: ReplacementPhase,
    /// How long the old workers have to finish their connections. `None` without a limit.
    within: Option<Duration>,
    /// The workers that the group had at the beginning.
    old: Vec<WorkerId>,
    new: Vec<WorkerId>,
    /// All new workers were added.
    is_complete: bool,
    /// The new worker that has left before the switch.
    failed: Option<WorkerId>,
    /// The old workers that have left for good so far, and the failed one if it has.
    departed: Vec<WorkerStats>,
}

/// The phases of a replacement. The last two are decisions, which never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ReplacementPhase {
    /// Not all new workers are ready.
    Starting,
    /// The old workers have to leave.
    Switched,
    /// The new workers have to leave.
    RolledBack,
}

/// The reason why a replacement cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::handoff::dispatcher) enum Refusal {
    /// New workers of the group are starting already.
    InProgress,
    Draining,
}

/// How a replacement has ended.
#[derive(Debug)]
pub(in crate::handoff::dispatcher) enum Outcome {
    /// The new workers serve. `old` has the statistics of the old workers that have left.
    Switched { new: Vec<WorkerId>, old: Vec<WorkerStats> },
    /// The old workers go on. `failed` is the new worker that has left, if that was the reason.
    RolledBack { failed: Option<WorkerStats> },
}

impl<C> Pool<C> {
    /// Begins the replacement of all workers that a group has now.
    ///
    /// # Errors
    /// Returns an error if the dispatcher does not stay, or if new workers of the group are
    /// starting.
    pub(in crate::handoff::dispatcher) fn begin_replacement(
        &mut self,
        group: &Group,
        within: Option<Duration>,
    ) -> Result<ReplacementId, Refusal> {
        // Refuse it if new workers could not take over.
        if !self.is_open() || self.is_succeeded() {
            return Err(Refusal::Draining);
        }
        let is_starting = |other: &Replacement| {
            other.group == *group && other.phase == ReplacementPhase::Starting
        };
        if self.replacements.values().any(is_starting) {
            return Err(Refusal::InProgress);
        }

        // Workers that have to leave already are not part of it.
        let old = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.group == *group && worker.removed.is_none());
        let replacement = Replacement {
            group: group.clone(),
            phase: ReplacementPhase::Starting,
            within,
            old: old.map(|(id, _)| *id).collect(),
            new: Vec::new(),
            is_complete: false,
            failed: None,
            departed: Vec::new(),
        };
        self.last_replacement += 1;
        let id = ReplacementId(self.last_replacement);
        self.replacements.insert(id, replacement);
        Ok(id)
    }

    /// Adds a new worker, whose process was started. The worker has to leave if the replacement was
    /// rolled back meanwhile.
    pub(in crate::handoff::dispatcher) fn add_new_worker(
        &mut self,
        id: ReplacementId,
        program: String,
        now: Instant,
    ) -> WorkerId {
        let group = self.replacements.get(&id).map(|replacement| replacement.group.clone());
        let new = self.add_worker(group.unwrap_or_default(), Some(program));
        let leave_by = now + self.config.exit_timeout;
        let is_open = self.is_open();
        let replacement = self.replacements.get_mut(&id);
        let is_starting = is_open
            && replacement.as_ref().is_some_and(|it| it.phase == ReplacementPhase::Starting);
        if let Some(worker) = self.workers.get_mut(&new) {
            if is_starting {
                worker.replacement = Some(id);
            } else {
                worker.removed.get_or_insert(Drain { until: Some(leave_by) });
            }
        }
        if let Some(replacement) = replacement {
            replacement.new.push(new);
        }
        new
    }

    /// Notes that all new workers were added.
    pub(in crate::handoff::dispatcher) fn complete_replacement(
        &mut self,
        id: ReplacementId,
        now: Instant,
    ) {
        if let Some(replacement) = self.replacements.get_mut(&id) {
            replacement.is_complete = true;
        }
        self.switch_if_ready(id, now);
    }

    /// Notes that a new worker is ready.
    pub(super) fn on_new_ready(&mut self, id: ReplacementId, now: Instant) {
        self.switch_if_ready(id, now);
    }

    /// Asks the old workers to drain if all new workers were added and are ready.
    fn switch_if_ready(&mut self, id: ReplacementId, now: Instant) {
        let Some(replacement) = self.replacements.get(&id) else { return };
        let is_ready = |new: &WorkerId| {
            let account = self.workers.get(new).and_then(|worker| worker.account.as_ref());
            account.is_some_and(|account| account.timeouts.is_greeted())
        };
        let is_starting =
            replacement.phase == ReplacementPhase::Starting && replacement.is_complete;
        if !is_starting || !replacement.new.iter().all(is_ready) {
            return;
        }
        // Release the new workers first, so that they can take what the old ones give back.
        let (old, until) = (replacement.old.clone(), replacement.within.map(|within| now + within));
        self.set_phase(id, ReplacementPhase::Switched);
        for id in old {
            // A worker that has to leave already keeps its own deadline.
            if !self.is_removed(id) {
                self.remove(id, until, now);
            }
        }
        self.distribute(now);
    }

    /// Rolls back the undecided replacement of a new worker whose link has ended.
    pub(super) fn on_new_gone(&mut self, gone: WorkerId, now: Instant) {
        let id = self.workers.get(&gone).and_then(|worker| worker.replacement);
        if let Some(id) = id {
            self.roll_back(id, Some(gone), now);
        }
    }

    /// Asks the new workers to drain, so the old ones go on. Does nothing if the replacement is
    /// decided.
    pub(in crate::handoff::dispatcher) fn roll_back(
        &mut self,
        id: ReplacementId,
        failed: Option<WorkerId>,
        now: Instant,
    ) {
        let Some(replacement) = self.replacements.get_mut(&id) else { return };
        if replacement.phase != ReplacementPhase::Starting {
            return;
        }
        replacement.failed = failed;
        let new = replacement.new.clone();
        self.set_phase(id, ReplacementPhase::RolledBack);
        let leave_by = now + self.config.exit_timeout; // they have no connections
        for id in new {
            self.remove(id, Some(leave_by), now);
        }
    }

    /// Rolls back all undecided replacements.
    pub(super) fn roll_all_back(&mut self, now: Instant) {
        for id in Vec::from_iter(self.replacements.keys().copied()) {
            self.roll_back(id, None, now);
        }
    }

    /// Decides a replacement. From then on its new workers are treated as all others.
    fn set_phase(&mut self, id: ReplacementId, phase: ReplacementPhase) {
        let Some(replacement) = self.replacements.get_mut(&id) else { return };
        replacement.phase = phase;
        for new in &replacement.new {
            if let Some(worker) = self.workers.get_mut(new) {
                worker.replacement = None;
                worker.account.iter_mut().for_each(|account| account.is_held_back = false);
            }
        }
        self.events.push(Event::Changed);
    }

    /// Notes the statistics of a worker that has left for good, for the outcome.
    pub(super) fn on_departed(&mut self, worker: &WorkerStats) {
        for replacement in self.replacements.values_mut() {
            if replacement.old.contains(&worker.id) || replacement.failed == Some(worker.id) {
                replacement.departed.push(worker.clone());
            }
        }
    }

    pub(in crate::handoff::dispatcher) fn is_starting(&self, id: ReplacementId) -> bool {
        self.phase_of(id) == Some(ReplacementPhase::Starting)
    }

    pub(super) fn phase_of(&self, id: ReplacementId) -> Option<ReplacementPhase> {
        self.replacements.get(&id).map(|replacement| replacement.phase)
    }

    /// Returns true if the workers that had to leave have left.
    pub(in crate::handoff::dispatcher) fn is_replacement_over(&self, id: ReplacementId) -> bool {
        self.replacements.get(&id).is_none_or(|replacement| {
            let leaving = match replacement.phase {
                ReplacementPhase::Starting => return false,
                ReplacementPhase::Switched => &replacement.old,
                ReplacementPhase::RolledBack => &replacement.new,
            };
            !leaving.iter().any(|id| self.workers.contains_key(id))
        })
    }

    /// Ends a replacement, for which nobody waits any longer, and returns its outcome. An undecided
    /// replacement is rolled back.
    pub(in crate::handoff::dispatcher) fn end_replacement(
        &mut self,
        id: ReplacementId,
        now: Instant,
    ) -> Option<Outcome> {
        self.roll_back(id, None, now);
        let Replacement { phase, new, mut departed, failed, .. } = self.replacements.remove(&id)?;
        Some(match phase {
            ReplacementPhase::Switched => Outcome::Switched { new, old: departed },
            _ => {
                departed.retain(|worker| Some(worker.id) == failed);
                Outcome::RolledBack { failed: departed.pop() }
            }
        })
    }
}
