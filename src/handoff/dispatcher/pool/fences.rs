//! How many hung workers were fenced lately.

use std::{collections::VecDeque, time::Instant};

use crate::handoff::dispatcher::builder::Config;

/// When hung workers were fenced. Those that have connected are counted apart: by hanging they keep
/// no worker that the dispatcher has started from being fenced.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub(super) struct Fences {
    children: VecDeque<Instant>,
    peers: VecDeque<Instant>,
}

impl Fences {
    /// Counts another fence. Returns false if there were too many: the fault may be one of the
    /// whole machine.
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
