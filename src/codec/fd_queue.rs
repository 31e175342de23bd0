use std::{
    collections::VecDeque,
    fmt, mem,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use smallvec::SmallVec;

use crate::{Fds, frame::Home};

/// Descriptors that arrived and that no message has claimed yet, first in first out.
///
/// Those that are still in it when it is dropped are closed [in the background](crate::close_in_background) if they came from a
/// peer.
pub struct FdQueue<F = OwnedFd> {
    fds: VecDeque<F>,
    /// More descriptors were sent behind these, and the kernel lost them.
    lost: bool,
    /// A decoder has asked for a descriptor that was lost, or for the number of descriptors.
    fell_short: AtomicBool,
    /// Number of descriptors that were taken out since the beginning.
    taken: u64,
    /// `None` in tests, and for descriptors that did not come from a peer.
    home: Option<Arc<dyn Home<F>>>,
}

impl<F> FdQueue<F> {
    /// Returns an empty queue.
    pub const fn new() -> Self {
        Self { fds: VecDeque::new(), lost: false, fell_short: AtomicBool::new(false), taken: 0, home: None }
    }

    /// Returns the number of descriptors that wait.
    ///
    /// After descriptors were lost on receipt, a message that is decoded after this call is not yielded, since its decoder
    /// may have gone by this number. The stream ends with [`Error::TruncatedControl`](crate::Error::TruncatedControl) then.
    pub fn len(&self) -> usize {
        self.note_question();
        self.fds.len()
    }

    /// Returns true if none wait. After a loss, a message that is decoded after this answer is not yielded either.
    pub fn is_empty(&self) -> bool {
        if self.fds.is_empty() {
            self.note_question();
        }
        self.fds.is_empty()
    }

    fn note_question(&self) {
        if self.lost {
            self.fell_short.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the number of descriptors that wait, for the connection's own use.
    pub(crate) fn count(&self) -> usize {
        self.fds.len()
    }

    /// Takes the descriptor that arrived first.
    pub fn pop(&mut self) -> Option<F> {
        if self.fds.is_empty() {
            self.note_question();
        }
        let fd = self.fds.pop_front()?;
        self.taken += 1;
        Some(fd)
    }

    /// Takes the `count` descriptors that arrived first; none if fewer wait.
    #[inline]
    pub fn take(&mut self, count: usize) -> Option<Fds<F>> {
        if count == 0 {
            return Some(Fds::default());
        }
        if count > self.fds.len() {
            self.note_question();
            return None;
        }
        let mut fds = SmallVec::new();
        while fds.len() < count {
            fds.push(self.fds.pop_front()?);
        }
        self.taken += count as u64;
        Some(Fds::from_peer(fds, self.home.clone()))
    }

    /// Takes all descriptors that wait.
    pub fn take_all(&mut self) -> Fds<F> {
        self.note_question();
        self.taken += self.fds.len() as u64;
        Fds::from_peer(self.fds.drain(..).collect(), self.home.clone())
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
        self.fell_short.load(Ordering::Relaxed)
    }

    /// Number of the descriptor that has waited longest, if one waits: it stays the same until that one is taken.
    pub(crate) fn first(&self) -> Option<u64> {
        (!self.fds.is_empty()).then_some(self.taken)
    }

    /// Gives up all descriptors that wait.
    pub(crate) fn clear(&mut self) {
        let fds: SmallVec<_> = self.fds.drain(..).collect();
        if let Some(home) = &self.home
            && !fds.is_empty()
        {
            Arc::clone(home).take_back(fds);
        }
    }

    /// From here on, descriptors that nobody takes go there.
    pub(crate) fn set_home(&mut self, home: Arc<dyn Home<F>>) {
        self.home = Some(home);
    }
}

impl<F> Drop for FdQueue<F> {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<F: fmt::Debug> fmt::Debug for FdQueue<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdQueue").field("fds", &self.fds).field("lost", &self.lost).finish_non_exhaustive()
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
        let mut queue = Self::new();
        queue.extend(fds);
        queue
    }
}

impl<F> From<FdQueue<F>> for Vec<F> {
    fn from(mut queue: FdQueue<F>) -> Self {
        mem::take(&mut queue.fds).into()
    }
}
