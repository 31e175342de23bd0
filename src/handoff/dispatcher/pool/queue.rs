//! Connections, and users with a connection to come, that wait for a worker with room.

use std::{collections::BTreeMap, time::Instant};

use super::Pending;

/// What waits, in its order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Queue<C> {
    /// By their places, which grow to the back and fall to the front.
    waiters: BTreeMap<i64, Waiter<C>>,
    /// The next place at the back. None is used twice, because tickets outlive their places.
    back: i64,
}

/// The place in the queue of a user that waits for a place at a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::handoff::dispatcher) struct TicketId(i64);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Waiter<C> {
    Connection(Pending<C>),
    /// A user that has been waiting for a place since then.
    Ticket(Instant),
}

impl<C> Default for Queue<C> {
    fn default() -> Self {
        Self { waiters: BTreeMap::new(), back: 0 }
    }
}

impl<C> Queue<C> {
    pub(super) fn push_back(&mut self, waiter: Waiter<C>) -> TicketId {
        let place = self.back;
        self.back += 1;
        self.waiters.insert(place, waiter);
        TicketId(place)
    }

    pub(super) fn push_front(&mut self, pending: Pending<C>) {
        let place = self.waiters.first_key_value().map_or(-1, |(first, _)| first - 1);
        self.waiters.insert(place, Waiter::Connection(pending));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// The first waiter at this place or behind it.
    pub(super) fn next(&mut self, from: i64) -> Option<(i64, &mut Waiter<C>)> {
        self.waiters.range_mut(from..).next().map(|(place, waiter)| (*place, waiter))
    }

    pub(super) fn take(&mut self, place: i64) -> Option<Pending<C>> {
        match self.waiters.remove(&place)? {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        }
    }

    /// Puts a connection back where it was taken.
    pub(super) fn put(&mut self, place: i64, pending: Pending<C>) {
        self.waiters.insert(place, Waiter::Connection(pending));
    }

    /// Returns true if it was waiting.
    pub(super) fn remove_ticket(&mut self, ticket: TicketId) -> bool {
        let waits = matches!(self.waiters.get(&ticket.0), Some(Waiter::Ticket(_)));
        waits && self.waiters.remove(&ticket.0).is_some()
    }

    pub(super) fn grant(&mut self, place: i64) -> TicketId {
        self.waiters.remove(&place);
        TicketId(place)
    }

    /// Since when the first user has been waiting.
    pub(super) fn first_ticket(&self) -> Option<Instant> {
        self.waiters.values().find_map(|waiter| match waiter {
            Waiter::Ticket(since) => Some(*since),
            Waiter::Connection(_) => None,
        })
    }

    pub(super) fn remove_tickets(&mut self) {
        self.waiters.retain(|_, waiter| matches!(waiter, Waiter::Connection(_)));
    }

    pub(super) fn take_connections(&mut self) -> impl Iterator<Item = C> + use<C> {
        std::mem::take(&mut self.waiters).into_values().filter_map(|waiter| match waiter {
            Waiter::Connection(pending) => Some(pending.connection),
            Waiter::Ticket(_) => None,
        })
    }

    #[cfg(test)]
    pub(super) fn waiters(&self) -> impl Iterator<Item = &Waiter<C>> {
        self.waiters.values()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn connections(&self) -> usize {
        self.iter().count()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending<C>> {
        self.waiters.values().filter_map(|waiter| match waiter {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_waiter_has_a_place_of_its_own() {
        let now = Instant::now();
        let mut queue = Queue::default();
        queue.push_front(Pending::new('b', 0, 1, now));
        let ticket = queue.push_back(Waiter::Ticket(now));
        queue.push_front(Pending::new('a', 0, 1, now));
        queue.push_back(Waiter::Connection(Pending::new('c', 0, 1, now)));
        assert_eq!(queue.len(), 4);
        assert!(queue.remove_ticket(ticket));
        let next = queue.push_back(Waiter::Ticket(now));
        assert!(!queue.remove_ticket(ticket) && queue.remove_ticket(next));
        assert_eq!(Vec::from_iter(queue.take_connections()), ['a', 'b', 'c']);
    }
}
