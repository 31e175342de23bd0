//! What a worker knows of its offers, and what it has to say of them: **sans-IO**, and generic over what an offer is.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::{
    Error,
    handoff::protocol::{FromWorker, RejectReason},
};

/// The offers of one connection to a dispatcher. All numbers count from its beginning.
#[derive(Debug)]
pub(super) struct Book<T> {
    /// Most offers that may be on their way or wait.
    window: u64,
    /// Most of them together with adopted connections that have not ended.
    max_connections: u64,
    /// `offered <= demand`, and `offered == adopted + rejected + unanswered.len()`.
    demand: u64,
    offered: u64,
    adopted: u64,
    rejected: u64,
    /// Of the rejected, those in whose place others may come: rejected before the application asked last.
    replaced: u64,
    /// `reported <= finished <= adopted`.
    finished: u64,
    reported: u64,
    /// The first one, if any, waits for the application: answers are given in the order of the offers.
    unanswered: VecDeque<Waiting<T>>,
    /// The application has asked for a connection at least once.
    asked: bool,
    state: Taking,
    refusal: Refusal,
    /// The dispatcher has asked for offers back, and the application has not shown up since.
    is_busy: bool,
    /// To be sent, in this order.
    pub(super) messages: Vec<FromWorker>,
}

#[derive(Debug)]
enum Waiting<T> {
    ForApplication(T),
    /// For those before it to be answered.
    ForTurn(RejectReason),
}

/// A REJECTED for want of room or time. It makes void what was asked for and not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// None, or another DEMAND has followed.
    None,
    /// Offers that were made before it was read may be on their way.
    Said,
    /// The same; the dispatcher will have read it when it pings again.
    Pinged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taking {
    Offers,
    NoMore,
    Leave,
}

impl<T> Book<T> {
    pub(super) fn new(window: u64, max_connections: u64) -> Self {
        Self {
            window,
            max_connections,
            demand: 0,
            offered: 0,
            adopted: 0,
            rejected: 0,
            replaced: 0,
            finished: 0,
            reported: 0,
            unanswered: VecDeque::new(),
            asked: false,
            state: Taking::Offers,
            refusal: Refusal::None,
            is_busy: false,
            messages: Vec::new(),
        }
    }

    /// The dispatcher has made an offer; an `Err` is to be rejected when its turn comes. Returns what is not wanted.
    ///
    /// # Errors
    /// When it was not asked for.
    pub(super) fn offered(&mut self, offer: Result<T, (T, RejectReason)>) -> Result<Option<T>, Error> {
        if self.offered == self.demand {
            return Err(Error::invalid("more offers than were asked for"));
        }
        self.offered += 1;
        let unwanted = match offer {
            Ok(offer) if self.state == Taking::Offers => {
                self.unanswered.push_back(Waiting::ForApplication(offer));
                return Ok(None);
            }
            Ok(offer) => (offer, RejectReason::Draining),
            Err(unfit) => unfit,
        };
        self.unanswered.push_back(Waiting::ForTurn(unwanted.1));
        self.reject_due();
        Ok(Some(unwanted.0))
    }

    /// The application asks for up to `max` connections, and gets as many of those that wait, which are adopted.
    pub(super) fn adopt(&mut self, max: usize) -> Vec<T> {
        self.asked = true;
        self.is_busy = false;
        self.replaced = self.rejected;
        let mut adopted = Vec::new();
        while adopted.len() < max {
            match self.unanswered.pop_front() {
                Some(Waiting::ForApplication(offer)) => adopted.push(offer),
                Some(turn) => {
                    self.unanswered.push_front(turn);
                    break;
                }
                None => break,
            }
        }
        if !adopted.is_empty() {
            self.adopted += adopted.len() as u64;
            self.messages.push(FromWorker::Adopted { count: adopted.len() as u32 });
            self.reject_due();
        }
        adopted
    }

    /// Offers before this number are to be given back if they are unanswered. Returns them.
    pub(super) fn recall(&mut self, before: u64) -> Vec<T> {
        let first = self.adopted + self.rejected;
        self.refuse(before.saturating_sub(first), RejectReason::Recalled)
    }

    /// From here on no offer is taken. Returns those that wait.
    pub(super) fn drain(&mut self) -> Vec<T> {
        if self.state != Taking::Offers {
            return Vec::new();
        }
        self.state = Taking::NoMore;
        self.messages.push(FromWorker::Draining);
        self.refuse(u64::MAX, RejectReason::Draining)
    }

    /// Rejects the first `count` that are unanswered.
    fn refuse(&mut self, count: u64, reason: RejectReason) -> Vec<T> {
        let count = self.unanswered.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        let mut unwanted = Vec::new();
        for waiting in self.unanswered.range_mut(..count) {
            match std::mem::replace(waiting, Waiting::ForTurn(reason)) {
                Waiting::ForApplication(offer) => unwanted.push(offer),
                refused_before => *waiting = refused_before,
            }
        }
        self.reject_due();
        unwanted
    }

    /// Rejects what nothing waits before.
    fn reject_due(&mut self) {
        while let Some(&Waiting::ForTurn(reason)) = self.unanswered.front() {
            self.unanswered.pop_front();
            self.rejected += 1;
            if reason.is_refusal() {
                self.refusal = Refusal::Said;
            }
            self.is_busy |= reason == RejectReason::Recalled;
            match self.messages.last_mut() {
                Some(FromWorker::Rejected { count, reason: last }) if *last == reason => *count += 1,
                _ => self.messages.push(FromWorker::Rejected { count: 1, reason }),
            }
        }
    }

    /// How many more offers could be taken.
    pub(super) fn room(&self) -> u64 {
        if !self.asked || self.is_busy || self.state != Taking::Offers {
            return 0;
        }
        let limit = self.window.min(self.max_connections.saturating_sub(self.serving()));
        (self.adopted + self.replaced + limit).saturating_sub(self.demand)
    }

    /// Asks for so many more offers.
    pub(super) fn ask(&mut self, more: u64) {
        if more > 0 {
            self.demand += more;
            self.refusal = Refusal::None;
            self.messages.push(FromWorker::Demand { total: self.demand });
        }
    }

    /// The dispatcher wants an answer. With the second one after a refusal it is known to have read that: no offer is on its way any
    /// more, and those that were made void can be asked for anew, as many as there is room for by then.
    pub(super) fn pinged(&mut self, nonce: u64) {
        self.messages.push(FromWorker::Pong { nonce });
        self.refusal = match self.refusal {
            Refusal::None => Refusal::None,
            Refusal::Said => Refusal::Pinged,
            Refusal::Pinged => {
                self.demand = self.offered;
                Refusal::None
            }
        };
    }

    /// Number of offers asked for that have not come.
    pub(super) fn on_their_way(&self) -> u64 {
        self.demand - self.offered
    }

    /// An adopted connection has ended.
    pub(super) fn finish(&mut self) {
        self.finished += 1;
    }

    fn serving(&self) -> u64 {
        self.adopted - self.finished
    }

    /// Whether the end of a connection makes room for an offer.
    pub(super) fn is_full(&self) -> bool {
        self.serving() + self.window > self.max_connections
    }

    /// Says how many connections have ended, if that is news.
    pub(super) fn report(&mut self) {
        if self.finished > self.reported {
            self.reported = self.finished;
            self.messages.push(FromWorker::Load { finished: self.finished });
        }
    }

    /// Says goodbye when it is time to. Returns whether it was said, now or before.
    pub(super) fn leave(&mut self) -> bool {
        if self.state == Taking::NoMore && self.serving() == 0 && self.unanswered.is_empty() {
            self.report();
            self.messages.push(FromWorker::Goodbye);
            self.state = Taking::Leave;
        }
        self.state == Taking::Leave
    }

    /// Whether something waits for the application.
    pub(super) fn has_waiting(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// Whether others may come in the place of rejected ones when the application asks, or because it has never stopped asking.
    pub(super) fn may_replace(&self) -> bool {
        self.replaced < self.rejected
    }

    pub(super) fn is_draining(&self) -> bool {
        self.state != Taking::Offers
    }

    /// Takes out what is unanswered and not rejected.
    pub(super) fn take_unanswered(&mut self) -> impl Iterator<Item = T> {
        self.unanswered.drain(..).filter_map(|waiting| match waiting {
            Waiting::ForApplication(offer) => Some(offer),
            Waiting::ForTurn(_) => None,
        })
    }
}
