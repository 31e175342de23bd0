//! The worker's answers to its offers: in the course of a link, and at its end.

use super::{Account, misbehaved};
use crate::handoff::dispatcher::{RetireCause, pool::Pending};

/// The connections that a worker has not answered when it is retired.
pub(in crate::handoff::dispatcher::pool) struct Remains<C> {
    /// Offers that were sent, so the worker may have received them.
    pub(in crate::handoff::dispatcher::pool) unanswered: Vec<Pending<C>>,
    /// Connections that were planned, and offers that were made and not sent.
    pub(in crate::handoff::dispatcher::pool) never_sent: Vec<Pending<C>>,
    /// The number of repeated offers among those that were made and not sent.
    pub(in crate::handoff::dispatcher::pool) repeated: u64,
}

impl<C> Account<C> {
    // In the course of the link.

    /// Takes out the next `count` offers, because the worker has answered them. The last `unsent`
    /// offers were not sent, so it cannot have answered these.
    ///
    /// # Errors
    /// Returns an error if `first` is not the next unanswered offer, or if fewer than `count` were
    /// sent.
    fn take_answered(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let (next, sent) =
            (self.adopted + self.rejected, self.unanswered.len().saturating_sub(unsent));
        if first != next {
            return misbehaved(format!("it answered offer {first} instead of {next}"));
        }
        match usize::try_from(count) {
            Ok(count) if count <= sent => Ok(self.unanswered.take(..count)),
            _ => misbehaved(format!("it answered {count} offers, but {sent} were unanswered")),
        }
    }

    /// Takes out the offers that the worker has adopted. For the errors see `take_answered`.
    pub(in crate::handoff::dispatcher::pool) fn on_adopted(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let adopted = self.take_answered(first, count, unsent)?;
        self.adopted += u64::from(count);
        if count > 0 {
            self.timeouts.on_adopted();
        }
        Ok(adopted)
    }

    /// Takes out the offers that the worker has rejected. For the errors see `take_answered`.
    pub(in crate::handoff::dispatcher::pool) fn on_rejected(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let rejected = self.take_answered(first, count, unsent)?;
        self.rejected += u64::from(count);
        Ok(rejected)
    }

    // At the end of the link.

    /// Takes out the offers that a worker has adopted in a message before it was fenced.
    pub(in crate::handoff::dispatcher::pool) fn on_last_adopted(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Vec<Pending<C>> {
        let adopted = self.take_last_answered(first, count, unsent);
        self.adopted += adopted.len() as u64;
        adopted
    }

    /// Takes out all offers that were sent, and counts them as adopted.
    pub(in crate::handoff::dispatcher::pool) fn adopt_all(
        &mut self,
        unsent: usize,
    ) -> Vec<Pending<C>> {
        let adopted = self.unanswered.take(..self.unanswered.len().saturating_sub(unsent));
        self.adopted += adopted.len() as u64;
        adopted
    }

    /// Takes out the offers that a last message answers. They need not be the oldest ones, because
    /// a complete message counts even if the worker has broken the protocol. Takes nothing if one
    /// of the offers was not sent.
    pub(in crate::handoff::dispatcher::pool) fn take_last_answered(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Vec<Pending<C>> {
        // `past` is the number behind that of the last offer that was sent.
        let sent = self.unanswered.len().saturating_sub(unsent);
        let last = sent.checked_sub(1).and_then(|last| self.unanswered.get(last));
        let Some(past) = last.map(|last| last.number + 1) else { return Vec::new() };
        let Some(end) = first.checked_add(count.into()).filter(|end| *end <= past) else {
            return Vec::new();
        };
        let (answered, rest): (Vec<_>, Vec<_>) = self
            .unanswered
            .take(..)
            .into_iter()
            .partition(|pending| (first..end).contains(&pending.number));
        for pending in rest {
            self.unanswered.push_back(pending);
        }
        answered
    }

    /// Closes the account, and returns the connections in it. The last `unsent` offers were not
    /// sent.
    pub(in crate::handoff::dispatcher::pool) fn retire(mut self, unsent: usize) -> Remains<C> {
        // Offers that were not sent do not count as made, neither for their connections nor among
        // the repeated ones.
        let sent = self.unanswered.len().saturating_sub(unsent);
        let mut never_sent = self.unanswered.take(sent..);
        let repeated = never_sent.iter().filter(|pending| pending.offers > 1).count();
        never_sent.iter_mut().for_each(|pending| pending.offers -= 1);
        never_sent.extend(self.planned.take(..));
        Remains { unanswered: self.unanswered.take(..), never_sent, repeated: repeated as u64 }
    }
}
