//! The queue of one group: connections that wait for a worker, and callers that wait for room for a
//! connection to come.

use std::{collections::BTreeMap, time::Instant};

use super::Pending;

/// The queue, by position. Positions grow towards the back, and can be negative at the front.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Queue<C>(BTreeMap<i64, Waiter<C>>);

/// The position in the queue of a caller that waits for a slot at a worker. No other caller ever
/// gets it, so it identifies the caller even after it has left the queue. A connection may get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::handoff::dispatcher) struct TicketId(pub(super) i64);

/// A waiter in a queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Waiter<C> {
    Connection(Pending<C>),
    /// A caller that has been waiting for a slot since this time.
    Ticket(Instant),
}

impl<C> Default for Queue<C> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<C> Queue<C> {
    /// Adds a connection in front of all waiters.
    pub(super) fn push_front(&mut self, pending: Pending<C>) {
        let position = self.0.first_key_value().map_or(-1, |(first, _)| first - 1);
        self.0.insert(position, Waiter::Connection(pending));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the first waiter at this position or behind it, with its position.
    pub(super) fn next(&mut self, from: i64) -> Option<(i64, &mut Waiter<C>)> {
        self.0.range_mut(from..).next().map(|(position, waiter)| (*position, waiter))
    }

    /// Takes out the connection at this position.
    pub(super) fn take(&mut self, position: i64) -> Option<Pending<C>> {
        match self.0.remove(&position)? {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        }
    }

    /// Puts a waiter at a position that is free.
    pub(super) fn put(&mut self, position: i64, waiter: Waiter<C>) {
        self.0.insert(position, waiter);
    }

    /// Removes the caller with this ticket. Returns false if the caller was not waiting here.
    pub(super) fn remove_ticket(&mut self, ticket: TicketId) -> bool {
        let waits = matches!(self.0.get(&ticket.0), Some(Waiter::Ticket(_)));
        waits && self.0.remove(&ticket.0).is_some()
    }

    /// Takes out the caller at this position, and returns the ticket.
    pub(super) fn grant(&mut self, position: i64) -> TicketId {
        self.0.remove(&position);
        TicketId(position)
    }

    /// Returns the time since which the first caller has been waiting.
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

    /// The number of callers that wait for a slot.
    pub(super) fn tickets(&self) -> usize {
        self.0.len() - self.connections()
    }

    /// The number of connections that wait.
    pub(super) fn connections(&self) -> usize {
        self.iter().count()
    }

    /// Returns the connections that wait, from the front to the back.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending<C>> {
        self.0.values().filter_map(|waiter| match waiter {
            Waiter::Connection(pending) => Some(pending),
            Waiter::Ticket(_) => None,
        })
    }
}
