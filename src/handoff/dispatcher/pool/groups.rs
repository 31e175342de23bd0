//! The groups of workers: the queue of each group, and its reserved slots.

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

/// All groups that have workers, waiters, or reserved slots. Waiters of one group never hold up
/// those of another, because each group has its own queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Groups<C> {
    groups: BTreeMap<Group, GroupState<C>>,
    /// The next position at the back of any queue. Only connections at the front may get a position
    /// again, because a caller may keep its ticket after the position is free.
    back: i64,
    /// Accept loops that wait until any worker has room, with the time since which they wait. The
    /// groups of their connections are not known yet.
    anywhere: BTreeMap<TicketId, Instant>,
}

/// The state of one group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct GroupState<C> {
    pub(super) queue: Queue<C>,
    /// The number of reserved slots, which is the number of permits in use.
    pub(super) reserved: u64,
    /// The number of workers in the group, including those that wait to be started again.
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

    /// Returns a group. Adds it first if it does not exist.
    pub(super) fn get_mut(&mut self, group: &Group) -> &mut GroupState<C> {
        self.groups.entry(group.clone()).or_default()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Group, &GroupState<C>)> {
        self.groups.iter()
    }

    /// Returns true if nothing waits, and no group is to be removed.
    pub(super) fn are_idle(&self) -> bool {
        let is_idle = |group: &GroupState<C>| group.queue.is_empty() && group.is_used();
        self.anywhere.is_empty() && self.groups.values().all(is_idle)
    }

    /// Removes the groups that have no workers, no waiters, and no reserved slots. Without this,
    /// clients could use up memory with made-up names.
    pub(super) fn remove_unused(&mut self) {
        self.groups.retain(|_, group| group.is_used());
    }

    /// Returns the first group behind `after` that has both waiters and workers. If `is_any` is
    /// true, the group needs no workers of its own, because the successor serves all groups.
    pub(super) fn next_to_serve(&self, after: Option<&Group>, is_any: bool) -> Option<Group> {
        self.groups
            .range((after.map_or(Unbounded, Excluded), Unbounded))
            .find(|(_, group)| (is_any || group.workers > 0) && !group.queue.is_empty())
            .map(|(group, _)| group.clone())
    }

    // The queues.

    /// Returns a position behind all others in any queue.
    fn next_position(&mut self) -> i64 {
        self.back += 1;
        self.back - 1
    }

    /// Adds a connection at the back of the queue of its group.
    pub(super) fn push_back(&mut self, pending: Pending<C>) {
        let position = self.next_position();
        let group = self.groups.entry(pending.group.clone()).or_default();
        group.queue.put(position, Waiter::Connection(pending));
    }

    /// Adds a connection at the front of the queue of its group.
    pub(super) fn push_front(&mut self, pending: Pending<C>) {
        self.groups.entry(pending.group.clone()).or_default().queue.push_front(pending);
    }

    /// Adds a caller that waits for a slot in this group.
    pub(super) fn add_ticket(&mut self, group: &Group, now: Instant) -> TicketId {
        let position = self.next_position();
        self.get_mut(group).queue.put(position, Waiter::Ticket(now));
        TicketId(position)
    }

    /// Adds a caller that waits until a worker of any group has room.
    pub(super) fn add_ticket_for_any(&mut self, now: Instant) -> TicketId {
        let ticket = TicketId(self.next_position());
        self.anywhere.insert(ticket, now);
        ticket
    }

    /// Removes a caller that waits. Returns true if the caller was waiting in the queue of a group,
    /// so that those behind it may go on.
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

    /// Returns true if a caller waits until a worker of any group has room.
    pub(super) fn waits_for_any(&self) -> bool {
        !self.anywhere.is_empty()
    }

    pub(super) fn take_tickets_for_any(&mut self) -> impl Iterator<Item = TicketId> + use<C> {
        std::mem::take(&mut self.anywhere).into_keys()
    }

    /// Removes all callers that wait.
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

    /// Returns the time since which the first caller has been waiting for a slot.
    pub(super) fn first_ticket(&self) -> Option<Instant> {
        let in_groups = self.groups.values().filter_map(|group| group.queue.first_ticket());
        in_groups.chain(self.anywhere.values().copied()).min()
    }

    /// Returns true if one more caller that holds a descriptor may wait for a slot in this group.
    /// All groups together may hold `most` descriptors.
    ///
    /// If other groups have workers, a group gets at most half of what the others leave, but always
    /// at least one. So a group whose workers are stuck or gone leaves something to the others. All
    /// groups without workers count as one group, because clients may make up names. For example,
    /// with a limit of 64, a stuck group gets 32, the next one 16, and so on.
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
    use super::{super::Needs, *};

    #[test]
    fn each_waiter_has_its_own_position() {
        let (now, group) = (Instant::now(), Group::default());
        let mut groups = Groups::default();
        let needs = || Needs { group: group.clone(), key: 0, fds: 1 };
        let pending = |name| Pending::new(name, needs(), now);
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
    fn stuck_groups_leave_descriptors_to_waiters_of_other_groups() {
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
