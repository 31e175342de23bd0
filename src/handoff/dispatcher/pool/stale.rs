//! Copies of connections that the dispatcher has no control of: in processes that were fenced and
//! have not ended.

use std::collections::BTreeMap;

use super::{Event, ProcessId};

/// A retired worker's process may hold, until it ends, copies of what it was offered. They do no
/// harm to a connection that another worker serves. But if that one dies, the client would not see
/// the end, so the dispatcher keeps its own copy, by which it can end the connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher) struct StaleCopies<C> {
    /// Processes of retired workers that may live, and how many descriptors each may have in
    /// flight.
    holders: BTreeMap<ProcessId, usize>,
    kept: Vec<Kept<C>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kept<C> {
    connection: C,
    adopter: ProcessId,
    holders: Vec<ProcessId>,
}

impl<C> Default for StaleCopies<C> {
    fn default() -> Self {
        Self { holders: BTreeMap::new(), kept: Vec::new() }
    }
}

impl<C> StaleCopies<C> {
    /// A worker of this process was retired, and the process may live. It may have this many more
    /// descriptors in flight.
    pub(super) fn add_holder(&mut self, process: ProcessId, in_flight: usize) {
        *self.holders.entry(process).or_default() += in_flight;
    }

    /// The number of descriptors that may be in flight to them.
    pub(super) fn fds(&self) -> usize {
        self.holders.values().sum()
    }

    /// A worker has adopted a connection that these may hold.
    pub(super) fn keep(
        &mut self,
        connection: C,
        adopter: ProcessId,
        mut holders: Vec<ProcessId>,
        events: &mut Vec<Event<C>>,
    ) {
        // The end of a process ends its connections, however many copies it holds.
        holders.retain(|holder| *holder != adopter && self.holders.contains_key(holder));
        if holders.is_empty() {
            events.push(Event::Close(connection));
        } else {
            self.kept.push(Kept { connection, adopter, holders });
        }
    }

    /// Returns true if it matters when the process of this adopter ends.
    pub(super) fn are_kept_for(&self, adopter: ProcessId) -> bool {
        self.kept.iter().any(|kept| kept.adopter == adopter)
    }

    #[cfg(test)]
    pub(super) fn keeps(&self, connection: &C) -> bool
    where
        C: PartialEq,
    {
        self.kept.iter().any(|kept| kept.connection == *connection)
    }

    pub(super) fn on_process_end(&mut self, process: ProcessId, events: &mut Vec<Event<C>>) {
        self.holders.remove(&process);
        for kept in self.kept.extract_if(.., |kept| kept.adopter == process) {
            events.push(Event::ShutDown(kept.connection));
        }
        for kept in &mut self.kept {
            kept.holders.retain(|holder| *holder != process);
        }
        let needless = self.kept.extract_if(.., |kept| kept.holders.is_empty());
        events.extend(needless.map(|kept| Event::Close(kept.connection)));
    }

    /// Takes out the copies of connections that have ended.
    pub(in crate::handoff::dispatcher) fn take_ended(
        &mut self,
        has_ended: impl Fn(&C) -> bool,
    ) -> Vec<C> {
        self.kept
            .extract_if(.., |kept| has_ended(&kept.connection))
            .map(|kept| kept.connection)
            .collect()
    }
}
