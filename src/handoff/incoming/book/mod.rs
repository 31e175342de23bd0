//! A worker's offers, and its answers: every decision of a worker, as one value without I/O.
//!
//! It is generic over what an offer is about, so that tests run it on numbers. The tasks give it
//! what arrives, send what [`next_message`](Book::next_message) returns, and tell it how much of
//! that was [sent](Book::on_sent): an application gets a connection only after that.

#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    convert::Infallible,
    time::{Duration, Instant},
};

use crate::{
    Error,
    handoff::{
        IncomingStats,
        protocol::{FromWorker, MAX_UNANSWERED, RejectReason, ToWorker, VERSION},
    },
};

/// How long the end of a connection may go unreported if there is nothing else to send. Answers
/// bring the report along, so as long as connections come this time is not needed; but a nearer one
/// would be set in hardware each time the process sleeps.
const REPORT_AFTER: Duration = Duration::from_millis(100);

/// How long to wait for descriptors to come free.
const COUNT_AFTER: Duration = Duration::from_millis(10);

/// The offers of one link to a dispatcher. All numbers count from its beginning.
///
/// When the dispatcher [moves](Self::move_on) its worker, a book for the new link follows this one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::handoff) struct Book<T> {
    /// Most offers that may be on their way or wait.
    window: u64,
    /// Most of them together with adopted connections that have not ended.
    max_connections: u64,
    /// Most descriptors of an offer.
    max_fds: u64,
    /// Descriptors that offers may be asked for before the free ones are counted again.
    spare: u64,
    welcomed: bool,
    /// Connections that were adopted before this link began, and had not ended then.
    open_before: u64,
    /// The numbers of answers at links before this one.
    adopted_before: u64,
    rejected_before: u64,
    /// `offered <= demand`, and `offered == adopted + rejected + unanswered.len()`.
    demand: u64,
    offered: u64,
    adopted: u64,
    rejected: u64,
    /// Of the rejected, those in whose place others may come: rejected before the application asked
    /// last.
    replaced: u64,
    /// Includes those that were open before. `reported <= finished <= open_before + adopted`.
    finished: u64,
    reported: u64,
    /// The first one, if any, waits for the application: answers are given in the order of the
    /// offers.
    unanswered: VecDeque<Waiting<T>>,
    /// Adopted, and not given to the application yet. Each with the number of messages that have to
    /// be sent before.
    adopting: VecDeque<(u64, T)>,
    /// The application has asked for a connection at least once.
    asked: bool,
    state: Taking,
    /// The book of another link has followed this one: connections end there.
    has_moved: bool,
    /// The dispatcher has asked for a drain.
    told_to_drain: bool,
    refusal: Refusal,
    /// The dispatcher has asked for offers back, and the application has not shown up since.
    is_busy: bool,
    /// When the connections that have ended are reported, if nothing else is sent before.
    report_at: Option<Instant>,
    /// There are too few descriptors for all offers that there is room for. When they are counted
    /// again.
    count_at: Option<Instant>,
    /// To be sent, in this order.
    messages: VecDeque<FromWorker>,
    /// Messages that [`next_message`](Self::next_message) has returned, and those of them that were
    /// sent.
    taken: u64,
    sent: u64,
}

/// The offers that a link leaves behind at its end, which are not this worker's.
#[derive(Debug)]
pub(in crate::handoff) struct Left<T> {
    pub(in crate::handoff) offers: Vec<T>,
    /// The number of those that the application had asked for: the dispatcher was not told.
    pub(in crate::handoff) lost: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Waiting<T> {
    ForApplication(T),
    /// For those before it to be answered.
    ForTurn(RejectReason),
}

/// A REJECTED because of too little room or time. It makes void what was asked for and not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Refusal {
    /// None, or another DEMAND has followed.
    None,
    /// Offers that were made before it was read may be on their way.
    Sent,
    /// The same; the dispatcher will have read it when it pings again.
    Pinged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Taking {
    Offers,
    NoMore,
    /// GOODBYE is the last message.
    Nothing,
    /// The dispatcher is gone.
    Ended,
}

impl<T> Book<T> {
    /// A worker that takes offers of at most `max_fds` descriptors each. Its first message is
    /// HELLO.
    pub(in crate::handoff) fn new(window: u64, max_connections: u64, max_fds: u8) -> Self {
        Self::with_open(0, window, max_connections, max_fds)
    }

    fn with_open(open: u64, window: u64, max_connections: u64, max_fds: u8) -> Self {
        Self {
            window: window.clamp(1, MAX_UNANSWERED),
            max_connections,
            max_fds: max_fds.max(1).into(),
            spare: 0,
            welcomed: false,
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
            asked: false,
            state: Taking::Offers,
            has_moved: false,
            told_to_drain: false,
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

    // From and to the dispatcher.

    /// The dispatcher has sent a message. An offer that cannot be served has the reason in its
    /// place, for which it is rejected when its turn comes. Returns the offers that are not wanted.
    ///
    /// # Errors
    /// When it breaks the protocol.
    pub(in crate::handoff) fn on_message(
        &mut self,
        message: ToWorker<Result<T, RejectReason>, Infallible>,
    ) -> Result<Vec<T>, Error> {
        match message {
            ToWorker::Welcome { version: VERSION } if !self.welcomed => self.welcomed = true,
            ToWorker::Welcome { .. } => {
                return Err(Error::invalid("a WELCOME out of place, or to another version"));
            }
            _ if !self.welcomed => {
                return Err(Error::invalid("a dispatcher that does not begin with WELCOME"));
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
                self.told_to_drain = true;
                return Ok(self.drain());
            }
            ToWorker::Fenced => {} // the link ends here
            ToWorker::Move(never) => match never {},
        }
        Ok(Vec::new())
    }

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
        self.offered += 1;
        let (waiting, unwanted) = match offer {
            Ok(offer) if self.state == Taking::Offers => (Waiting::ForApplication(offer), None),
            Ok(offer) => (Waiting::ForTurn(RejectReason::Draining), Some(offer)),
            Err(reason) => (Waiting::ForTurn(reason), None),
        };
        if matches!(waiting, Waiting::ForTurn(RejectReason::Full)) {
            self.spare = 0; // there are fewer free descriptors than were counted
        }
        self.unanswered.push_back(waiting);
        self.reject_due();
        Ok(unwanted)
    }

    /// The dispatcher wants an answer. With the second one after a refusal it is known to have read
    /// that: no offer is on its way, and those that were made void can be asked for anew, as many
    /// as there is room for by then.
    fn on_ping(&mut self, nonce: u64) {
        if self.state == Taking::Nothing {
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

    /// The next message to be sent. What else there is to report goes along with it.
    pub(in crate::handoff) fn next_message(&mut self) -> Option<FromWorker> {
        if !self.messages.is_empty() {
            self.report();
        }
        let message = self.messages.pop_front()?;
        self.taken += 1;
        Some(message)
    }

    /// This many more messages were sent as a whole.
    pub(in crate::handoff) fn on_sent(&mut self, messages: u64) {
        self.sent += messages;
    }

    /// Reports how many connections have ended, if that is news.
    fn report(&mut self) {
        if self.finished > self.reported {
            self.reported = self.finished;
            self.messages.push_back(FromWorker::Load { finished: self.finished });
        }
    }

    // The application.

    /// The application asks for up to `max` connections, which adopts as many of those that wait.
    /// It [gets](Self::take_adopted) them when the dispatcher was told.
    pub(in crate::handoff) fn adopt(&mut self, max: usize) {
        // Connections that were adopted before come first.
        if self.state == Taking::Ended || !self.adopting.is_empty() {
            return;
        }
        self.asked = true;
        self.is_busy = false;
        self.replaced = self.rejected;
        let first = self.adopted + self.rejected;
        let told = self.taken + self.messages.len() as u64 + 1;
        while self.adopting.len() < max
            && let Some(Waiting::ForApplication(_)) = self.unanswered.front()
            && let Some(Waiting::ForApplication(offer)) = self.unanswered.pop_front()
        {
            self.adopting.push_back((told, offer));
        }
        let count = self.adopting.len() as u32;
        if count > 0 {
            self.adopted += u64::from(count);
            self.messages.push_back(FromWorker::Adopted { first, count });
            self.reject_due();
        }
    }

    /// Takes out up to `max` connections that were adopted and that the dispatcher has been told
    /// of.
    pub(in crate::handoff) fn take_adopted<B: Default + Extend<T>>(&mut self, max: usize) -> B {
        let mut adopted = B::default();
        for _ in 0..max {
            if self.adopting.front().is_none_or(|(told, _)| *told > self.sent) {
                break;
            }
            adopted.extend(self.adopting.pop_front().map(|(_, offer)| offer));
        }
        adopted
    }

    /// An adopted connection has ended. Returns true if something is to be done about it before the
    /// [next timeout](Self::next_timeout) that was set before.
    pub(in crate::handoff) fn finish(&mut self, now: Instant) -> bool {
        self.finished += 1;
        let is_first = self.report_at.is_none();
        self.report_at.get_or_insert(now + REPORT_AFTER);
        let is_linked = self.state != Taking::Ended;
        is_linked && (is_first || self.count_at.is_some() || self.is_full() || self.is_draining())
    }

    /// Takes no more offers. Returns those that wait.
    pub(in crate::handoff) fn drain(&mut self) -> Vec<T> {
        if self.state != Taking::Offers {
            return Vec::new();
        }
        self.state = Taking::NoMore;
        self.messages.push_back(FromWorker::Draining);
        self.reject(u64::MAX, RejectReason::Draining)
    }

    /// Rejects the first `count` that are unanswered, and returns them.
    fn reject(&mut self, count: u64, reason: RejectReason) -> Vec<T> {
        let count = self.unanswered.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        let mut unwanted = Vec::new();
        for waiting in self.unanswered.range_mut(..count) {
            match std::mem::replace(waiting, Waiting::ForTurn(reason)) {
                Waiting::ForApplication(offer) => unwanted.push(offer),
                rejected_before => *waiting = rejected_before,
            }
        }
        self.reject_due();
        unwanted
    }

    /// Rejects what nothing waits before.
    fn reject_due(&mut self) {
        while let Some(&Waiting::ForTurn(reason)) = self.unanswered.front() {
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

    // Demand.

    /// The number of offers that could be asked for if there are descriptors for them.
    fn room(&self) -> u64 {
        if !self.welcomed || !self.asked || self.is_busy || self.state != Taking::Offers {
            return 0;
        }
        let limit = self.window.min(self.max_connections.saturating_sub(self.serving()));
        (self.adopted + self.replaced + limit).saturating_sub(self.demand)
    }

    /// Asks for as many offers as there is room for, and descriptors. `free` counts the descriptors
    /// that this process may still open.
    pub(in crate::handoff) fn ask(&mut self, now: Instant, free: impl FnOnce() -> u64) {
        let room = self.room();
        let wanted = room.saturating_mul(self.max_fds);
        if wanted > self.spare {
            let promised = self.on_their_way().saturating_mul(self.max_fds);
            // Half of them, because the application opens files too.
            self.spare = free().saturating_sub(promised).div_ceil(2);
        }
        let granted = room.min(self.spare / self.max_fds);
        self.count_at =
            if granted < room { self.count_at.or(Some(now + COUNT_AFTER)) } else { None };
        if granted > 0 {
            self.spare -= granted * self.max_fds;
            self.demand += granted;
            self.refusal = Refusal::None;
            self.messages.push_back(FromWorker::Demand { total: self.demand });
        }
    }

    pub(in crate::handoff) fn stats(&self) -> IncomingStats {
        IncomingStats {
            adopted: self.adopted_before + self.adopted,
            rejected: self.rejected_before + self.rejected,
            active: self.serving(),
            waiting: self.unanswered.len() as u64,
            requested: if self.state == Taking::Ended { 0 } else { self.on_their_way() },
        }
    }

    /// The number of offers that were asked for and have not come.
    fn on_their_way(&self) -> u64 {
        self.demand - self.offered
    }

    fn serving(&self) -> u64 {
        self.open_before + self.adopted - self.finished
    }

    /// Returns true if the end of a connection makes room for an offer.
    fn is_full(&self) -> bool {
        self.serving() + self.window >= self.max_connections
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

    /// The next time when [`on_timeout`](Self::on_timeout) has something to do.
    pub(in crate::handoff) fn next_timeout(&self) -> Option<Instant> {
        self.report_at.into_iter().chain(self.count_at).min()
    }

    // The end.

    /// The worker goes on at another link. Returns the book of that, and the offers that are not
    /// wanted at this one, which the dispatcher gets back. If this link has not ended, it stays
    /// until the dispatcher asks for a drain.
    pub(in crate::handoff) fn move_on(&mut self) -> (Self, Vec<T>) {
        let max_fds = u8::try_from(self.max_fds).unwrap_or(u8::MAX);
        let mut next = Self::with_open(self.serving(), self.window, self.max_connections, max_fds);
        (next.asked, next.is_busy) = (self.asked, self.is_busy);
        if matches!(self.state, Taking::NoMore | Taking::Nothing) {
            next.drain();
        }
        self.has_moved = true;
        let unwanted = self.drain();
        next.adopted_before = self.adopted_before + self.adopted;
        next.rejected_before = self.rejected_before + self.rejected;
        (next, unwanted)
    }

    /// Says goodbye when it is time to. Returns true if GOODBYE is the last message.
    pub(in crate::handoff) fn leave(&mut self) -> bool {
        let is_done = if self.has_moved { self.told_to_drain } else { self.serving() == 0 };
        if self.state == Taking::NoMore && is_done && self.unanswered.is_empty() {
            self.report();
            self.messages.push_back(FromWorker::Goodbye);
            self.state = Taking::Nothing;
        }
        self.state == Taking::Nothing
    }

    /// The link has ended. What the dispatcher was not told of is not this worker's: it is
    /// returned, or else kept for the application if that serves it all the same.
    pub(in crate::handoff) fn end(&mut self, serve: bool) -> Left<T> {
        self.state = Taking::Ended;
        let untold = self.adopting.partition_point(|(told, _)| *told <= self.sent);
        let lost = (self.adopting.len() - untold) as u64;
        self.adopted -= lost;
        let untold = self.adopting.split_off(untold).into_iter().map(|(_, offer)| offer);
        let waiting =
            std::mem::take(&mut self.unanswered).into_iter().filter_map(|waiting| match waiting {
                Waiting::ForApplication(offer) => Some(offer),
                Waiting::ForTurn(_) => None,
            });
        let mut offers = Vec::from_iter(untold.chain(waiting));
        if serve {
            self.adopted += offers.len() as u64;
            self.adopting.extend(offers.drain(..).map(|offer| (0, offer)));
        }
        Left { offers, lost }
    }

    #[cfg(test)]
    pub(in crate::handoff) fn has_ended(&self) -> bool {
        self.state == Taking::Ended
    }

    /// The number of connections that were adopted and that the application has not got.
    pub(in crate::handoff) fn adopting(&self) -> usize {
        self.adopting.len()
    }

    /// Returns true if every adopted connection has ended too.
    pub(in crate::handoff) fn has_finished(&self) -> bool {
        self.state == Taking::Ended && self.serving() == 0
    }

    pub(in crate::handoff) fn is_draining(&self) -> bool {
        self.state != Taking::Offers
    }

    /// Returns true if the application gets nothing more.
    pub(in crate::handoff) fn is_over(&self) -> bool {
        self.adopting.is_empty() && self.is_draining()
    }

    /// Returns true if the application has something to come for.
    pub(in crate::handoff) fn is_worth_asking(&self) -> bool {
        match self.adopting.front() {
            Some((told, _)) => *told <= self.sent,
            None if self.has_moved => false,
            // Others may come in the place of rejected ones because the application has never
            // stopped asking.
            None => !self.unanswered.is_empty() || self.replaced < self.rejected || self.is_over(),
        }
    }
}
