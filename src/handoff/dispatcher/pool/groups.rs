//! The groups of workers: what waits in each of them, and the places that are kept.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
    time::Instant,
};

use super::{
    Pending,
    queue::{Queue, TicketId, Waiter},
};
use crate::handoff::dispatcher::Group;

/// All groups that have workers, or for which something waits. What waits for one group holds up
/// nothing that waits for another, because each has a queue of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Groups<C> {
    groups: BTreeMap<Group, GroupState<C>>,
    /// The next place at the back of any queue. None is used twice, because tickets outlive their
    /// places.
    back: i64,
    /// Accept loops that wait until some worker has room, since then. The groups of their
    /// connections are not known yet.
    anywhere: BTreeMap<TicketId, Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct GroupState<C> {
    pub(super) queue: Queue<C>,
    /// Permits given out.
    pub(super) reserved: u64,
    /// The number of its workers, which may wait to be started again.
    pub(super) workers: usize,
}

impl<C> GroupState<C> {
    fn is_used(&self) -> bool {
        self.workers > 0 || self.reserved > 0 || !self.queue.is_empty()
    }
}

impl<C> Default for GroupState<C> {
    fn default() -> Self {
        Self { queue: Queue::default(), reserved: 0, workers: 0 }
    }
}

impl<C> Default for Groups<C> {
    fn default() -> Self {
        Self { groups: BTreeMap::new(), back: 0, anywhere: BTreeMap::new() }
    }
}

impl<C> Groups<C> {
    pub(super) fn get(&self, group: &Group) -> Option<&GroupState<C>> {
        self.groups.get(group)
    }

    /// A group comes into being when it is first spoken of.
    pub(super) fn get_mut(&mut self, group: &Group) -> &mut GroupState<C> {
        self.groups.entry(group.clone()).or_default()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Group, &GroupState<C>)> {
        self.groups.iter()
    }

    /// Returns true if nothing waits, and no group is to be forgotten.
    pub(super) fn are_settled(&self) -> bool {
        let is_settled = |group: &GroupState<C>| group.queue.is_empty() && group.is_used();
        self.anywhere.is_empty() && self.groups.values().all(is_settled)
    }

    /// Forgets the groups that have nothing: clients may have made up their names.
    pub(super) fn remove_unused(&mut self) {
        self.groups.retain(|_, group| group.is_used());
    }

    /// The first group behind this one that has workers, or to which any may belong, and something
    /// that waits for them.
    pub(super) fn next_to_serve(&self, after: Option<&Group>, is_any: bool) -> Option<Group> {
        self.groups
            .range((after.map_or(Unbounded, Excluded), Unbounded))
            .find(|(_, group)| (is_any || group.workers > 0) && !group.queue.is_empty())
            .map(|(group, _)| group.clone())
    }

    // The queues.

    fn next_place(&mut self) -> i64 {
        self.back += 1;
        self.back - 1
    }

    pub(super) fn push_back(&mut self, pending: Pending<C>) {
        let place = self.next_place();
        let group = self.groups.entry(pending.group.clone()).or_default();
        group.queue.put(place, Waiter::Connection(pending));
    }

    pub(super) fn push_front(&mut self, pending: Pending<C>) {
        self.groups.entry(pending.group.clone()).or_default().queue.push_front(pending);
    }

    /// Waits for a place in this group.
    pub(super) fn add_ticket(&mut self, group: &Group, now: Instant) -> TicketId {
        let place = self.next_place();
        self.get_mut(group).queue.put(place, Waiter::Ticket(now));
        TicketId(place)
    }

    /// Waits until a worker of any group has room.
    pub(super) fn add_ticket_for_any(&mut self, now: Instant) -> TicketId {
        let ticket = TicketId(self.next_place());
        self.anywhere.insert(ticket, now);
        ticket
    }

    /// Returns true if it was waiting for a place in a group.
    pub(super) fn remove_ticket(&mut self, group: Option<&Group>, ticket: TicketId) -> bool {
        match group {
            Some(group) => {
                self.groups.get_mut(group).is_some_and(|group| group.queue.remove_ticket(ticket))
            }
            None => {
                self.anywhere.remove(&ticket);
                false
            }
        }
    }

    pub(super) fn waits_for_any(&self) -> bool {
        !self.anywhere.is_empty()
    }

    pub(super) fn take_tickets_for_any(&mut self) -> impl Iterator<Item = TicketId> + use<C> {
        std::mem::take(&mut self.anywhere).into_keys()
    }

    pub(super) fn remove_tickets(&mut self) {
        self.groups.values_mut().for_each(|group| group.queue.remove_tickets());
        self.anywhere.clear();
    }

    pub(super) fn take_connections(&mut self) -> Vec<C> {
        self.groups.values_mut().flat_map(|group| group.queue.take_connections()).collect()
    }

    pub(super) fn connections(&self) -> usize {
        self.groups.values().map(|group| group.queue.connections()).sum()
    }

    /// Since when the first user has been waiting for a place.
    pub(super) fn first_ticket(&self) -> Option<Instant> {
        let in_groups = self.groups.values().filter_map(|group| group.queue.first_ticket());
        in_groups.chain(self.anywhere.values().copied()).min()
    }

    /// Returns true if one more user may wait for a place in this group while it holds a
    /// descriptor, of which all groups together may hold this many.
    ///
    /// If other groups have workers, a group gets half of what the others leave at most, so that
    /// groups whose workers are stuck or gone leave a place to the others. The groups without
    /// workers count as one, because clients may make up names.
    pub(super) fn may_wait(&self, group: &Group, most: usize) -> bool {
        let has_workers = |name: &Group| self.get(name).is_some_and(|group| group.workers > 0);
        let is_same = |other: &Group| other == group || !has_workers(group) && !has_workers(other);
        if !self.groups.keys().any(|other| !is_same(other) && has_workers(other)) {
            return true;
        }
        let (mut own, mut others) = (0, 0);
        for (name, state) in &self.groups {
            *if is_same(name) { &mut own } else { &mut others } += state.queue.tickets();
        }
        own < (most.saturating_sub(others) / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_waiter_has_a_place_of_its_own() {
        let (now, group) = (Instant::now(), Group::default());
        let mut groups = Groups::default();
        let pending = |name| Pending::new(name, group.clone(), 0, 1, now);
        groups.push_front(pending('b'));
        let ticket = groups.add_ticket(&group, now);
        groups.push_front(pending('a'));
        groups.push_back(pending('c'));
        assert_eq!(groups.get(&group).unwrap().queue.len(), 4);
        assert!(groups.remove_ticket(Some(&group), ticket));
        assert_eq!(groups.take_connections(), ['a', 'b', 'c']);
        groups.remove_unused();
        assert_eq!(groups.iter().count(), 0);
        let next = groups.add_ticket(&group, now);
        assert!(!groups.remove_ticket(Some(&group), ticket));
        assert!(groups.remove_ticket(Some(&group), next));
    }

    #[test]
    fn groups_that_are_stuck_leave_places_for_what_waits_for_others() {
        const MOST: usize = 64;
        let now = Instant::now();
        let mut groups = Groups::<u8>::default();
        let wait = |groups: &mut Groups<u8>, name: &str| {
            let group = Group::from(name);
            (0..)
                .take_while(|_| {
                    groups.may_wait(&group, MOST) && {
                        groups.add_ticket(&group, now);
                        true
                    }
                })
                .take(2 * MOST)
                .count()
        };
        groups.get_mut(&"a".into()).workers = 1;
        assert_eq!(wait(&mut groups, "a"), 2 * MOST, "alone, the accept loop's limit is enough");

        let mut groups = Groups::<u8>::default();
        for name in ["a", "b", "c"] {
            groups.get_mut(&name.into()).workers = 1;
        }
        assert_eq!(wait(&mut groups, "a"), 32);
        // Groups without workers, however many there are.
        assert_eq!((0..100).map(|name| wait(&mut groups, &name.to_string())).sum::<usize>(), 16);
        assert_eq!(wait(&mut groups, "b"), 8);
        assert_eq!(wait(&mut groups, "c"), 4);
        assert_eq!(wait(&mut groups, "a"), 0);
    }
}
