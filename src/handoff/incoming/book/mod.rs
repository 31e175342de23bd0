//! A worker's offers, and its answers: every decision of a worker, as one value without I/O.
//!
//! The type `T` of a connection is generic, so that tests run the same code on numbers. The tasks
//! pass on what arrives, send what [`next_message`](Book::next_message) returns, and report how
//! many messages were [sent](Book::on_sent). An application gets a connection only after its
//! adoption was sent.

mod demand;
mod end;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    convert::Infallible,
    time::{Duration, Instant},
};

use crate::{
    Error,
    handoff::protocol::{FromWorker, MAX_UNANSWERED, RejectReason, ToWorker, VERSION},
};

/// How long the end of a connection may go unreported if there is nothing else to send. Every
/// answer carries the report along, so a busy worker does not need this time. A shorter time would
/// make the kernel program a hardware timer each time the process sleeps.
const REPORT_AFTER: Duration = Duration::from_millis(100);

/// The offers of one link to a dispatcher. All numbers count from the beginning of the link, except
/// those of connections that were open before.
///
/// When the dispatcher [moves](Self::move_on) its worker, a book for the new link follows this one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::handoff) struct Book<T> {
    /// The most offers that may be on their way here or wait here.
    window: u64,
    /// The most offers on their way, waiting offers, and active connections together.
    max_connections: u64,
    /// The most descriptors of one offer.
    max_fds: u64,
    /// The number of descriptors that may still be promised to offers before the free ones are
    /// counted again.
    spare: u64,
    /// WELCOME has arrived.
    is_welcomed: bool,
    /// Connections that were adopted before this link began, and had not ended then.
    open_before: u64,
    /// The numbers of offers that were adopted and rejected at earlier links.
    adopted_before: u64,
    rejected_before: u64,
    /// `offered <= demand`, and `offered == adopted + rejected + unanswered.len()`.
    demand: u64,
    offered: u64,
    adopted: u64,
    rejected: u64,
    /// The number of offers that were rejected before the application asked last. Only these may be
    /// replaced by other offers.
    replaced: u64,
    /// Includes connections that were open before. `reported <= finished <= open_before + adopted`.
    finished: u64,
    reported: u64,
    /// Offers without an answer, the oldest first. Answers are given in the order of the offers, so
    /// an offer to be rejected waits behind one that waits for the application. The first offer, if
    /// any, always waits for the application.
    unanswered: VecDeque<Waiting<T>>,
    /// Adopted connections that the application has not received yet. Each has the number of
    /// messages that have to be sent before the application gets it; the last of them is its
    /// ADOPTED.
    adopting: VecDeque<(u64, T)>,
    /// The application has asked for a connection at least once.
    has_asked: bool,
    phase: BookPhase,
    /// The book of another link has followed this one. The ends of connections are reported there.
    has_moved: bool,
    /// The dispatcher has asked for a drain.
    drain_requested: bool,
    refusal: Refusal,
    /// The dispatcher has recalled offers, and the application has asked for no connection since.
    is_busy: bool,
    /// When the connections that have ended are reported, unless a message is sent before.
    report_at: Option<Instant>,
    /// When free descriptors are counted again. `Some` if there are too few of them for all offers
    /// that there is room for.
    count_at: Option<Instant>,
    /// Messages to be sent, in this order.
    messages: VecDeque<FromWorker>,
    /// The number of messages that [`next_message`](Self::next_message) has returned, and how many
    /// of them were sent. `sent <= taken`.
    taken: u64,
    sent: u64,
}

/// An offer without an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Waiting<T> {
    /// The application may still adopt the offer.
    ForApplication(T),
    /// The offer is going to be rejected, as soon as all offers before it are answered.
    ForRejection(RejectReason),
}

/// How far a refusal has come: a REJECTED because of too little room or time. The dispatcher then
/// cancels the demand that it has not met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Refusal {
    /// There was no refusal, or a DEMAND has followed it.
    None,
    /// The dispatcher may not have read the refusal, so offers may be on their way.
    Sent,
    /// One ping has arrived since. The dispatcher has read the refusal when it sends the next one.
    Pinged,
}

/// The phases of a link, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum BookPhase {
    /// The worker takes offers.
    Open,
    /// The worker takes no more offers.
    Draining,
    /// The worker has sent GOODBYE, its last message.
    Left,
    /// The link has ended.
    Ended,
}

impl<T> Book<T> {
    /// Returns the book of a worker that takes offers of at most `max_fds` descriptors each. Its
    /// first message is HELLO.
    pub(in crate::handoff) fn new(window: u64, max_connections: u64, max_fds: u8) -> Self {
        Self::with_open(0, window, max_connections, max_fds)
    }

    fn with_open(open: u64, window: u64, max_connections: u64, max_fds: u8) -> Self {
        Self {
            window: window.clamp(1, MAX_UNANSWERED),
            max_connections,
            max_fds: max_fds.max(1).into(),
            spare: 0,
            is_welcomed: false,
            open_before: open,
            adopted_before: 0,
            rejected_before: 0,
            demand: 0,
            offered: 0,
            adopted: 0,
            rejected: 0,
            replaced: 0,
            finished: 0,
            reported: 0,
            unanswered: VecDeque::new(),
            adopting: VecDeque::new(),
            has_asked: false,
            phase: BookPhase::Open,
            has_moved: false,
            drain_requested: false,
            refusal: Refusal::None,
            is_busy: false,
            report_at: None,
            count_at: None,
            messages: VecDeque::from([FromWorker::Hello {
                lowest: VERSION,
                highest: VERSION,
                max_fds,
                open: Some(open),
            }]),
            taken: 0,
            sent: 0,
        }
    }

    // Messages from and to the dispatcher.

    /// Processes a message from the dispatcher. An offer that cannot be served is replaced by the
    /// reason, with which it is rejected when its turn comes. Returns the offers that this worker
    /// no longer needs.
    ///
    /// # Errors
    /// Returns an error if the message breaks the protocol.
    pub(in crate::handoff) fn on_message(
        &mut self,
        message: ToWorker<Result<T, RejectReason>, Infallible>,
    ) -> Result<Vec<T>, Error> {
        match message {
            ToWorker::Welcome { version: VERSION } if !self.is_welcomed => self.is_welcomed = true,
            ToWorker::Welcome { .. } => {
                return Err(Error::invalid("a second WELCOME, or one of another version"));
            }
            _ if !self.is_welcomed => {
                return Err(Error::invalid("the dispatcher's first message is not a WELCOME"));
            }
            ToWorker::Offer { number, offer } => {
                return self.on_offer(number, offer).map(Vec::from_iter);
            }
            ToWorker::Recall { before } => {
                let first = self.adopted + self.rejected;
                return Ok(self.reject(before.saturating_sub(first), RejectReason::Recalled));
            }
            ToWorker::Ping { nonce } => self.on_ping(nonce),
            ToWorker::Drain { .. } => {
                self.drain_requested = true;
                return Ok(self.drain());
            }
            ToWorker::Fenced => {} // the link ends here
            ToWorker::Move(never) => match never {},
        }
        Ok(Vec::new())
    }

    /// Adds an offer to the unanswered ones. Returns the offer if this worker no longer needs it.
    fn on_offer(
        &mut self,
        number: u64,
        offer: Result<T, RejectReason>,
    ) -> Result<Option<T>, Error> {
        if self.offered == self.demand {
            return Err(Error::invalid("more offers than were asked for"));
        }
        if number != self.offered {
            return Err(Error::invalid(
                "an offer is missing: something else has read from this socket",
            ));
        }
        // The application may adopt the offer unless there is a reason to reject it.
        self.offered += 1;
        let (waiting, unwanted) = match offer {
            Ok(offer) if self.phase == BookPhase::Open => (Waiting::ForApplication(offer), None),
            Ok(offer) => (Waiting::ForRejection(RejectReason::Draining), Some(offer)),
            Err(reason) => (Waiting::ForRejection(reason), None),
        };
        if matches!(waiting, Waiting::ForRejection(RejectReason::Full)) {
            self.spare = 0; // there are fewer free descriptors than were counted
        }
        self.unanswered.push_back(waiting);
        self.reject_due();
        Ok(unwanted)
    }

    /// Answers a ping. The second ping after a refusal shows that the dispatcher has read the
    /// refusal. From then on no offer is on its way, and the worker can ask again for the offers
    /// that the refusal has cancelled.
    fn on_ping(&mut self, nonce: u64) {
        if self.phase == BookPhase::Left {
            return; // nothing follows GOODBYE
        }
        self.messages.push_back(FromWorker::Pong { nonce });
        self.refusal = match self.refusal {
            Refusal::None => Refusal::None,
            Refusal::Sent => Refusal::Pinged,
            Refusal::Pinged => {
                self.demand = self.offered;
                Refusal::None
            }
        };
    }

    /// Takes out the next message to be sent. If there is one, a report of ended connections goes
    /// along with it.
    pub(in crate::handoff) fn next_message(&mut self) -> Option<FromWorker> {
        if !self.messages.is_empty() {
            self.report();
        }
        let message = self.messages.pop_front()?;
        self.taken += 1;
        Some(message)
    }

    /// Counts messages that were sent completely.
    pub(in crate::handoff) fn on_sent(&mut self, messages: u64) {
        self.sent += messages;
    }

    /// Reports how many connections have ended, if the number has changed.
    fn report(&mut self) {
        if self.finished > self.reported {
            self.reported = self.finished;
            self.messages.push_back(FromWorker::Load { finished: self.finished });
        }
    }

    // The application.

    /// Adopts up to `max` of the offers that wait, because the application asks for them. The
    /// application [gets](Self::take_adopted) them after the adoption was sent.
    pub(in crate::handoff) fn adopt(&mut self, max: usize) {
        // The application first gets the connections that were adopted before.
        if self.phase == BookPhase::Ended || !self.adopting.is_empty() {
            return;
        }
        // An application that asks is not busy, so other offers may replace rejected ones.
        self.has_asked = true;
        self.is_busy = false;
        self.replaced = self.rejected;
        // All offers that are adopted now share one ADOPTED, which is the next message.
        let first = self.adopted + self.rejected;
        let sent_with = self.taken + self.messages.len() as u64 + 1;
        while self.adopting.len() < max
            && let Some(Waiting::ForApplication(_)) = self.unanswered.front()
            && let Some(Waiting::ForApplication(offer)) = self.unanswered.pop_front()
        {
            self.adopting.push_back((sent_with, offer));
        }
        let count = self.adopting.len() as u32;
        if count > 0 {
            self.adopted += u64::from(count);
            self.messages.push_back(FromWorker::Adopted { first, count });
            self.reject_due();
        }
    }

    /// Takes out up to `max` adopted connections whose adoption was sent to the dispatcher.
    pub(in crate::handoff) fn take_adopted<B: Default + Extend<T>>(&mut self, max: usize) -> B {
        let mut adopted = B::default();
        for _ in 0..max {
            if self.adopting.front().is_none_or(|(sent_with, _)| *sent_with > self.sent) {
                break;
            }
            adopted.extend(self.adopting.pop_front().map(|(_, offer)| offer));
        }
        adopted
    }

    /// Counts an adopted connection as ended. Returns true if the task has to act on it, or has to
    /// set its timer to a new [timeout](Self::next_timeout).
    pub(in crate::handoff) fn finish(&mut self, now: Instant) -> bool {
        self.finished += 1;
        let is_first = self.report_at.is_none();
        self.report_at.get_or_insert(now + REPORT_AFTER);
        let is_linked = self.phase != BookPhase::Ended;
        is_linked
            && (is_first || self.count_at.is_some() || self.has_made_room() || self.is_draining())
    }

    /// Stops taking offers. Returns the offers that wait, which are rejected.
    pub(in crate::handoff) fn drain(&mut self) -> Vec<T> {
        if self.phase != BookPhase::Open {
            return Vec::new();
        }
        self.phase = BookPhase::Draining;
        self.messages.push_back(FromWorker::Draining);
        self.reject(u64::MAX, RejectReason::Draining)
    }

    /// Rejects the first `count` unanswered offers, and returns those that waited for the
    /// application.
    fn reject(&mut self, count: u64, reason: RejectReason) -> Vec<T> {
        let count = self.unanswered.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        let mut unwanted = Vec::new();
        for waiting in self.unanswered.range_mut(..count) {
            match std::mem::replace(waiting, Waiting::ForRejection(reason)) {
                Waiting::ForApplication(offer) => unwanted.push(offer),
                rejected_before => *waiting = rejected_before,
            }
        }
        self.reject_due();
        unwanted
    }

    /// Sends the rejections that no longer wait behind another offer. Offers in a row that have the
    /// same reason share one REJECTED.
    fn reject_due(&mut self) {
        while let Some(&Waiting::ForRejection(reason)) = self.unanswered.front() {
            self.unanswered.pop_front();
            let first = self.adopted + self.rejected;
            self.rejected += 1;
            if reason.is_refusal() && reason != RejectReason::Draining {
                self.refusal = Refusal::Sent;
            }
            self.is_busy |= reason == RejectReason::Recalled;
            match self.messages.back_mut() {
                Some(FromWorker::Rejected { count, reason: last, .. }) if *last == reason => {
                    *count += 1
                }
                _ => self.messages.push_back(FromWorker::Rejected { first, count: 1, reason }),
            }
        }
    }

    // Time.

    /// Reports what is due, and lets [`ask`](Self::ask) count descriptors again.
    pub(in crate::handoff) fn on_timeout(&mut self, now: Instant) {
        if self.report_at.is_some_and(|at| at <= now) {
            self.report_at = None;
            self.report();
        }
        self.count_at = self.count_at.filter(|at| *at > now);
    }

    /// Returns the next time at which [`on_timeout`](Self::on_timeout) has something to do.
    pub(in crate::handoff) fn next_timeout(&self) -> Option<Instant> {
        self.report_at.into_iter().chain(self.count_at).min()
    }
}
