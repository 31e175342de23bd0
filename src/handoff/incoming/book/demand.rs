//! The demand of a worker: how many offers it asks for, and when.

use std::time::{Duration, Instant};

use super::{Book, BookPhase, Refusal};
use crate::handoff::{IncomingStats, protocol::FromWorker};

/// How long to wait before free descriptors are counted again.
pub(super) const COUNT_AFTER: Duration = Duration::from_millis(10);

impl<T> Book<T> {
    /// The number of further offers that could be asked for, if there were enough descriptors.
    pub(super) fn room(&self) -> u64 {
        if !self.is_welcomed || !self.has_asked || self.is_busy || self.phase != BookPhase::Open {
            return 0;
        }
        // For example: 7 adopted, 2 rejected and replaced, and a limit of 64 allow a demand of 73
        // in total. A demand of 70 so far leaves room for 3 offers.
        let limit = self.window.min(self.max_connections.saturating_sub(self.serving()));
        (self.adopted + self.replaced + limit).saturating_sub(self.demand)
    }

    /// Asks for as many offers as there is room for and as there are descriptors for. `free` counts
    /// the descriptors that this process may still open.
    pub(in crate::handoff) fn ask(&mut self, now: Instant, free: impl FnOnce() -> u64) {
        // Count free descriptors only if those of the last count do not suffice.
        let room = self.room();
        let wanted = room.saturating_mul(self.max_fds);
        if wanted > self.spare {
            let promised = self.on_their_way().saturating_mul(self.max_fds);
            // Use half of them only, because the application opens files too.
            self.spare = free().saturating_sub(promised).div_ceil(2);
        }
        let granted = room.min(self.spare / self.max_fds);
        self.count_at =
            if granted < room { self.count_at.or(Some(now + COUNT_AFTER)) } else { None };
        if granted > 0 {
            self.spare -= granted * self.max_fds;
            self.demand += granted;
            self.refusal = Refusal::None;
            self.messages.push_back(FromWorker::Demand { total: self.demand });
        }
    }

    /// Returns the numbers of the worker, earlier links included.
    pub(in crate::handoff) fn stats(&self) -> IncomingStats {
        IncomingStats {
            adopted: self.adopted_before + self.adopted,
            rejected: self.rejected_before + self.rejected,
            active: self.serving(),
            waiting: self.unanswered.len() as u64,
            requested: if self.phase == BookPhase::Ended { 0 } else { self.on_their_way() },
        }
    }

    /// The number of offers that were asked for and have not arrived.
    pub(super) fn on_their_way(&self) -> u64 {
        self.demand - self.offered
    }

    /// The number of adopted connections that have not ended.
    pub(super) fn serving(&self) -> u64 {
        self.open_before + self.adopted - self.finished
    }

    /// Returns true if the connection that has just ended has made room for an offer, because
    /// `max_connections` has limited the demand more than the window.
    pub(super) fn has_made_room(&self) -> bool {
        self.serving() + self.window >= self.max_connections
    }
}
