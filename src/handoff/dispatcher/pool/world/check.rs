//! The checks of the simulation: of each decision, and of the whole after each step.

use super::{Fate, World};
use crate::handoff::dispatcher::{
    WorkerId, WorkerState, WorkerStats,
    pool::{Pending, Waiter, peer::Peer, replacement::ReplacementPhase},
};

impl World {
    /// Notes the decision about a connection, of which there must be only one.
    pub(super) fn decide(&mut self, connection: u8, fate: Fate) {
        let before = std::mem::replace(&mut self.fates[usize::from(connection)], fate);
        if before != Fate::Accepted {
            self.broken.get_or_insert(format!(
                "connection {connection} is decided twice: {before:?}, {fate:?}"
            ));
        }
    }

    /// Returns a complaint if a connection was given up while a worker may take it.
    pub(super) fn complaint_about(&self, connection: u8) -> Option<String> {
        let leaves = |worker: &WorkerStats| {
            worker.state == WorkerState::Draining || self.pool.is_removed(worker.id)
        };
        let failed_with = &self.failed_with[usize::from(connection)];
        let is_honest = |id| self.peers.iter().all(|peer| peer.id != id || peer.is_honest());
        let may_take = |worker: &WorkerStats| {
            worker.group == self.group_of(connection)
                && !failed_with.contains(&worker.id)
                && is_honest(worker.id)
        };
        let willing = self.pool.workers().find(|worker| !leaves(worker) && may_take(worker))?;
        Some(format!("connection {connection} is given up, but not by worker {}", willing.id))
    }

    /// Checks the promise.
    ///
    /// # Errors
    /// Returns a description of the violation.
    pub(in crate::handoff::dispatcher::pool) fn check(&self) -> Result<(), String> {
        self.broken.clone().map_or(Ok(()), Err)?;
        self.check_replacements()?;
        if let Some(peer) =
            self.peers.iter().find(|peer| peer.is_honest() && peer.complaint.is_some())
        {
            return Err(format!("the dispatcher breaks the protocol: {:?}", peer.complaint));
        }

        // Each connection has one owner, and is given to one process at most.
        for (serial, fate) in (0u8..).zip(&self.fates) {
            let honest = self.peers.iter().filter(|peer| !peer.lies);
            let given = Vec::from_iter(
                honest.filter(|peer| peer.given.contains(&serial)).map(|peer| peer.process),
            );
            if given.len() > 1 {
                return Err(format!("connection {serial} is given to {given:?}"));
            }
            if let (Fate::Adopted(by), [to]) = (fate, &given[..])
                && by != to
            {
                return Err(format!(
                    "connection {serial} was given to {to}, and is counted for {by}"
                ));
            }
            self.check_copies(serial, *fate)?;
            let owners = self.owners(serial);
            if owners != usize::from(*fate == Fate::Accepted) {
                return Err(format!("connection {serial} has {owners} owners, and is {fate:?}"));
            }
        }

        // Nothing waits that a worker has room for.
        let max_offers = self.pool.config.max_offers;
        let could_go = |waiter: &&Waiter<u8>| match waiter {
            // At its last attempt a connection waits for a worker that has not failed with it.
            Waiter::Connection(pending) if pending.is_at_last_attempt(max_offers) => false,
            Waiter::Connection(pending) if pending.fds > 1 => self.has_room_for(pending),
            _ => true,
        };
        for (group, state) in self.pool.groups.iter() {
            if let Some(waiter) = state.queue.waiters().find(could_go)
                && self.pool.free_slots(group) > 0
            {
                return Err(format!("{waiter:?} waits for {group:?}, and a worker has room"));
            }
        }
        if self.pool.groups.waits_for_any() && self.pool.has_slot() {
            return Err("an accept loop waits, and a worker has room".into());
        }
        Ok(())
    }

    /// Checks the replacements. New workers get nothing and the old ones stay until all new workers
    /// are ready. Then the old ones leave. If a new worker is gone before that, the new ones leave
    /// without having received a connection.
    fn check_replacements(&self) -> Result<(), String> {
        for (id, old, new) in &self.replacements {
            let stays = |id: &WorkerId| !self.pool.is_removed(*id) || self.removed.contains(id);
            let has_got_nothing = |id: &WorkerId| {
                let mut processes = self.peers.iter().filter(|peer| peer.id == *id);
                processes.all(|peer| peer.given.is_empty() && peer.sent.is_empty())
            };
            let phase = self.pool.phase_of(*id);
            let is_kept = match phase {
                Some(ReplacementPhase::Starting) => {
                    old.iter().all(stays) && new.iter().all(has_got_nothing)
                }
                Some(ReplacementPhase::Switched) => old.iter().all(|id| self.pool.is_removed(*id)),
                Some(ReplacementPhase::RolledBack) => {
                    new.iter().all(|id| self.pool.is_removed(*id) && has_got_nothing(id))
                }
                None => true,
            };
            if !is_kept {
                return Err(format!("replacement of {old:?} by {new:?}: {phase:?}"));
            }
        }
        Ok(())
    }

    /// Checks that the client of an adopted connection gets the end of the connection when the
    /// adopter ends, even if another process has a copy.
    fn check_copies(&self, serial: u8, fate: Fate) -> Result<(), String> {
        let Fate::Adopted(by) = fate else { return Ok(()) };
        let Some(adopter) = self.peers.iter().find(|peer| peer.process == by) else {
            return Ok(());
        };
        if self.peers.iter().any(|peer| !peer.is_honest()) {
            return Ok(()); // it is not defined which answers count
        }
        let has_copy = |peer: &Peer| {
            peer.is_retired && peer.lives && peer.sent.contains(&serial) && peer.process != by
        };
        let is_held = self.peers.iter().any(has_copy);
        let has_ended = adopter.is_retired && !adopter.lives;
        match (is_held, has_ended, self.pool.kept.keeps(&serial)) {
            (true, true, _) if !self.shut_down.contains(&serial) => {
                Err(format!("worker {by} has ended, and its connection {serial} was not shut down"))
            }
            (true, false, false) => {
                Err(format!("no copy of connection {serial} is kept, and another worker has one"))
            }
            (false, _, true) => Err(format!("a copy of connection {serial} is kept for nothing")),
            _ => Ok(()),
        }
    }

    /// Returns true if a worker has room for a bundle of this size. Returns false if descriptors in
    /// flight are limited, because that limit may stand in the way.
    fn has_room_for(&self, pending: &Pending<u8>) -> bool {
        let is_limited = self.pool.config.max_in_flight < usize::MAX;
        !is_limited
            && self.pool.accounts().any(|(_, worker, account)| {
                worker.group == pending.group && account.takes(pending.fds) && account.room() > 0
            })
    }

    /// The number of times that a connection is in a queue or an account of the pool.
    fn owners(&self, serial: u8) -> usize {
        let pending = self.pool.groups.iter().flat_map(|(_, group)| group.queue.iter());
        let waiting = pending.filter(|pending| pending.connection == serial).count();
        let in_accounts =
            self.pool.accounts().map(|(_, _, account)| account.count_of(&serial)).sum::<usize>();
        waiting + in_accounts
    }
}
