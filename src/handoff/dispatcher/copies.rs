//! Copies of connections that the dispatcher has no more control of: in processes that were cut off and have not ended.

use std::{collections::BTreeSet, os::fd::OwnedFd};

use super::job::{LinkId, close, has_ended, shut_down};

/// A retired worker's process may hold, until it ends, copies of what it was offered. They do no harm to a connection that another
/// worker serves. But should that one die, the client would not see the end: so the dispatcher keeps its own copy, by which it can
/// end the connection.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// Retired workers whose processes may live.
    holders: BTreeSet<LinkId>,
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    socket: OwnedFd,
    adopter: LinkId,
    holders: Vec<LinkId>,
}

impl Copies {
    /// This worker was retired, and its process may live.
    pub(super) fn add_holder(&mut self, link: LinkId) {
        self.holders.insert(link);
    }

    /// A worker has adopted a connection that these may hold.
    pub(super) fn keep(&mut self, socket: OwnedFd, adopter: LinkId, mut holders: Vec<LinkId>) {
        holders.retain(|holder| self.holders.contains(holder));
        match holders.is_empty() {
            true => close(socket),
            false => self.kept.push(Kept { socket, adopter, holders }),
        }
    }

    /// Whether it matters when the process of this adopter ends.
    pub(super) fn are_kept_for(&self, adopter: LinkId) -> bool {
        self.kept.iter().any(|kept| kept.adopter == adopter)
    }

    /// The process at the other end of a link has ended, and its copies with it.
    pub(super) fn process_ended(&mut self, link: LinkId) {
        for kept in self.kept.extract_if(.., |kept| kept.adopter == link) {
            shut_down(kept.socket);
        }
        self.kept.iter_mut().for_each(|kept| kept.holders.retain(|holder| *holder != link));
        self.release(|kept| kept.holders.is_empty());
        self.holders.remove(&link);
    }

    /// Closes copies of connections that have ended in the meantime.
    pub(super) fn sweep(&mut self) {
        self.release(|kept| has_ended(&kept.socket));
    }

    fn release(&mut self, needless: impl Fn(&Kept) -> bool) {
        self.kept.extract_if(.., |kept| needless(kept)).for_each(|kept| close(kept.socket));
    }
}
