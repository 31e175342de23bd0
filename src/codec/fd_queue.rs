use std::{collections::VecDeque, os::fd::OwnedFd};

use crate::Fds;

/// Descriptors that arrived and that no message has claimed yet, first in first out.
#[derive(Debug)]
pub struct FdQueue<F = OwnedFd>(VecDeque<F>);

impl<F> FdQueue<F> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Number of descriptors that wait.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the descriptor that arrived first.
    pub fn pop(&mut self) -> Option<F> {
        self.0.pop_front()
    }

    /// Takes the `count` descriptors that arrived first; none if fewer wait.
    pub fn take(&mut self, count: usize) -> Option<Fds<F>> {
        match count {
            0 => Some(Fds::new()),
            _ => (count <= self.0.len()).then(|| self.0.drain(..count).collect()),
        }
    }

    /// Takes all descriptors that wait.
    pub fn take_all(&mut self) -> Fds<F> {
        self.0.drain(..).collect()
    }
}

impl<F> Default for FdQueue<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Extend<F> for FdQueue<F> {
    fn extend<I: IntoIterator<Item = F>>(&mut self, fds: I) {
        self.0.extend(fds);
    }
}

impl<F> FromIterator<F> for FdQueue<F> {
    fn from_iter<I: IntoIterator<Item = F>>(fds: I) -> Self {
        Self(fds.into_iter().collect())
    }
}

impl<F> From<FdQueue<F>> for Vec<F> {
    fn from(queue: FdQueue<F>) -> Self {
        queue.0.into()
    }
}
