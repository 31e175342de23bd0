//! The offers that wait in the queue of a worker's task.

use std::collections::VecDeque;

/// The number of descriptors of each offer in the queue, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Sending {
    offers: VecDeque<usize>,
    fds: usize,
}

impl Sending {
    pub(super) fn add(&mut self, fds: usize) {
        self.offers.push_back(fds);
        self.fds += fds;
    }

    /// Returns the number of offers of which nothing was sent, if this many descriptors are in the
    /// queue.
    pub(super) fn unsent(&mut self, unsent_fds: usize) -> usize {
        while unsent_fds < self.fds {
            self.fds -= self.offers.pop_front().unwrap_or(self.fds);
        }
        self.offers.len()
    }
}
