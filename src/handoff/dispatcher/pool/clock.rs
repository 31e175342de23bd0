//! Everything about one worker's link that depends on time.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use crate::handoff::{
    dispatcher::{RetireCause, builder::Config},
    protocol::ToWorker,
};

/// How long a worker gets nothing after its first refusal; twice as long after each further one,
/// until it adopts.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Pings, recalls, and the times by which a worker has to have done something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Clock {
    /// Until then it has to say hello. `None` once it did.
    hello_by: Option<Instant>,
    ping: Ping,
    recall: Option<Recall>,
    /// The last time when nothing could be sent or received through no fault of the worker: this
    /// process was stopped, or the kernel had too little to send with.
    able_since: Option<Instant>,
    /// It is to have drained, by that time if there is one.
    drain: Option<Option<Instant>>,
    paused_until: Option<Instant>,
    /// Refusals since it adopted something.
    refusals: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Ping {
    nonce: u64,
    /// Since when the last one is unanswered; counted anew with whatever is received.
    unanswered: Option<Instant>,
    due: Option<Instant>,
    /// It was not answered by the time of the next one.
    late: bool,
    /// It may not be fenced before.
    not_before: Option<Instant>,
}

/// Offers below a number were recalled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Recall {
    before: u64,
    at: Instant,
}

impl Clock {
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

    pub(super) fn is_greeted(&self) -> bool {
        self.hello_by.is_none()
    }

    pub(super) fn is_late(&self) -> bool {
        self.ping.late
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// Nothing could be sent or received until now, through no fault of the worker.
    pub(super) fn excuse(&mut self, now: Instant) {
        self.able_since = Some(now);
    }

    pub(super) fn on_hello(&mut self, now: Instant) {
        self.hello_by = None;
        self.ping.due = Some(now);
    }

    /// Something was received. Returns true if the worker was late.
    pub(super) fn on_received(&mut self, now: Instant) -> bool {
        if let Some(since) = &mut self.ping.unanswered {
            *since = now;
        }
        std::mem::take(&mut self.ping.late)
    }

    /// Returns true if it answers the last ping.
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

    pub(super) fn pause(&mut self, now: Instant) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.refusals.min(16)).min(LONGEST_PAUSE);
        self.refusals = self.refusals.saturating_add(1);
        self.paused_until = Some(now + pause);
    }

    /// Returns true if that is news.
    pub(super) fn drain(&mut self, until: Option<Instant>) -> bool {
        self.drain.replace(until) != Some(until)
    }

    /// Pings, recalls, and gives up. `oldest` is the oldest unanswered offer, by its number and the
    /// time when it was made, and `next` the number of the next one.
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

        // Whether it lives.
        match self.ping.unanswered {
            None if self.ping.due.is_some_and(|due| now >= due) => {
                self.ping.nonce += 1;
                self.ping.unanswered = Some(now);
                self.ping.due = Some(now + config.ping_interval);
                ping = Some(ToWorker::Ping { nonce: self.ping.nonce });
            }
            Some(since)
                if !self.ping.late && now >= self.counted_from(since) + config.ping_interval =>
            {
                self.ping.late = true;
            }
            Some(since) if self.ping.late && now >= self.hung_at(since, config) => {
                if may_fence() {
                    return Err(RetireCause::Hung);
                }
                self.ping.not_before = Some(now + config.ping_interval);
            }
            _ => {}
        }

        // Whether it has time.
        if let Some((number, offered_at)) = oldest {
            match self.recalled_at(number) {
                Some(at)
                    if !self.ping.late && now >= self.counted_from(at) + config.hang_timeout =>
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
        match self.drain {
            Some(Some(until)) if now >= until => Err(RetireCause::Overdue),
            _ => Ok([ping, recall]),
        }
    }

    /// The next time when [`on_timeout`](Self::on_timeout) has something to do.
    pub(super) fn next_timeout(
        &self,
        config: &Config,
        oldest: Option<(u64, Instant)>,
    ) -> Option<Instant> {
        let ping = match self.ping.unanswered {
            None => self.ping.due,
            Some(since) if self.ping.late => Some(self.hung_at(since, config)),
            Some(since) => Some(self.counted_from(since) + config.ping_interval),
        };
        let recall = oldest.and_then(|(number, offered_at)| match self.recalled_at(number) {
            Some(at) => {
                Some(self.counted_from(at) + config.hang_timeout).filter(|_| !self.ping.late)
            }
            None => Some(self.counted_from(offered_at) + config.recall_after),
        });
        [ping, recall, self.hello_by, self.drain.flatten(), self.paused_until]
            .into_iter()
            .flatten()
            .min()
    }

    /// When an offer was recalled, if it was.
    fn recalled_at(&self, number: u64) -> Option<Instant> {
        self.recall.as_ref().filter(|recall| number < recall.before).map(|recall| recall.at)
    }

    fn hung_at(&self, since: Instant, config: &Config) -> Instant {
        let hung = self.counted_from(since) + config.hang_timeout;
        self.ping.not_before.map_or(hung, |not_before| not_before.max(hung))
    }

    /// From when on a worker is late with what it was told at this time.
    fn counted_from(&self, told: Instant) -> Instant {
        self.able_since.map_or(told, |able| able.max(told))
    }
}
