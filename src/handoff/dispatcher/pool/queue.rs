//! Connections, and users with a connection to come, that wait for a worker of one group.

use std::{collections::BTreeMap, time::Instant};

use super::Pending;

/// The queue: who waits, by its places, which grow to the back and fall to the front.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Queue<C>(BTreeMap<i64, Waiter<C>>);

/// The place in the queue of a user that waits for a place at a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::handoff::dispatcher) struct TicketId(pub(super) i64);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Waiter<C> {
    Connection(Pending<C>),
    /// A user that has been waiting for a place since then.
    Ticket(Instant),
}

impl<C> Default for Queue<C> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<C> Queue<C> {
    pub(super) fn push_front(&mut self, pending: Pending<C>) {
        let place = self.0.first_key_value().map_or(-1, |(first, _)| first - 1);
        self.0.insert(place, Waiter::Connection(pending));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first waiter at this place or behind it.
    pub(super) fn next(&mut self, from: i64) -> Option<(i64, &mut Waiter<C>)> {
        self.0.range_mut(from..).next().map(|(place, waiter)| (*place, waiter))
    }

    pub(super) fn take(&mut self, place: i64) -> Option<Pending<C>> {
        match self.0.remove(&place)? {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        }
    }

    /// Puts a waiter at a place that is free.
    pub(super) fn put(&mut self, place: i64, waiter: Waiter<C>) {
        self.0.insert(place, waiter);
    }

    /// Returns true if it was waiting.
    pub(super) fn remove_ticket(&mut self, ticket: TicketId) -> bool {
        let waits = matches!(self.0.get(&ticket.0), Some(Waiter::Ticket(_)));
        waits && self.0.remove(&ticket.0).is_some()
    }

    pub(super) fn grant(&mut self, place: i64) -> TicketId {
        self.0.remove(&place);
        TicketId(place)
    }

    /// Since when the first user has been waiting.
    pub(super) fn first_ticket(&self) -> Option<Instant> {
        self.0.values().find_map(|waiter| match waiter {
            Waiter::Ticket(since) => Some(*since),
            Waiter::Connection(_) => None,
        })
    }

    pub(super) fn remove_tickets(&mut self) {
        self.0.retain(|_, waiter| matches!(waiter, Waiter::Connection(_)));
    }

    pub(super) fn take_connections(&mut self) -> impl Iterator<Item = C> + use<C> {
        std::mem::take(&mut self.0).into_values().filter_map(|waiter| match waiter {
            Waiter::Connection(pending) => Some(pending.connection),
            Waiter::Ticket(_) => None,
        })
    }

    #[cfg(test)]
    pub(super) fn waiters(&self) -> impl Iterator<Item = &Waiter<C>> {
        self.0.values()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The number of users that wait for a place.
    pub(super) fn tickets(&self) -> usize {
        self.0.len() - self.connections()
    }

    pub(super) fn connections(&self) -> usize {
        self.iter().count()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending<C>> {
        self.0.values().filter_map(|waiter| match waiter {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        })
    }
}
