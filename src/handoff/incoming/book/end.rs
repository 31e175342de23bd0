//! The end of a link: the move to another one, the goodbye, and the offers that are left.

use super::{Book, BookPhase, Waiting};
use crate::handoff::protocol::FromWorker;

/// The offers that a link leaves behind at its end, and that do not belong to this worker.
#[derive(Debug)]
pub(in crate::handoff) struct Unowned<T> {
    pub(in crate::handoff) offers: Vec<T>,
    /// How many of the offers the application had adopted. These adoptions were not sent, and are
    /// undone.
    pub(in crate::handoff) undone: u64,
}

impl<T> Book<T> {
    /// Moves the worker on to a new link. Returns the book of the new link, and the offers of this
    /// one that wait, which are rejected. This link stays until its dispatcher asks for a drain,
    /// unless it has ended before.
    pub(in crate::handoff) fn move_on(&mut self) -> (Self, Vec<T>) {
        // The new book goes on where this one stops, also if this one is draining.
        let max_fds = u8::try_from(self.max_fds).unwrap_or(u8::MAX);
        let mut next = Self::with_open(self.serving(), self.window, self.max_connections, max_fds);
        (next.has_asked, next.is_busy) = (self.has_asked, self.is_busy);
        if matches!(self.phase, BookPhase::Draining | BookPhase::Left) {
            next.drain();
        }
        self.has_moved = true;
        let unwanted = self.drain();
        next.adopted_before = self.adopted_before + self.adopted;
        next.rejected_before = self.rejected_before + self.rejected;
        (next, unwanted)
    }

    /// Sends GOODBYE if nothing is left to do at this link. Returns true if GOODBYE is in the
    /// messages or was sent.
    pub(in crate::handoff) fn leave(&mut self) -> bool {
        let is_done = if self.has_moved { self.drain_requested } else { self.serving() == 0 };
        if self.phase == BookPhase::Draining && is_done && self.unanswered.is_empty() {
            self.report();
            self.messages.push_back(FromWorker::Goodbye);
            self.phase = BookPhase::Left;
        }
        self.phase == BookPhase::Left
    }

    /// Ends the link. Offers whose adoption was not sent do not belong to this worker, so they are
    /// returned. If `serve` is true, the application gets them nevertheless, and none is returned.
    pub(in crate::handoff) fn end(&mut self, serve: bool) -> Unowned<T> {
        self.phase = BookPhase::Ended;
        // Adoptions that were not sent are undone.
        let sent = self.adopting.partition_point(|(sent_with, _)| *sent_with <= self.sent);
        let undone = (self.adopting.len() - sent) as u64;
        self.adopted -= undone;
        let unsent = self.adopting.split_off(sent).into_iter().map(|(_, offer)| offer);
        let waiting =
            std::mem::take(&mut self.unanswered).into_iter().filter_map(|waiting| match waiting {
                Waiting::ForApplication(offer) => Some(offer),
                Waiting::ForRejection(_) => None,
            });
        let mut offers = Vec::from_iter(unsent.chain(waiting));
        if serve {
            // With the number 0 the application does not wait for any message to be sent.
            self.adopted += offers.len() as u64;
            self.adopting.extend(offers.drain(..).map(|offer| (0, offer)));
        }
        Unowned { offers, undone }
    }

    #[cfg(test)]
    pub(in crate::handoff) fn has_ended(&self) -> bool {
        self.phase == BookPhase::Ended
    }

    /// Returns the number of adopted connections that the application has not received.
    pub(in crate::handoff) fn adopting(&self) -> usize {
        self.adopting.len()
    }

    /// Returns true if the link has ended, and so has every adopted connection.
    pub(in crate::handoff) fn has_finished(&self) -> bool {
        self.phase == BookPhase::Ended && self.serving() == 0
    }

    /// Returns true if the worker takes no more offers at this link, or the link has ended.
    pub(in crate::handoff) fn is_draining(&self) -> bool {
        self.phase != BookPhase::Open
    }

    /// Returns true if the application gets no more connections from this link.
    pub(in crate::handoff) fn is_over(&self) -> bool {
        self.adopting.is_empty() && self.is_draining()
    }

    /// Returns true if the application would get something if it asked now: a connection, or the
    /// end of its stream. Also true if its request would let the worker ask for more offers.
    pub(in crate::handoff) fn is_worth_asking(&self) -> bool {
        match self.adopting.front() {
            Some((sent_with, _)) => *sent_with <= self.sent,
            None if self.has_moved => false,
            // After a rejection the worker asks for other offers only if the application asks
            // again.
            None => !self.unanswered.is_empty() || self.replaced < self.rejected || self.is_over(),
        }
    }
}
