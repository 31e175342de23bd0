//! The limit on how many hung workers may be fenced in a time.

use std::{collections::VecDeque, time::Instant};

use crate::handoff::dispatcher::builder::Config;

/// The times when hung workers were fenced, the oldest first. Workers that have connected by
/// themselves are counted apart, so they cannot use up the fences of workers that the dispatcher
/// has started.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub(super) struct Fences {
    children: VecDeque<Instant>,
    peers: VecDeque<Instant>,
}

impl Fences {
    /// Counts another fence. Returns false, and counts nothing, if there were too many recently:
    /// the whole machine may be at fault then.
    pub(super) fn may_fence(&mut self, is_child: bool, config: &Config, now: Instant) -> bool {
        let fences = if is_child { &mut self.children } else { &mut self.peers };
        while fences.front().is_some_and(|fence| *fence + config.fence_window <= now) {
            fences.pop_front();
        }
        let may = fences.len() < config.max_fences;
        if may {
            fences.push_back(now);
        }
        may
    }
}
