//! The times that connections wait until a worker adopts them.

use std::time::Duration;

/// The upper bound of the first bucket, in microseconds. That of each further bucket is twice as
/// large.
const FIRST: u64 = 64;

/// The number of buckets. The last one has no upper bound: it counts times of more than 67 s.
const BUCKETS: usize = 22;

/// How long connections took from [`dispatch`](super::Dispatcher::dispatch), or from when
/// [`serve`](super::Dispatcher::serve) accepted them, to their adoption: counted in buckets.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use fdwire::handoff::Dispatcher;
///
/// let times = Dispatcher::new().stats().adoption_times;
/// for (up_to, connections) in times.buckets() {
///     println!("{up_to:?} {connections}"); // Some(64µs) 0, Some(128µs) 0, ..., None 0
/// }
/// assert_eq!(times.quantile(0.99), None); // nothing was adopted yet
/// # }
/// ```
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdoptionTimes([u64; BUCKETS]);

impl AdoptionTimes {
    /// Returns the buckets: the longest time that is counted in each, and the number of
    /// connections. A bucket has none that the one before it counts. The last one has no longest
    /// time.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        self.0.into_iter().enumerate().map(|(bucket, count)| (bound(bucket), count))
    }

    /// Returns a time within which this share of the connections were adopted, at most twice as
    /// long as the shortest such time. `None` if no connection was adopted, or if it took longer
    /// than 67 s.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let wanted =
            (self.0.iter().sum::<u64>() as f64 * share.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut counted = 0;
        let bucket = self.0.iter().position(|count| {
            counted += count;
            counted >= wanted
        });
        bucket.and_then(bound)
    }

    /// Returns the times that were added since an earlier look at the same dispatcher.
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|bucket| self.0[bucket].saturating_sub(earlier.0[bucket])))
    }

    pub(super) fn record(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        // 64 us belong to the first bucket, 65 to 128 to the second, 129 to 256 to the third.
        let bucket =
            (micros.saturating_sub(1) / FIRST).checked_ilog2().map_or(0, |log| log as usize + 1);
        self.0[bucket.min(BUCKETS - 1)] += 1;
    }
}

fn bound(bucket: usize) -> Option<Duration> {
    (bucket < BUCKETS - 1).then(|| Duration::from_micros(FIRST << bucket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_counted_in_the_first_bucket_that_is_long_enough() {
        for micros in
            [0, 1, 63, 64, 65, 127, 128, 129, 1_000_000, FIRST << 20, (FIRST << 20) + 1, u64::MAX]
        {
            let mut times = AdoptionTimes::default();
            times.record(Duration::from_micros(micros));
            let long_enough = |up_to: Option<Duration>| {
                up_to.is_none_or(|up_to| up_to.as_micros() >= micros.into())
            };
            let expected = times.buckets().position(|(up_to, _)| long_enough(up_to));
            assert_eq!(times.buckets().position(|(_, count)| count == 1), expected, "{micros}");
        }
    }

    #[test]
    fn a_quantile_is_the_bound_of_the_bucket_that_reaches_it() {
        let mut times = AdoptionTimes::default();
        assert_eq!(times.quantile(0.5), None);
        for micros in [10, 100, 100, 1000] {
            times.record(Duration::from_micros(micros));
        }
        let quantiles = [0.0, 0.25, 0.5, 0.75, 0.76, 1.0]
            .map(|share| times.quantile(share).unwrap().as_micros());
        assert_eq!(quantiles, [64, 64, 128, 128, 1024, 1024]);
        let before = times;
        times.record(Duration::MAX);
        assert_eq!(times.quantile(1.0), None);
        let since = times.since(&before);
        assert_eq!(since.buckets().map(|(_, count)| count).sum::<u64>(), 1);
        assert_eq!(since.quantile(0.5), None);
    }
}
