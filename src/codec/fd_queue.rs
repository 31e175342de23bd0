//! The queue of received descriptors.

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

use crate::{
    error::Error,
    frame::{FdCloser, Fds},
};

/// A queue of the descriptors that have arrived and that no message has claimed yet, first in,
/// first out.
///
/// The kernel may lose descriptors on receipt, usually because this process has reached its
/// `RLIMIT_NOFILE`. It loses the last ones. So **a result that would differ without the loss spoils
/// the message** that is being decoded. Such a message is not yielded, and the stream ends with
/// [`Error::TruncatedControl`]. Messages that need none of the lost descriptors are not affected.
/// The documentation of each method names the results that spoil a message.
///
/// The descriptors that are left when the queue is dropped are closed [in the
/// background](crate::close_in_background) if they came from a peer.
pub struct FdQueue<F = OwnedFd> {
    fds: VecDeque<F>,
    /// True if more descriptors were sent after these, and the kernel lost them.
    truncated: bool,
    /// True if the decoder has made the last loss good, and the connection has not handled that
    /// yet.
    made_good: bool,
    /// True if a decoder got a result that a loss may have changed. It is atomic because methods
    /// with `&self` return such results too.
    spoiled: AtomicBool,
    /// The number of descriptors that were taken out so far.
    taken: u64,
    /// Closes the descriptors that are not taken out. `None` if they did not come from a peer.
    closer: Option<Arc<dyn FdCloser<F>>>,
}

impl<F> FdQueue<F> {
    /// Returns an empty queue.
    pub const fn new() -> Self {
        Self {
            fds: VecDeque::new(),
            truncated: false,
            made_good: false,
            spoiled: AtomicBool::new(false),
            taken: 0,
            closer: None,
        }
    }

    /// Takes the `count` descriptors that arrived first. Call it for a complete message that has
    /// this number of descriptors.
    ///
    /// # Errors
    /// [`Error::MissingFds`] if fewer wait. They stay in the queue. [`Error::TruncatedControl`] if
    /// the missing ones were lost.
    ///
    /// ```
    /// use fdwire::{Error, codec::FdQueue};
    ///
    /// let mut fds = FdQueue::from_iter([7, 8, 9]);
    /// assert_eq!(&fds.claim(2)?[..], [7, 8]);
    /// assert!(matches!(fds.claim(2), Err(Error::MissingFds { expected: 2, received: 1 })));
    /// assert_eq!(fds.claim_one()?, 9);
    /// # Ok::<(), Error>(())
    /// ```
    #[inline]
    pub fn claim(&mut self, count: usize) -> Result<Fds<F>, Error> {
        self.take(count).ok_or_else(|| self.missing(count))
    }

    /// Does the same, but returns an `Option`, which takes fewer instructions.
    #[inline]
    pub(super) fn take(&mut self, count: usize) -> Option<Fds<F>> {
        if count == 0 {
            return Some(Fds::default());
        }
        if count > self.fds.len() {
            return None;
        }
        let mut fds = SmallVec::new();
        // Usually there is one descriptor, for which a `Drain` would take longer.
        while fds.len() < count
            && let Some(fd) = self.fds.pop_front()
        {
            fds.push(fd);
        }
        self.taken += count as u64;
        Some(Fds::from_peer(fds, self.closer.clone()))
    }

    /// Takes the descriptor that arrived first. Call it for a complete message that has one
    /// descriptor.
    ///
    /// # Errors
    /// The errors of [`claim`](Self::claim).
    pub fn claim_one(&mut self) -> Result<F, Error> {
        self.pop_front().ok_or_else(|| self.missing(1))
    }

    /// Returns the error for a complete message whose descriptors have not all arrived.
    #[cold]
    pub(super) fn missing(&self, expected: usize) -> Error {
        self.record_doubtful_result();
        if self.truncated {
            Error::TruncatedControl
        } else {
            Error::MissingFds { expected, received: self.fds.len() }
        }
    }

    /// Takes the descriptor that arrived first, if there is one, for messages that may have one.
    /// After a loss, `None` spoils the message.
    pub fn pop_front(&mut self) -> Option<F> {
        let Some(fd) = self.fds.pop_front() else {
            self.record_doubtful_result();
            return None;
        };
        self.taken += 1;
        Some(fd)
    }

    /// Returns the number of descriptors that wait. After a loss, any number spoils the message.
    pub fn len(&self) -> usize {
        self.record_doubtful_result();
        self.fds.len()
    }

    /// Returns true if none wait. After a loss, that spoils the message.
    pub fn is_empty(&self) -> bool {
        if self.fds.is_empty() {
            self.record_doubtful_result();
        }
        self.fds.is_empty()
    }

    /// Records that a decoder gets a result that may differ from the one without a loss.
    fn record_doubtful_result(&self) {
        if self.truncated {
            self.spoiled.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the number of descriptors that wait, without any effect on messages. For the
    /// connection.
    pub(crate) fn count(&self) -> usize {
        self.fds.len()
    }

    /// Takes all descriptors that wait. After a loss, that spoils the message.
    pub fn take_all(&mut self) -> Fds<F> {
        self.record_doubtful_result();
        self.taken += self.fds.len() as u64;
        Fds::from_peer(self.fds.drain(..).collect(), self.closer.clone())
    }

    /// Takes the waiting descriptors out. They are no longer closed in the background: each is
    /// closed in the thread that drops it.
    pub fn into_vec(mut self) -> Vec<F> {
        mem::take(&mut self.fds).into()
    }

    /// Records a loss: messages that come after these descriptors may have lost theirs.
    pub(crate) fn set_truncated(&mut self) {
        self.truncated = true;
    }

    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Returns true if a decoder got a result that a loss may have changed.
    pub(crate) fn is_spoiled(&self) -> bool {
        self.spoiled.load(Ordering::Relaxed)
    }

    /// Makes a loss good, so that the connection goes on. Only a decoder that recognizes the
    /// descriptors of each message may call this, because it can determine which messages have lost
    /// theirs. It has to decode every complete message first.
    ///
    /// The descriptors that wait are closed, because others of their message may be lost.
    pub(crate) fn make_good(&mut self) {
        self.give_up(self.fds.len());
        self.truncated = false;
        self.made_good = true;
    }

    /// Returns true once after the last loss was made good.
    pub(crate) fn take_made_good(&mut self) -> bool {
        mem::take(&mut self.made_good)
    }

    /// Closes the descriptors before the first one for which `is_it` returns true. If there is
    /// none, all stay, and the result is false.
    pub(crate) fn skip_to(&mut self, is_it: impl Fn(&F) -> bool) -> bool {
        let found = self.fds.iter().position(is_it);
        self.give_up(found.unwrap_or(0));
        found.is_some()
    }

    /// Returns the number of the descriptor that has waited longest. It stays the same until that
    /// descriptor is taken.
    pub(crate) fn first(&self) -> Option<u64> {
        (!self.fds.is_empty()).then_some(self.taken)
    }

    /// Closes all descriptors that wait.
    pub(crate) fn clear(&mut self) {
        self.give_up(self.fds.len());
    }

    /// Closes the descriptors that have waited longest.
    fn give_up(&mut self, count: usize) {
        let fds: SmallVec<_> = self.fds.drain(..count).collect();
        self.taken += count as u64;
        if let Some(closer) = &self.closer
            && !fds.is_empty()
        {
            Arc::clone(closer).close(fds);
        }
    }

    pub(crate) fn has_closer(&self) -> bool {
        self.closer.is_some()
    }

    /// Sets the closer of the descriptors that are not taken out.
    pub(crate) fn set_closer(&mut self, closer: Arc<dyn FdCloser<F>>) {
        self.closer = Some(closer);
    }
}

impl<F> Drop for FdQueue<F> {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<F: fmt::Debug> fmt::Debug for FdQueue<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdQueue")
            .field("fds", &self.fds)
            .field("truncated", &self.truncated)
            .finish_non_exhaustive()
    }
}

impl<F> Default for FdQueue<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Extend<F> for FdQueue<F> {
    fn extend<I: IntoIterator<Item = F>>(&mut self, fds: I) {
        // One by one: usually there is one, for which `VecDeque::extend` takes five times as long.
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
