//! A connection that no worker has adopted yet, with its history.

use std::time::Instant;

use super::ProcessId;
use crate::handoff::{
    dispatcher::{Group, Unadopted, WorkerId},
    protocol::RejectReason,
};

/// A connection, and the outcomes of its offers so far.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Pending<C> {
    pub(super) connection: C,
    /// The time when the dispatcher got it.
    pub(super) since: Instant,
    /// The connection goes to a worker of this group.
    pub(super) group: Group,
    /// With the strategy `ByKey`, connections with equal keys go to the same worker.
    pub(super) key: u64,
    /// The number of its descriptors.
    pub(super) fds: usize,
    /// The number of offers made.
    pub(super) offers: u32,
    /// The number of offers after which the worker was gone or could not use the connection.
    /// `failures <= offers`.
    pub(super) failures: u32,
    /// A worker was gone after at least one of these offers.
    has_ended_a_worker: bool,
    /// The workers that have failed with the connection, each once.
    pub(super) failed_with: Vec<WorkerId>,
    /// The workers that had no room or no time for the connection, each once.
    pub(super) refused_by: Vec<WorkerId>,
    /// The outcome of the last offer.
    last: Unadopted,
    /// The number of the last offer, and the time when it was made.
    pub(super) number: u64,
    pub(super) offered_at: Option<Instant>,
    /// The connection is a suspect, and has to stay the only pending connection of its worker.
    pub(super) is_alone: bool,
    /// The time since which the connection waits as a suspect.
    pub(super) suspect_since: Option<Instant>,
    /// The processes of retired workers that may still hold a copy.
    pub(super) holders: Vec<ProcessId>,
}

/// The facts about a connection that decide which worker can get it.
#[derive(Debug)]
pub(in crate::handoff::dispatcher) struct Needs {
    pub(in crate::handoff::dispatcher) group: Group,
    pub(in crate::handoff::dispatcher) key: u64,
    pub(in crate::handoff::dispatcher) fds: usize,
}

/// The reason why the dispatcher gives up a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher) enum GiveUpReason {
    /// All workers that could have taken the connection have failed with it.
    TooManyOffers { offers: u32, last: Unadopted },
    /// The dispatcher drains.
    Draining,
}

impl<C> Pending<C> {
    pub(super) fn new(connection: C, needs: Needs, now: Instant) -> Self {
        let Needs { group, key, fds } = needs;
        Self {
            connection,
            since: now,
            group,
            key,
            fds,
            offers: 0,
            failures: 0,
            has_ended_a_worker: false,
            failed_with: Vec::new(),
            refused_by: Vec::new(),
            last: Unadopted::Unanswered,
            number: 0,
            offered_at: None,
            is_alone: false,
            suspect_since: None,
            holders: Vec::new(),
        }
    }

    /// Counts an offer of this number.
    pub(super) fn offer(&mut self, number: u64, now: Instant) {
        self.offers += 1;
        self.number = number;
        self.offered_at = Some(now);
    }

    /// Notes that a worker has rejected the connection. Only `Unusable` counts as a failure.
    pub(super) fn on_rejected(&mut self, by: WorkerId, reason: RejectReason) {
        self.last = Unadopted::Rejected(reason);
        match reason {
            RejectReason::Unusable => self.on_failure(by),
            _ if self.refused_by.contains(&by) => {}
            _ => self.refused_by.push(by),
        }
    }

    /// Notes that a worker has left without an answer. `has_failed` is false if the connection
    /// cannot be to blame.
    pub(super) fn on_unanswered(&mut self, by: WorkerId, has_failed: bool) {
        self.last = Unadopted::Unanswered;
        if has_failed {
            self.has_ended_a_worker = true;
            self.on_failure(by);
        }
    }

    fn on_failure(&mut self, with: WorkerId) {
        self.failures += 1;
        if !self.failed_with.contains(&with) {
            self.failed_with.push(with);
        }
    }

    /// Returns true if the connection may be given up after its next failure. It then waits for a
    /// worker that has not failed with it.
    pub(super) fn is_at_last_attempt(&self, max_offers: u32) -> bool {
        self.failures > 0 && self.failures + 1 >= max_offers
    }

    /// Returns true if the connection may be crashing its workers and is at its last attempt. That
    /// attempt goes to a worker with no other pending connections, so that no innocent connection
    /// becomes a suspect.
    pub(super) fn is_suspect(&self, max_offers: u32) -> bool {
        self.has_ended_a_worker && self.is_at_last_attempt(max_offers)
    }

    pub(super) fn too_many_offers(&self) -> GiveUpReason {
        GiveUpReason::TooManyOffers { offers: self.offers, last: self.last }
    }
}
