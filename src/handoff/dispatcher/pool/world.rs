//! A simulation for the property test and the model: the shipped pool and the shipped books of
//! several workers, connected by queues in memory.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    Admission, Event, Pending, Pool, ProcessId, ProcessInfo, ProcessState, ReplacementId, TicketId,
    Waiter, peer::Peer, replacement::Phase,
};
use crate::handoff::{
    dispatcher::{Group, RetireCause, WorkerId, WorkerState, WorkerStats, builder::Config},
    protocol::{FromWorker, RejectReason, ToWorker},
};

/// A dispatcher, its workers, and connections, which are numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) pool: Pool<u8>,
    pub(super) peers: Vec<Peer>,
    pub(super) fates: Vec<Fate>,
    /// The workers that have failed with each connection, because they have left without an answer
    /// or could not use it.
    failed_with: Vec<BTreeSet<WorkerId>>,
    /// Connections that the dispatcher has shut down after the end of their adopters.
    shut_down: BTreeSet<u8>,
    pub(super) now: Instant,
    window: u64,
    /// The number of groups, to which workers and connections belong in turn.
    groups: u64,
    /// The tickets of users that wait for a slot, in this group or in any.
    tickets: Vec<(Option<Group>, TicketId)>,
    /// The groups of the slots that are reserved for users.
    permits: Vec<Group>,
    /// Replacements with their old and new workers.
    replacements: Vec<(ReplacementId, Vec<WorkerId>, Vec<WorkerId>)>,
    /// Workers that the dispatcher's application has removed.
    removed: BTreeSet<WorkerId>,
    /// The first violation of the promise that a step has found.
    broken: Option<String>,
}

/// The decision of the dispatcher about a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    /// The dispatcher has not decided yet.
    Accepted,
    /// This process has adopted the connection, as far as the dispatcher has read.
    Adopted(ProcessId),
    /// The dispatcher has given up the connection.
    Failed,
}

/// One step of the simulation. A `usize` is the number of a peer, except in `Replace`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Dispatch,
    /// A user wants a slot for a future connection.
    Reserve,
    /// An accept loop waits until any worker has room.
    WaitForAny,
    /// A user dispatches a connection to its reserved slot.
    DispatchReserved,
    /// A user stops waiting for a slot, or gives up a reserved one.
    GiveUp,
    /// The dispatcher's task takes all messages from the pool.
    Take(usize),
    /// The socket takes one of these messages.
    Send(usize),
    /// The worker reads one message. If there is a reason, it cannot take an offer.
    Get(usize, Option<RejectReason>),
    /// The application of the worker asks for a connection.
    Ask(usize),
    /// A connection that the application has received ends.
    Finish(usize),
    /// The worker sends one message.
    Answer(usize),
    /// The dispatcher's task reads one message, or the end of the stream.
    Read(usize),
    /// The next timer of the link goes off.
    Timeout(usize),
    /// The worker dies.
    Crash(usize),
    /// The worker stops doing anything.
    Hang(usize),
    /// The socket fails.
    Cut(usize),
    /// Another process reads a message from the worker's socket.
    Steal(usize),
    /// The worker's application drains.
    Drain(usize),
    /// The dispatcher's application removes the worker.
    Remove(usize),
    /// The workers of the default group are replaced by this number of new ones.
    Replace(usize),
    /// Nobody waits for the last replacement any longer.
    Abandon,
    /// The worker sends a message that its book has not produced.
    Lie(usize, FromWorker),
    /// The worker is started again.
    Restart(usize),
}

impl World {
    pub(super) fn new(
        config: Config,
        (workers, groups): (usize, u64),
        window: u64,
        now: Instant,
    ) -> Self {
        let pool = Pool::new(config);
        let mut world = Self {
            pool,
            peers: Vec::new(),
            fates: Vec::new(),
            failed_with: Vec::new(),
            shut_down: BTreeSet::new(),
            now,
            window,
            groups,
            tickets: Vec::new(),
            permits: Vec::new(),
            replacements: Vec::new(),
            removed: BTreeSet::new(),
            broken: None,
        };
        for _ in 0..workers {
            world.add_worker();
        }
        world
    }

    fn add_worker(&mut self) {
        let group = self.group(self.peers.len() as u64);
        let id = self.pool.add_worker(group, None);
        self.start(id);
    }

    fn group(&self, number: u64) -> Group {
        match number % self.groups {
            0 => Group::default(),
            number => number.to_string().into(),
        }
    }

    /// Returns the group of a connection.
    fn group_of(&self, serial: u8) -> Group {
        self.group(serial.into())
    }

    pub(super) fn start(&mut self, id: WorkerId) {
        let process = ProcessInfo { id: self.peers.len() as u64, pid: None, is_child: true };
        self.pool.connect(id, process, self.now + Duration::from_secs(60), self.now);
        // The first worker takes no bundles.
        let max_fds = if id == WorkerId(1) { 1 } else { 2 };
        self.peers.push(Peer::new(id, process.id, self.window, max_fds));
    }

    /// Takes a step. Returns false if the step is not possible at the moment.
    pub(super) fn step(&mut self, step: Step) -> bool {
        let did = match step {
            Step::Dispatch => self.dispatch(Admission::None),
            Step::Reserve => {
                let group = self.group_of(self.fates.len() as u8);
                if self.pool.try_reserve(&group) {
                    self.permits.push(group);
                } else {
                    let ticket = self.pool.wait_for_slot(Some(&group), self.now);
                    self.tickets.push((Some(group), ticket));
                }
                true
            }
            Step::WaitForAny => {
                !self.pool.has_slot() && {
                    self.tickets.push((None, self.pool.wait_for_slot(None, self.now)));
                    true
                }
            }
            Step::DispatchReserved => match self.permits.pop() {
                Some(group) => self.dispatch(Admission::Reserved(group)),
                None => false,
            },
            Step::GiveUp => {
                if let Some((group, ticket)) = self.tickets.pop() {
                    self.pool.cancel(group.as_ref(), ticket, self.now);
                    true
                } else if let Some(group) = self.permits.pop() {
                    self.pool.give_up_slot(&group, self.now);
                    true
                } else {
                    false
                }
            }
            Step::Take(peer) => self.take(peer),
            Step::Send(peer) => self.send(peer),
            Step::Get(peer, rejection) => self.receive(peer, rejection),
            Step::Ask(peer) => self.peers[peer].works() && self.peers[peer].ask(),
            Step::Finish(peer) => self.peers[peer].works() && self.peers[peer].finish(self.now),
            Step::Answer(peer) => self.peers[peer].works() && self.peers[peer].answer(self.now),
            Step::Read(peer) => self.read(peer),
            Step::Timeout(peer) => self.timeout(peer),
            Step::Crash(peer) => std::mem::take(&mut self.peers[peer].lives) && self.on_death(peer),
            Step::Hang(peer) => {
                self.peers[peer].works() && !std::mem::replace(&mut self.peers[peer].hangs, true)
            }
            Step::Cut(peer) => {
                !self.peers[peer].is_retired
                    && !std::mem::replace(&mut self.peers[peer].is_cut, true)
            }
            Step::Steal(peer) => {
                let peer = &mut self.peers[peer];
                peer.is_robbed |= peer.works() && peer.to_worker.pop_front().is_some();
                peer.is_robbed
            }
            Step::Drain(peer) => {
                let peer = &mut self.peers[peer];
                peer.works() && !peer.book.is_draining() && {
                    drop(peer.book.drain());
                    true
                }
            }
            Step::Remove(peer) => {
                let id = self.peers[peer].id;
                !self.pool.is_removed(id) && {
                    self.removed.insert(id);
                    self.pool.remove(id, None, self.now)
                }
            }
            Step::Replace(number) => self.replace(number),
            Step::Abandon => match self.replacements.pop() {
                Some((id, ..)) => self.pool.end_replacement(id, self.now).is_some(),
                None => false,
            },
            Step::Lie(peer, message) => {
                let peer = &mut self.peers[peer];
                peer.lies |= peer.can_write();
                peer.can_write() && {
                    peer.from_worker.push_back(message);
                    true
                }
            }
            Step::Restart(peer) => {
                let (id, is_retired) = (self.peers[peer].id, self.peers[peer].is_retired);
                let is_last = self.peers.iter().rposition(|other| other.id == id) == Some(peer);
                is_retired && is_last && !self.pool.is_removed(id) && {
                    self.start(id);
                    true
                }
            }
        };
        self.act_on_events();
        did
    }

    fn replace(&mut self, number: usize) -> bool {
        let group = Group::default();
        let is_old =
            |worker: &WorkerStats| worker.group == group && !self.pool.is_removed(worker.id);
        let old = self.pool.workers().filter(is_old).map(|worker| worker.id).collect();
        let Ok(id) = self.pool.begin_replacement(&group, None) else { return false };
        let mut new = Vec::new();
        for _ in 0..number {
            let worker = self.pool.add_new_worker(id, String::new(), self.now);
            self.start(worker);
            new.push(worker);
        }
        self.pool.complete_replacement(id, self.now);
        self.replacements.push((id, old, new));
        true
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
                Some(Phase::Starting) => old.iter().all(stays) && new.iter().all(has_got_nothing),
                Some(Phase::Switched) => old.iter().all(|id| self.pool.is_removed(*id)),
                Some(Phase::RolledBack) => {
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

    fn dispatch(&mut self, admission: Admission) -> bool {
        let serial = self.fates.len() as u8;
        self.fates.push(Fate::Accepted);
        self.failed_with.push(BTreeSet::new());
        let (group, needs) = (self.group_of(serial), (serial.into(), fds_of(serial)));
        self.pool.dispatch(serial, group, needs, admission, self.now);
        true
    }

    fn take(&mut self, peer: usize) -> bool {
        let groups =
            Vec::from_iter((0..self.fates.len()).map(|serial| self.group_of(serial as u8)));
        let peer = &mut self.peers[peer];
        let own = self.pool.worker(peer.id).map(|worker| worker.group);
        let before = peer.unsent.len();
        while !peer.is_retired
            && let Some(message) = self.pool.next_message(peer.id, self.now)
        {
            let message = message.map(|connection| *connection);
            if let ToWorker::Offer { offer, .. } = message
                && let Some(why) = if own.as_ref() == Some(&groups[usize::from(offer)]) {
                    peer.must_not_get(fds_of(offer))
                } else {
                    Some("is of another group")
                }
            {
                self.broken.get_or_insert(format!(
                    "worker {} {why}, and is offered connection {offer}",
                    peer.id
                ));
            }
            peer.unsent.push_back(message);
        }
        peer.unsent.len() > before
    }

    fn send(&mut self, peer: usize) -> bool {
        let peer = &mut self.peers[peer];
        let Some(message) = peer.unsent.pop_front() else { return false };
        if let ToWorker::Offer { offer, .. } = message {
            peer.sent.push_back(offer);
        }
        peer.to_worker.push_back(message);
        true
    }

    fn receive(&mut self, peer: usize, rejection: Option<RejectReason>) -> bool {
        let peer = &mut self.peers[peer];
        if let (Some(RejectReason::Unusable), Some(ToWorker::Offer { offer, .. })) =
            (rejection, peer.to_worker.front())
        {
            self.failed_with[usize::from(*offer)].insert(peer.id);
        }
        peer.receive(rejection)
    }

    fn read(&mut self, peer: usize) -> bool {
        let Peer { id, is_retired, .. } = self.peers[peer];
        let peer_state = &mut self.peers[peer];
        if is_retired {
            return false;
        }
        let outcome = match peer_state.from_worker.pop_front() {
            Some(message) => {
                let unsent = peer_state.unsent_offers();
                peer_state.on_read(message);
                let outcome = self.pool.on_message(id, message, unsent, self.now);
                if let (Err(RetireCause::Misbehaved(how)), true) =
                    (&outcome, peer_state.is_honest())
                {
                    self.broken.get_or_insert(format!("worker {id} is honest, and {how}"));
                }
                outcome
            }
            None if peer_state.is_cut || !peer_state.lives => Err(RetireCause::Ended),
            None => return false,
        };
        if let Err(cause) = outcome {
            self.retire(peer, &cause);
        }
        true
    }

    fn timeout(&mut self, peer: usize) -> bool {
        let Peer { id, is_retired, .. } = self.peers[peer];
        let Some(due) = self.pool.next_timeout(id).filter(|_| !is_retired) else { return false };
        self.timeout_at(peer, self.now.max(due));
        true
    }

    pub(super) fn timeout_at(&mut self, peer: usize, now: Instant) {
        let id = self.peers[peer].id;
        if let Err(cause) = self.pool.on_timeout(id, true, now) {
            self.retire(peer, &cause);
        }
    }

    /// Retires a peer as the dispatcher's task does: the peer can write nothing more, and
    /// everything that it has written is read.
    fn retire(&mut self, peer: usize, cause: &RetireCause) {
        let peer = &mut self.peers[peer];
        peer.is_retired = true;
        let unsent = peer.unsent_offers();
        for message in std::mem::take(&mut peer.from_worker) {
            peer.on_read(message);
            self.pool.on_last_message(peer.id, message, unsent, self.now);
        }
        if *cause != RetireCause::Drained {
            for serial in &peer.sent {
                self.failed_with[usize::from(*serial)].insert(peer.id);
            }
        }
        peer.unsent.clear();
        let has_received = peer.to_worker.is_empty();
        let state = if peer.lives {
            ProcessState::Lives { has_received }
        } else {
            ProcessState::Ended(None)
        };
        self.pool.retire(peer.id, cause, unsent, state, self.now);
        if self.pool.is_removed(peer.id) {
            self.pool.forget(peer.id, self.now);
        }
    }

    /// Reports the end of a process to the pool, unless `retire` is going to do that.
    fn on_death(&mut self, peer: usize) -> bool {
        let Peer { process, is_retired, .. } = self.peers[peer];
        if is_retired {
            self.pool.on_process_end(process, None);
        }
        true
    }

    pub(super) fn act_on_events(&mut self) {
        for event in self.pool.take_events() {
            match event {
                Event::Adopted { connection, process, holders, .. } => {
                    self.decide(connection, Fate::Adopted(process));
                    if !holders.is_empty() {
                        self.pool.keep(connection, process, holders);
                    }
                }
                Event::Failed { connection, .. } => {
                    self.decide(connection, Fate::Failed);
                    let leaves = |worker: &WorkerStats| {
                        worker.state == WorkerState::Draining || self.pool.is_removed(worker.id)
                    };
                    let failed_with = &self.failed_with[usize::from(connection)];
                    let is_honest =
                        |id| self.peers.iter().all(|peer| peer.id != id || peer.is_honest());
                    let may_take = |worker: &WorkerStats| {
                        worker.group == self.group_of(connection)
                            && !failed_with.contains(&worker.id)
                            && is_honest(worker.id)
                    };
                    let willing =
                        self.pool.workers().find(|worker| !leaves(worker) && may_take(worker));
                    if let Some(WorkerStats { id, .. }) = willing {
                        let broken =
                            format!("connection {connection} is given up, but not by worker {id}");
                        self.broken.get_or_insert(broken);
                    }
                }
                Event::Granted { ticket, group } => {
                    self.tickets.retain(|(_, waiting)| *waiting != ticket);
                    self.permits.extend(group);
                }
                Event::ShutDown(connection) => drop(self.shut_down.insert(connection)),
                Event::Wake(_) | Event::FenceDeferred(_) | Event::Close(_) | Event::Changed => {}
            }
        }
    }

    /// Notes the decision about a connection, of which there must be only one.
    fn decide(&mut self, connection: u8, fate: Fate) {
        let before = std::mem::replace(&mut self.fates[usize::from(connection)], fate);
        if before != Fate::Accepted {
            self.broken.get_or_insert(format!(
                "connection {connection} is decided twice: {before:?}, {fate:?}"
            ));
        }
    }

    /// Checks the promise.
    ///
    /// # Errors
    /// Returns a description of the violation.
    pub(super) fn check(&self) -> Result<(), String> {
        self.broken.clone().map_or(Ok(()), Err)?;
        self.check_replacements()?;
        if let Some(peer) =
            self.peers.iter().find(|peer| peer.is_honest() && peer.complaint.is_some())
        {
            return Err(format!("the dispatcher breaks the protocol: {:?}", peer.complaint));
        }
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
        match (is_held, has_ended, self.pool.stale.keeps(&serial)) {
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

    /// Lets time pass until every connection is decided. One worker more in each group, and all
    /// others that work, do in turn everything that they can do.
    pub(super) fn settle(&mut self) {
        while self.step(Step::GiveUp) {}
        (0..self.groups).for_each(|_| self.add_worker());
        for _ in 0..400 {
            if self.fates.iter().all(|fate| *fate != Fate::Accepted) {
                return;
            }
            self.now += Duration::from_millis(50);
            for peer in 0..self.peers.len() {
                self.step(Step::Take(peer));
                while self.step(Step::Send(peer)) {}
                while self.step(Step::Get(peer, None)) {}
                self.step(Step::Ask(peer));
                self.step(Step::Finish(peer));
                while self.step(Step::Answer(peer)) {}
                while self.step(Step::Read(peer)) {}
                if self.pool.next_timeout(self.peers[peer].id).is_some_and(|due| due <= self.now) {
                    self.step(Step::Timeout(peer));
                }
            }
        }
    }
}

/// Some connections are bundles.
fn fds_of(serial: u8) -> usize {
    if serial % 3 == 1 { 2 } else { 1 }
}

impl Step {
    /// Returns the number of the peer that takes the step, or `None` if it concerns no single peer.
    pub(super) fn peer(self) -> Option<usize> {
        match self {
            Self::Dispatch
            | Self::Reserve
            | Self::WaitForAny
            | Self::DispatchReserved
            | Self::GiveUp
            | Self::Replace(_)
            | Self::Abandon => None,
            Self::Take(peer)
            | Self::Send(peer)
            | Self::Get(peer, _)
            | Self::Ask(peer)
            | Self::Finish(peer)
            | Self::Answer(peer)
            | Self::Read(peer)
            | Self::Timeout(peer)
            | Self::Crash(peer)
            | Self::Hang(peer)
            | Self::Cut(peer)
            | Self::Steal(peer)
            | Self::Drain(peer)
            | Self::Remove(peer)
            | Self::Lie(peer, _)
            | Self::Restart(peer) => Some(peer),
        }
    }
}
