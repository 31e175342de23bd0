//! The dispatcher's own copies of connections of which a retired worker may still have a copy.

use std::collections::BTreeMap;

use super::{Event, ProcessId};

/// The processes that may hold stale copies, and the copies that the dispatcher keeps for that.
///
/// A retired worker's process may hold copies of what it was offered until it ends. That does no
/// harm to a connection while another worker serves it. But if the other worker dies, the stale
/// copy keeps the connection open, and the client never gets the end. So the dispatcher keeps a
/// copy of its own, with which it can shut the connection down.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher) struct KeptCopies<C> {
    /// Processes of retired workers that may live, and how many descriptors each may have in
    /// flight.
    holders: BTreeMap<ProcessId, usize>,
    /// The dispatcher's own copies. Each has at least one holder.
    copies: Vec<Kept<C>>,
}

/// The dispatcher's own copy of an adopted connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kept<C> {
    connection: C,
    /// The process that has adopted the connection.
    adopter: ProcessId,
    /// The other processes that may hold a copy.
    holders: Vec<ProcessId>,
}

impl<C> Default for KeptCopies<C> {
    fn default() -> Self {
        Self { holders: BTreeMap::new(), copies: Vec::new() }
    }
}

impl<C> KeptCopies<C> {
    /// Adds the process of a retired worker, which may live. Up to `in_flight` descriptors may be
    /// in flight to it, in addition to earlier ones.
    pub(super) fn add_holder(&mut self, process: ProcessId, in_flight: usize) {
        *self.holders.entry(process).or_default() += in_flight;
    }

    /// The number of descriptors that may be in flight to processes of retired workers.
    pub(super) fn fds(&self) -> usize {
        self.holders.values().sum()
    }

    /// Keeps the dispatcher's copy of an adopted connection as long as one of the holders lives.
    pub(super) fn keep(
        &mut self,
        connection: C,
        adopter: ProcessId,
        mut holders: Vec<ProcessId>,
        events: &mut Vec<Event<C>>,
    ) {
        // The adopter is not such a holder: its end closes all of its own copies.
        holders.retain(|holder| *holder != adopter && self.holders.contains_key(holder));
        if holders.is_empty() {
            events.push(Event::Close(connection));
        } else {
            self.copies.push(Kept { connection, adopter, holders });
        }
    }

    /// Returns true if a copy of a connection is kept that this process has adopted.
    pub(super) fn are_kept_for(&self, adopter: ProcessId) -> bool {
        self.copies.iter().any(|kept| kept.adopter == adopter)
    }

    #[cfg(test)]
    pub(super) fn keeps(&self, connection: &C) -> bool
    where
        C: PartialEq,
    {
        self.copies.iter().any(|kept| kept.connection == *connection)
    }

    /// Shuts down the connections that a process had adopted, because it has ended, and closes the
    /// copies that are no longer needed.
    pub(super) fn on_process_end(&mut self, process: ProcessId, events: &mut Vec<Event<C>>) {
        self.holders.remove(&process);
        for kept in self.copies.extract_if(.., |kept| kept.adopter == process) {
            events.push(Event::ShutDown(kept.connection));
        }
        for kept in &mut self.copies {
            kept.holders.retain(|holder| *holder != process);
        }
        // Connections of which no other process can hold a copy now.
        let needless = self.copies.extract_if(.., |kept| kept.holders.is_empty());
        events.extend(needless.map(|kept| Event::Close(kept.connection)));
    }

    /// Takes out the copies of connections that have ended.
    pub(in crate::handoff::dispatcher) fn take_ended(
        &mut self,
        has_ended: impl Fn(&C) -> bool,
    ) -> Vec<C> {
        self.copies
            .extract_if(.., |kept| has_ended(&kept.connection))
            .map(|kept| kept.connection)
            .collect()
    }
}
