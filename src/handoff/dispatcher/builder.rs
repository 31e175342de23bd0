//! What can be set on a dispatcher.

use std::time::Duration;

use super::{Dispatcher, LONGEST};

/// Which worker gets a connection, among those that have room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// The one with the fewest connections: adopted ones that have not ended, and offers that it has not answered.
    #[default]
    LeastLoaded,
    /// Each in turn.
    RoundRobin,
    /// The same one for the same [key](super::Accepted::key), as long as it has room; else the next one in an order that is
    /// fixed for each key. A worker that comes or goes changes this for few keys, and one that is started again for none.
    ByKey,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) strategy: Strategy,
    pub(super) ping_interval: Duration,
    pub(super) hang_timeout: Duration,
    pub(super) recall_after: Duration,
    pub(super) max_offers: u32,
    pub(super) max_fences: usize,
    pub(super) fence_window: Duration,
    pub(super) kill_hung: bool,
}

/// Sets up a [`Dispatcher`]. The defaults are fit for most.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::time::Duration;
///
/// use fdwire::handoff::{Dispatcher, Strategy};
///
/// let dispatcher = Dispatcher::builder().strategy(Strategy::ByKey).hang_timeout(Duration::from_secs(30)).build();
/// # drop(dispatcher); }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct DispatcherBuilder {
    config: Config,
}

impl DispatcherBuilder {
    pub(super) fn new() -> Self {
        Self {
            config: Config {
                strategy: Strategy::default(),
                ping_interval: Duration::from_secs(1),
                hang_timeout: Duration::from_secs(5),
                recall_after: Duration::from_secs(1),
                max_offers: 3,
                max_fences: 3,
                fence_window: Duration::from_secs(10),
                kill_hung: true,
            },
        }
    }

    /// Which worker gets a connection. Default: the least loaded.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.config.strategy = strategy;
        self
    }

    /// How often workers are pinged. One that has not answered by the next time gets no more connections until it does.
    /// Default: 1 s.
    pub fn ping_interval(mut self, interval: Duration) -> Self {
        self.config.ping_interval = interval.min(LONGEST);
        self
    }

    /// How long a worker may leave a ping unanswered before it counts as hung: it is cut off, and what it has not
    /// adopted goes to others. Workers answer pings whatever their application does, unless it blocks the thread of a runtime that has
    /// one only. Default: 5 s.
    pub fn hang_timeout(mut self, timeout: Duration) -> Self {
        self.config.hang_timeout = timeout.min(LONGEST);
        self
    }

    /// How long a worker that answers pings may leave an offer unanswered before it is asked to reject it, so that another
    /// worker gets it. Default: 1 s.
    pub fn recall_after(mut self, after: Duration) -> Self {
        self.config.recall_after = after.min(LONGEST);
        self
    }

    /// How often a connection is offered when the worker dies, hangs or misbehaves before it has answered: the connection may be
    /// the cause, and must not take down all. The last time, it is offered to a worker that has no other offer, so that no
    /// other connection gets under suspicion. Default: 3.
    ///
    /// Offers that workers reject for want of room or time do not count here. 100 of any kind are the most.
    pub fn max_offers(mut self, offers: u32) -> Self {
        self.config.max_offers = offers.max(1);
        self
    }

    /// How many hung workers may be cut off within a time; others are left alone until later, since the fault may be one of the
    /// whole machine. Default: 3 within 10 s.
    pub fn max_fences(mut self, fences: usize, within: Duration) -> Self {
        (self.config.max_fences, self.config.fence_window) = (fences, within.min(LONGEST));
        self
    }

    /// Whether workers that the dispatcher has started are killed when they hang, misbehave, do not drain in time, or are to
    /// leave and have not said hello yet; a killed one's clients see their connections end. Workers that have connected are
    /// never killed. Default: yes.
    pub fn kill_hung(mut self, kill: bool) -> Self {
        self.config.kill_hung = kill;
        self
    }

    /// The dispatcher.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn build(self) -> Dispatcher {
        Dispatcher::new(self.config)
    }
}
