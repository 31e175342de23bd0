//! The timeouts of one worker's link: pings, recalls, deadlines, and pauses.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use crate::handoff::{
    dispatcher::{RetireCause, builder::Config},
    protocol::ToWorker,
};

/// How long a worker gets nothing after its first refusal. Each further refusal doubles the time,
/// up to `LONGEST_PAUSE`, until the worker adopts something.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The timeouts of a worker's link. Decides when to ping, to recall, and to retire.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Timeouts {
    /// The time by which the worker has to send HELLO. `None` after it has.
    hello_by: Option<Instant>,
    ping: Ping,
    /// The last recall that was sent.
    recall: Option<Recall>,
    /// The end of the last time in which nothing could be sent or received through no fault of the
    /// worker: this process was stopped, or the kernel lacked a resource to send with.
    able_since: Option<Instant>,
    /// `Some` if the worker was asked to drain.
    drain: Option<Drain>,
    /// The worker gets nothing until then, because it has refused an offer.
    paused_until: Option<Instant>,
    /// The number of refusals since the worker last adopted something.
    refusals: u32,
}

/// The drain of a worker, with the deadline if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Drain {
    pub(super) until: Option<Instant>,
}

/// The last ping, and the next one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Ping {
    nonce: u64,
    /// `Some` while the last ping is unanswered: the time when it was sent, or when the latest
    /// message after it was received.
    unanswered: Option<Instant>,
    /// The time of the next ping, if the last one is answered by then.
    due: Option<Instant>,
    /// The last ping was unanswered for a whole ping interval.
    is_late: bool,
    /// The worker may not be fenced before this time.
    not_before: Option<Instant>,
}

/// A recall of all offers with a number below `before`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Recall {
    before: u64,
    at: Instant,
}

impl Timeouts {
    pub(super) fn new(hello_by: Instant) -> Self {
        Self {
            hello_by: Some(hello_by),
            ping: Ping::default(),
            recall: None,
            able_since: None,
            drain: None,
            paused_until: None,
            refusals: 0,
        }
    }

    /// Returns true if the worker has sent HELLO.
    pub(super) fn is_greeted(&self) -> bool {
        self.hello_by.is_none()
    }

    /// Returns true if the worker is late with its answer to the last ping.
    pub(super) fn is_late(&self) -> bool {
        self.ping.is_late
    }

    /// Returns true if the worker gets nothing for now, because it has refused an offer.
    pub(super) fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// Counts all delays anew from now, because nothing could be sent or received until now through
    /// no fault of the worker.
    pub(super) fn excuse(&mut self, now: Instant) {
        self.able_since = Some(now);
    }

    pub(super) fn on_hello(&mut self, now: Instant) {
        self.hello_by = None;
        self.ping.due = Some(now);
    }

    /// Notes that a message was received, so the worker is not late.
    pub(super) fn on_received(&mut self, now: Instant) {
        if let Some(since) = &mut self.ping.unanswered {
            *since = now;
        }
        self.ping.is_late = false;
    }

    /// Notes an answer to a ping. Returns false if it does not answer the last one.
    pub(super) fn on_pong(&mut self, nonce: u64) -> bool {
        let is_last = nonce == self.ping.nonce;
        if is_last {
            self.ping.unanswered = None;
        }
        is_last
    }

    pub(super) fn on_adopted(&mut self) {
        self.refusals = 0;
    }

    /// Begins a pause after a refusal: 10 ms, then 20 ms, 40 ms, and so on, up to 1 s.
    pub(super) fn pause(&mut self, now: Instant) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.refusals.min(16)).min(LONGEST_PAUSE);
        self.refusals = self.refusals.saturating_add(1);
        self.paused_until = Some(now + pause);
    }

    /// Sets the deadline of the drain. Returns true if it differs from that of the last call.
    pub(super) fn drain(&mut self, drain: Drain) -> bool {
        self.drain.replace(drain) != Some(drain)
    }

    /// Returns the ping and the recall that are due. `oldest` is the number of the oldest
    /// unanswered offer and the time when it was made. `next` is the number of the next offer.
    /// `may_fence` is called only if the worker is hung.
    ///
    /// # Errors
    /// Returns the cause if the worker has to be retired.
    pub(super) fn on_timeout(
        &mut self,
        now: Instant,
        config: &Config,
        oldest: Option<(u64, Instant)>,
        next: u64,
        may_fence: impl FnOnce() -> bool,
    ) -> Result<[Option<ToWorker<Infallible, ()>>; 2], RetireCause> {
        let (mut ping, mut recall) = (None, None);
        if self.hello_by.is_some_and(|by| now >= by) {
            return Err(RetireCause::Misbehaved("it did not say hello in time".into()));
        }
        self.paused_until = self.paused_until.filter(|until| *until > now);

        // Find out whether the worker lives: ping, wait for one interval until the worker counts as
        // late, and for the hang timeout until it counts as hung.
        match self.ping.unanswered {
            None if self.ping.due.is_some_and(|due| now >= due) => {
                self.ping.nonce += 1;
                self.ping.unanswered = Some(now);
                self.ping.due = Some(now + config.ping_interval);
                ping = Some(ToWorker::Ping { nonce: self.ping.nonce });
            }
            Some(since)
                if !self.ping.is_late && now >= self.counted_from(since) + config.ping_interval =>
            {
                self.ping.is_late = true;
            }
            Some(since) if self.ping.is_late && now >= self.hung_at(since, config) => {
                if may_fence() {
                    return Err(RetireCause::Hung);
                }
                self.ping.not_before = Some(now + config.ping_interval);
            }
            _ => {}
        }

        // Find out whether the worker has time: recall offers that are unanswered for too long. A
        // worker that answers pings has to answer the recall too.
        if let Some((number, offered_at)) = oldest {
            match self.recalled_at(number) {
                Some(at)
                    if !self.ping.is_late && now >= self.counted_from(at) + config.hang_timeout =>
                {
                    return Err(RetireCause::Misbehaved("it did not answer a recall".into()));
                }
                None if now >= self.counted_from(offered_at) + config.recall_after => {
                    self.recall = Some(Recall { before: next, at: now });
                    recall = Some(ToWorker::Recall { before: next });
                }
                _ => {}
            }
        }
        // Check the deadline of the drain.
        match self.drain {
            Some(Drain { until: Some(until) }) if now >= until => Err(RetireCause::Overdue),
            _ => Ok([ping, recall]),
        }
    }

    /// Returns the next time at which [`on_timeout`](Self::on_timeout) has something to do.
    pub(super) fn next_timeout(
        &self,
        config: &Config,
        oldest: Option<(u64, Instant)>,
    ) -> Option<Instant> {
        let ping = match self.ping.unanswered {
            None => self.ping.due,
            Some(since) if self.ping.is_late => Some(self.hung_at(since, config)),
            Some(since) => Some(self.counted_from(since) + config.ping_interval),
        };
        let recall = oldest.and_then(|(number, offered_at)| match self.recalled_at(number) {
            Some(at) => {
                Some(self.counted_from(at) + config.hang_timeout).filter(|_| !self.ping.is_late)
            }
            None => Some(self.counted_from(offered_at) + config.recall_after),
        });
        [ping, recall, self.hello_by, self.drain.and_then(|drain| drain.until), self.paused_until]
            .into_iter()
            .flatten()
            .min()
    }

    /// The time when an offer was recalled, if it was.
    fn recalled_at(&self, number: u64) -> Option<Instant> {
        self.recall.as_ref().filter(|recall| number < recall.before).map(|recall| recall.at)
    }

    /// The time at which the worker counts as hung if the last ping is unanswered `since` then.
    fn hung_at(&self, since: Instant, config: &Config) -> Instant {
        let hung = self.counted_from(since) + config.hang_timeout;
        self.ping.not_before.map_or(hung, |not_before| not_before.max(hung))
    }

    /// The beginning of a delay that would have begun at `since`. Time in which nothing could be
    /// sent or received does not count.
    fn counted_from(&self, since: Instant) -> Instant {
        self.able_since.map_or(since, |able| able.max(since))
    }
}
