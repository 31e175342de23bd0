//! The settings of a dispatcher.

use std::{fmt, time::Duration};

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::Semaphore;

use super::{Dispatcher, LONGEST};

/// The rule by which the dispatcher chooses a worker for a connection, among those that have room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// Chooses the worker with the fewest connections: adopted ones that have not ended, and offers
    /// that it has not answered.
    #[default]
    LeastLoaded,
    /// Chooses the workers in turn.
    RoundRobin,
    /// Chooses the same worker for the same [key](super::Accepted::key), as long as it has room,
    /// and otherwise the next one in an order that is fixed for each key. A worker that comes or
    /// goes changes this for few keys, and a worker that is started again for none. All keys get
    /// other workers when [new ones replace them](super::Dispatcher::replace_workers).
    ByKey,
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LeastLoaded => "least loaded",
            Self::RoundRobin => "round robin",
            Self::ByKey => "by key",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Config {
    pub(super) strategy: Strategy,
    pub(super) ping_interval: Duration,
    pub(super) hang_timeout: Duration,
    pub(super) recall_after: Duration,
    pub(super) max_offers: u32,
    pub(super) max_fences: usize,
    pub(super) fence_window: Duration,
    pub(super) hello_timeout: Duration,
    pub(super) exit_timeout: Duration,
    pub(super) kill_hung: bool,
    pub(super) max_preparing: usize,
    pub(super) prepare_timeout: Duration,
    /// The most descriptors that may be on their way to all workers together.
    pub(super) max_in_flight: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            ping_interval: Duration::from_secs(1),
            hang_timeout: Duration::from_secs(5),
            recall_after: Duration::from_secs(1),
            max_offers: 3,
            max_fences: 3,
            fence_window: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(30),
            exit_timeout: Duration::from_secs(30),
            kill_hung: true,
            max_preparing: 1024,
            prepare_timeout: Duration::from_secs(10),
            max_in_flight: usize::MAX,
        }
    }
}

/// With a shorter interval, workers and the dispatcher would do little but answer pings.
const SHORTEST_PING_INTERVAL: Duration = Duration::from_millis(1);

/// Half of the descriptors that the kernel lets the processes of this uid have in flight. The limit
/// is the sender's soft `RLIMIT_NOFILE` (`ETOOMANYREFS`, unix(7)).
fn max_in_flight() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    usize::try_from(limit / 2).unwrap_or(usize::MAX)
}

/// The settings of a [`Dispatcher`], from [`Dispatcher::builder`]. The defaults fit most services.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::time::Duration;
///
/// use fdwire::handoff::{Dispatcher, Strategy};
///
/// let dispatcher = Dispatcher::builder()
///     .strategy(Strategy::ByKey)
///     .hang_timeout(Duration::from_secs(30))
///     .build();
/// # drop(dispatcher); }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct DispatcherBuilder {
    config: Config,
}

impl DispatcherBuilder {
    pub(super) fn new() -> Self {
        Self { config: Config { max_in_flight: max_in_flight(), ..Config::default() } }
    }

    /// Sets which worker gets a connection. Default: the least loaded.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.config.strategy = strategy;
        self
    }

    /// Sets how often workers are pinged, at least 1 ms. A worker that has not answered by the next
    /// ping gets no more connections until it does. Default: 1 s.
    pub fn ping_interval(mut self, interval: Duration) -> Self {
        self.config.ping_interval = interval.clamp(SHORTEST_PING_INTERVAL, LONGEST);
        self
    }

    /// Sets how long a worker may leave a ping unanswered before it counts as hung. Then it is
    /// fenced, and the connections that it has not adopted go to others. A worker answers pings
    /// even if its application does not ask for connections, unless the application blocks every
    /// thread of its runtime. Default: 5 s. The shortest time is the
    /// [`ping_interval`](Self::ping_interval).
    pub fn hang_timeout(mut self, timeout: Duration) -> Self {
        self.config.hang_timeout = timeout.min(LONGEST);
        self
    }

    /// Sets how long a worker may take until its HELLO, from when it is started or has connected.
    /// Default: 30 s.
    pub fn hello_timeout(mut self, timeout: Duration) -> Self {
        self.config.hello_timeout = timeout.min(LONGEST);
        self
    }

    /// Sets how long a process that the dispatcher has started may live after its worker has left,
    /// whether it has drained or its link has ended in another way. Then it is killed, unless
    /// [`kill_hung`](Self::kill_hung) is off. Default: 30 s.
    ///
    /// A worker whose link has ended may serve the connections that it has adopted for this time.
    pub fn exit_timeout(mut self, timeout: Duration) -> Self {
        self.config.exit_timeout = timeout.min(LONGEST);
        self
    }

    /// Sets how long a worker that answers pings may leave an offer unanswered. Then the dispatcher
    /// recalls the offer, so that another worker gets it. Default: 1 s.
    pub fn recall_after(mut self, after: Duration) -> Self {
        self.config.recall_after = after.min(LONGEST);
        self
    }

    /// Sets how many workers may fail with a connection before it is given up. A worker fails with
    /// a connection if it dies, hangs or misbehaves while it has an unanswered offer of it, or if
    /// it finds the connection [unusable](super::protocol::RejectReason::Unusable). The connection
    /// may be the cause, and must not bring down all workers. Default: 3.
    ///
    /// A connection is given up only if no worker is left that has not failed with it. If workers
    /// have died of it, its last attempt is on a worker with no other pending offers, so that no
    /// innocent connection becomes a suspect.
    ///
    /// A worker that has no room or no time for a connection has not failed with it.
    pub fn max_offers(mut self, offers: u32) -> Self {
        self.config.max_offers = offers.max(1);
        self
    }

    /// Sets how many hung workers may be fenced within a time. Further ones are left alone until
    /// later, because the whole machine may be at fault. Workers that the dispatcher has started
    /// and workers that have connected are counted separately. Default: 3 within 10 s.
    pub fn max_fences(mut self, fences: usize, within: Duration) -> Self {
        (self.config.max_fences, self.config.fence_window) = (fences, within.min(LONGEST));
        self
    }

    /// Sets whether workers that the dispatcher has started are killed when they hang, misbehave,
    /// or do not drain in time, or when they are asked to drain before their HELLO. The clients of
    /// a killed worker see their connections end. Workers that have connected are never killed.
    /// Default: yes.
    pub fn kill_hung(mut self, kill: bool) -> Self {
        self.config.kill_hung = kill;
        self
    }

    /// Sets the most connections that one call of [`serve_with`](Dispatcher::serve_with) prepares,
    /// or that are prepared and wait for a worker's slot, at a time. At least 1. Each takes a
    /// descriptor, and peers that send nothing keep theirs for the whole
    /// [time](Self::prepare_timeout). [`serve_with`](Dispatcher::serve_with) describes how groups
    /// share it. Default: 1,024.
    pub fn max_preparing(mut self, connections: usize) -> Self {
        self.config.max_preparing = connections.clamp(1, Semaphore::MAX_PERMITS);
        self
    }

    /// Sets how long it may take to prepare a connection in [`serve_with`](Dispatcher::serve_with).
    /// Default: 10 s.
    pub fn prepare_timeout(mut self, timeout: Duration) -> Self {
        self.config.prepare_timeout = timeout.min(LONGEST);
        self
    }

    /// Returns the dispatcher.
    ///
    /// # Panics
    /// Panics outside of a tokio runtime.
    pub fn build(mut self) -> Dispatcher {
        self.config.hang_timeout = self.config.hang_timeout.max(self.config.ping_interval);
        Dispatcher::with_config(self.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn times_that_make_no_sense_are_replaced_by_the_nearest_that_do() {
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::ZERO)
            .hang_timeout(Duration::ZERO)
            .build();
        let Config { ping_interval, hang_timeout, .. } = dispatcher.shared.config;
        assert_eq!((ping_interval, hang_timeout), (SHORTEST_PING_INTERVAL, SHORTEST_PING_INTERVAL));
    }
}
