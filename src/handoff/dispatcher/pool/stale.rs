//! Copies of connections that the dispatcher has no control of: in processes that were fenced and have not ended.

use std::collections::BTreeMap;

use super::Event;
use crate::handoff::dispatcher::LinkId;

/// A retired worker's process may hold, until it ends, copies of what it was offered. They do no harm to a connection
/// that another worker serves. But if that one dies, the client would not see the end, so the dispatcher keeps its own copy, by
/// which it can end the connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher) struct StaleCopies<C> {
    /// Retired workers whose processes may live, and how many descriptors each was sent and has not answered.
    holders: BTreeMap<LinkId, usize>,
    kept: Vec<Kept<C>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kept<C> {
    connection: C,
    adopter: LinkId,
    holders: Vec<LinkId>,
}

impl<C> Default for StaleCopies<C> {
    fn default() -> Self {
        Self { holders: BTreeMap::new(), kept: Vec::new() }
    }
}

impl<C> StaleCopies<C> {
    /// This worker was retired, and its process may live.
    pub(super) fn add_holder(&mut self, link: LinkId, fds: usize) {
        self.holders.insert(link, fds);
    }

    /// The number of descriptors that may be in flight to them.
    pub(super) fn fds(&self) -> usize {
        self.holders.values().sum()
    }

    /// A worker has adopted a connection that these may hold.
    pub(super) fn keep(
        &mut self,
        connection: C,
        adopter: LinkId,
        mut holders: Vec<LinkId>,
        events: &mut Vec<Event<C>>,
    ) {
        holders.retain(|holder| self.holders.contains_key(holder));
        if holders.is_empty() {
            events.push(Event::Close(connection));
        } else {
            self.kept.push(Kept { connection, adopter, holders });
        }
    }

    /// Returns true if it matters when the process of this adopter ends.
    pub(super) fn are_kept_for(&self, adopter: LinkId) -> bool {
        self.kept.iter().any(|kept| kept.adopter == adopter)
    }

    #[cfg(test)]
    pub(super) fn keeps(&self, connection: &C) -> bool
    where
        C: PartialEq,
    {
        self.kept.iter().any(|kept| kept.connection == *connection)
    }

    pub(super) fn on_process_end(&mut self, link: LinkId, events: &mut Vec<Event<C>>) {
        self.holders.remove(&link);
        for kept in self.kept.extract_if(.., |kept| kept.adopter == link) {
            events.push(Event::ShutDown(kept.connection));
        }
        for kept in &mut self.kept {
            kept.holders.retain(|holder| *holder != link);
        }
        let needless = self.kept.extract_if(.., |kept| kept.holders.is_empty());
        events.extend(needless.map(|kept| Event::Close(kept.connection)));
    }

    /// Takes out the copies of connections that have ended.
    pub(in crate::handoff::dispatcher) fn take_ended(&mut self, has_ended: impl Fn(&C) -> bool) -> Vec<C> {
        self.kept.extract_if(.., |kept| has_ended(&kept.connection)).map(|kept| kept.connection).collect()
    }
}
