//! A list of offers that counts their descriptors.

use std::{
    collections::VecDeque,
    ops::{Deref, RangeBounds},
};

use super::Pending;

/// Offers in their order, and the number of their descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Offers<C> {
    offers: VecDeque<Pending<C>>,
    /// The sum of `fds` over all `offers`.
    pub(super) fds: usize,
}

impl<C> Offers<C> {
    pub(super) fn push_back(&mut self, pending: Pending<C>) -> &Pending<C> {
        self.fds += pending.fds;
        self.offers.push_back(pending);
        &self.offers[self.offers.len() - 1]
    }

    pub(super) fn pop_front(&mut self) -> Option<Pending<C>> {
        let first = self.offers.pop_front()?;
        self.fds -= first.fds;
        Some(first)
    }

    /// Takes out the offers at these positions.
    pub(super) fn take(&mut self, range: impl RangeBounds<usize>) -> Vec<Pending<C>> {
        let taken = Vec::from_iter(self.offers.drain(range));
        self.fds -= taken.iter().map(|pending| pending.fds).sum::<usize>();
        taken
    }
}

impl<C> Default for Offers<C> {
    fn default() -> Self {
        Self { offers: VecDeque::new(), fds: 0 }
    }
}

impl<C> Deref for Offers<C> {
    type Target = VecDeque<Pending<C>>;

    fn deref(&self) -> &VecDeque<Pending<C>> {
        &self.offers
    }
}
