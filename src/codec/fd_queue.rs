use std::{collections::VecDeque, os::fd::OwnedFd};

use crate::Fds;

/// Descriptors that arrived and that no message has claimed yet, first in first out.
#[derive(Debug)]
pub struct FdQueue<F = OwnedFd> {
    fds: VecDeque<F>,
    /// More descriptors were sent behind these, and the kernel lost them.
    lost: bool,
    /// What was lost has been asked for.
    fell_short: bool,
}

impl<F> FdQueue<F> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { fds: VecDeque::new(), lost: false, fell_short: false }
    }

    /// Number of descriptors that wait.
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }

    /// Takes the descriptor that arrived first.
    pub fn pop(&mut self) -> Option<F> {
        self.fell_short |= self.lost && self.fds.is_empty();
        self.fds.pop_front()
    }

    /// Takes the `count` descriptors that arrived first; none if fewer wait.
    #[inline]
    pub fn take(&mut self, count: usize) -> Option<Fds<F>> {
        self.fell_short |= self.lost && count > self.fds.len();
        if count > self.fds.len() {
            return None;
        }
        let mut taken = Fds::new();
        while taken.len() < count {
            taken.push(self.fds.pop_front()?);
        }
        Some(taken)
    }

    /// Takes all descriptors that wait.
    pub fn take_all(&mut self) -> Fds<F> {
        self.fell_short |= self.lost;
        self.fds.drain(..).collect()
    }

    /// From here on, messages may be without descriptors that they were sent with.
    pub(crate) fn set_lost(&mut self) {
        self.lost = true;
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether a message may have got fewer descriptors than it was sent with.
    pub(crate) fn fell_short(&self) -> bool {
        self.fell_short
    }
}

impl<F> Default for FdQueue<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Extend<F> for FdQueue<F> {
    fn extend<I: IntoIterator<Item = F>>(&mut self, fds: I) {
        // One by one: mostly there is one, for which `VecDeque::extend` takes five times as long.
        fds.into_iter().for_each(|fd| self.fds.push_back(fd));
    }
}

impl<F> FromIterator<F> for FdQueue<F> {
    fn from_iter<I: IntoIterator<Item = F>>(fds: I) -> Self {
        Self { fds: fds.into_iter().collect(), ..Self::new() }
    }
}

impl<F> From<FdQueue<F>> for Vec<F> {
    fn from(queue: FdQueue<F>) -> Self {
        queue.fds.into()
    }
}
