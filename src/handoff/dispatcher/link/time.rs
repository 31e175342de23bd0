//! What a link does by the clock.

use tokio::time::Instant;
use tracing::{debug, warn};

use super::{LATER, Link, misbehaved};
use crate::handoff::dispatcher::{Cause, WorkerState, protocol::ToWorker};

pub(super) struct Ping {
    pub(super) nonce: u64,
    /// Since when the last one is unanswered; counted anew with whatever is heard.
    pub(super) unanswered: Option<Instant>,
    /// When the next one is to be sent.
    pub(super) due: Instant,
    /// The pool knows that the worker is late.
    pub(super) late: bool,
    /// The worker may not be cut off before.
    pub(super) not_before: Instant,
}

pub(super) struct Recall {
    /// The offers below were recalled.
    pub(super) before: u64,
    pub(super) at: Instant,
}

impl Link {
    /// Pings, recalls, and gives up.
    pub(super) fn keep_time(&mut self) -> Result<(), Cause> {
        let now = Instant::now();
        let config = self.shared.config;
        let was_stopped = now > self.timer.deadline() + config.ping_interval;
        if was_stopped || self.outbound.waits_for_the_kernel() {
            self.able_since = now;
        }
        match self.ping.unanswered {
            None if self.greeted && now >= self.ping.due => {
                self.ping.nonce += 1;
                self.ping.unanswered = Some(now);
                self.ping.due = now + config.ping_interval;
                self.say(ToWorker::Ping { nonce: self.ping.nonce })?;
                self.shared.lock().copies.sweep();
            }
            Some(since) if now >= self.counted_from(since) + config.ping_interval && !self.ping.late => {
                self.ping.late = true;
                self.shared.lock().set_state(self.id, WorkerState::Silent);
            }
            Some(since) if now >= self.ping.not_before.max(self.counted_from(since) + config.hang_timeout) => {
                if self.shared.lock().may_fence(now) {
                    return Err(Cause::Hung);
                }
                self.ping.not_before = now + config.ping_interval;
                warn!(worker = %self.id, pid = self.process.pid(), "worker hangs, and too many others did: it is left alone");
            }
            _ => {}
        }
        if let Some((number, job)) = self.ledger.oldest() {
            if number >= self.recall.before {
                if job.offered_at.is_some_and(|at| now >= self.counted_from(at) + config.recall_after) {
                    self.recall = Recall { before: self.ledger.next_number(), at: now };
                    debug!(worker = %self.id, before = self.recall.before, "offers are recalled");
                    self.say(ToWorker::Recall { before: self.recall.before })?;
                }
            } else if now >= self.counted_from(self.recall.at) + config.hang_timeout && !self.ping.late {
                return Err(misbehaved("it did not answer a recall"));
            }
        }
        match self.drain {
            Some(Some(until)) if now >= until => Err(Cause::Overdue),
            _ => Ok(()),
        }
    }

    /// From when on a worker is late with what it was told at this time.
    fn counted_from(&self, told: Instant) -> Instant {
        told.max(self.able_since)
    }

    /// When [`keep_time`](Self::keep_time) has something to do.
    pub(super) fn due(&self) -> Instant {
        let config = &self.shared.config;
        let ping = match self.ping.unanswered {
            None => self.greeted.then_some(self.ping.due),
            Some(since) if self.ping.late => {
                Some(self.ping.not_before.max(self.counted_from(since) + config.hang_timeout))
            }
            Some(since) => Some(self.counted_from(since) + config.ping_interval),
        };
        let recall = self.ledger.oldest().and_then(|(number, job)| match number >= self.recall.before {
            true => Some(self.counted_from(job.offered_at?) + config.recall_after),
            false => Some(self.counted_from(self.recall.at) + config.hang_timeout).filter(|_| !self.ping.late),
        });
        let times = [ping, recall, self.drain.flatten()];
        times.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + LATER)
    }
}
