//! Growing pauses between attempts.

use std::time::Duration;

/// The pauses between attempts, for a condition of which the kernel does not report a change. Each
/// pause is twice as long as the one before, up to the longest.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    /// The pause before the next attempt.
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// Returns pauses that begin with `first` and are never longer than `longest`.
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    /// Returns the time to wait before the next attempt.
    pub(crate) fn next(&mut self) -> Duration {
        let time = self.next;
        self.next = time.saturating_mul(2).min(self.longest);
        time
    }
}

impl Default for Backoff {
    /// Waits 1 ms at first and 64 ms at most, which suits a full queue or a shortage of memory.
    fn default() -> Self {
        Self::new(Duration::from_millis(1), Duration::from_millis(64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_as_long_up_to_the_longest() {
        let mut backoff = Backoff::default();
        let waits = [(); 9].map(|()| backoff.next().as_millis());
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(25));
        assert_eq!([(); 3].map(|()| backoff.next().as_millis()), [10, 20, 25]);
    }
}
