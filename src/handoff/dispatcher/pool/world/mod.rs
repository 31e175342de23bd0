//! A simulation for the property test and the model: the shipped pool and the shipped books of
//! several workers, connected by queues in memory.

mod check;
mod step;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    Admission, Event, Needs, Pool, ProcessId, ProcessInfo, ProcessState, ReplacementId, TicketId,
    peer::Peer,
};
use crate::handoff::{
    dispatcher::{Group, RetireCause, WorkerId, WorkerStats, builder::Config},
    protocol::{RejectReason, ToWorker},
};
pub(super) use step::Step;

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
    /// The tickets of callers that wait for a slot, in this group or in any.
    tickets: Vec<(Option<Group>, TicketId)>,
    /// The groups of the slots that are reserved for callers.
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
    GivenUp,
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

    fn dispatch(&mut self, admission: Admission) -> bool {
        let serial = self.fates.len() as u8;
        self.fates.push(Fate::Accepted);
        self.failed_with.push(BTreeSet::new());
        let needs = Needs { group: self.group_of(serial), key: serial.into(), fds: fds_of(serial) };
        self.pool.dispatch(serial, needs, admission, self.now);
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
                Event::GivenUp { connection, .. } => {
                    self.decide(connection, Fate::GivenUp);
                    self.broken = self.broken.take().or(self.complaint_about(connection));
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
