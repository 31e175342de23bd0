//! The shipped pool against the shipped books of several workers, over queues in memory: for the property test and the model.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{Event, Pool, ProcessId, ProcessInfo, ProcessState, TicketId, Waiter, peer::Peer};
use crate::handoff::{
    dispatcher::{RetireCause, WorkerId, WorkerState, WorkerStats, builder::Config},
    protocol::{FromWorker, RejectReason, ToWorker},
};

/// A dispatcher, its workers, and connections, which are numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) pool: Pool<u8>,
    pub(super) peers: Vec<Peer>,
    pub(super) fates: Vec<Fate>,
    /// The workers that each connection was sent to.
    pub(super) sent_to: Vec<BTreeSet<WorkerId>>,
    pub(super) now: Instant,
    window: u64,
    /// Places that a user of the dispatcher waits for, and places that are kept for one.
    tickets: Vec<TicketId>,
    permits: usize,
    /// How the promise was broken, if an event has done so.
    broken: Option<String>,
}

/// Where a connection has got to, as its client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    Accepted,
    /// The dispatcher has closed its copy.
    Adopted(ProcessId),
    /// The dispatcher has given it up.
    Failed,
}

/// What can happen. Numbers choose peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Dispatch,
    /// A user wants a place for a connection to come.
    Reserve,
    /// The connection has come.
    DispatchReserved,
    /// A user waits no longer for a place, or has no use for it.
    GiveUp,
    /// The dispatcher's task takes all messages from the pool.
    Take(usize),
    /// The socket takes one of them.
    Send(usize),
    /// The worker reads one message. It has room for an offer, or not.
    Get(usize, Option<RejectReason>),
    /// Its application asks for a connection.
    Ask(usize),
    /// One that it has got ends.
    Finish(usize),
    /// The worker sends one message.
    Answer(usize),
    /// The dispatcher's task reads one message, or the end.
    Read(usize),
    /// The next timer of the link goes off.
    Timeout(usize),
    /// The worker dies.
    Crash(usize),
    /// The worker does nothing more.
    Hang(usize),
    /// The socket fails.
    Cut(usize),
    /// A message is read by someone else from the worker's socket.
    Steal(usize),
    /// The worker's application drains.
    Drain(usize),
    /// A message that the worker's book knows nothing of.
    Lie(usize, FromWorker),
    /// The worker is started again.
    Restart(usize),
}

impl World {
    pub(super) fn new(config: Config, workers: usize, window: u64, now: Instant) -> Self {
        let pool = Pool::new(config);
        let mut world = Self {
            pool,
            peers: Vec::new(),
            fates: Vec::new(),
            sent_to: Vec::new(),
            now,
            window,
            tickets: Vec::new(),
            permits: 0,
            broken: None,
        };
        for _ in 0..workers {
            let id = world.pool.add_worker(None);
            world.start(id);
        }
        world
    }

    pub(super) fn start(&mut self, id: WorkerId) {
        let process = ProcessInfo { id: self.peers.len() as u64, pid: None, is_child: true };
        self.pool.connect(id, process, self.now + Duration::from_secs(60), self.now);
        self.peers.push(Peer::new(id, process.id, self.window));
    }

    /// Takes a step. Returns false if it is none at the moment.
    pub(super) fn step(&mut self, step: Step) -> bool {
        let did = match step {
            Step::Dispatch => self.dispatch(false),
            Step::Reserve => {
                if self.pool.try_reserve() {
                    self.permits += 1;
                } else {
                    self.tickets.push(self.pool.wait_for_place(self.now));
                }
                true
            }
            Step::DispatchReserved => {
                self.permits > 0 && {
                    self.permits -= 1;
                    self.dispatch(true)
                }
            }
            Step::GiveUp => match (self.tickets.pop(), self.permits) {
                (None, 0) => false,
                (Some(ticket), _) => {
                    self.pool.cancel(ticket, self.now);
                    true
                }
                (None, _) => {
                    self.permits -= 1;
                    self.pool.give_up_place(self.now);
                    true
                }
            },
            Step::Take(peer) => self.take(peer),
            Step::Send(peer) => self.send(peer),
            Step::Get(peer, unfit) => self.peers[peer].get(unfit),
            Step::Ask(peer) => self.peers[peer].works() && self.peers[peer].ask(),
            Step::Finish(peer) => self.peers[peer].works() && self.peers[peer].finish(self.now),
            Step::Answer(peer) => self.peers[peer].works() && self.peers[peer].answer(self.now),
            Step::Read(peer) => self.read(peer),
            Step::Timeout(peer) => self.timeout(peer),
            Step::Crash(peer) => std::mem::take(&mut self.peers[peer].lives) && self.died(peer),
            Step::Hang(peer) => self.peers[peer].works() && !std::mem::replace(&mut self.peers[peer].hangs, true),
            Step::Cut(peer) => !self.peers[peer].is_retired && !std::mem::replace(&mut self.peers[peer].is_cut, true),
            Step::Steal(peer) => self.peers[peer].works() && self.peers[peer].to_worker.pop_front().is_some(),
            Step::Drain(peer) => {
                let peer = &mut self.peers[peer];
                peer.works() && !peer.book.is_draining() && {
                    drop(peer.book.drain());
                    true
                }
            }
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

    fn dispatch(&mut self, reserved: bool) -> bool {
        let serial = self.fates.len() as u8;
        self.fates.push(Fate::Accepted);
        self.sent_to.push(BTreeSet::new());
        self.pool.dispatch(serial, serial.into(), 1, reserved, self.now);
        true
    }

    fn take(&mut self, peer: usize) -> bool {
        let peer = &mut self.peers[peer];
        let before = peer.unsent.len();
        while !peer.is_retired
            && let Some(message) = self.pool.next_message(peer.id, self.now)
        {
            peer.unsent.push_back(message.map(|connection| *connection));
        }
        peer.unsent.len() > before
    }

    fn send(&mut self, peer: usize) -> bool {
        let peer = &mut self.peers[peer];
        let Some(message) = peer.unsent.pop_front() else { return false };
        if let ToWorker::Offer { offer, .. } = message {
            self.sent_to[usize::from(offer)].insert(peer.id);
        }
        peer.to_worker.push_back(message);
        true
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
                self.pool.on_message(id, message, unsent, self.now)
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

    /// As the task does: after the cut nothing can be written, and everything that was written is read.
    fn retire(&mut self, peer: usize, cause: &RetireCause) {
        let peer = &mut self.peers[peer];
        peer.is_retired = true;
        let unsent = peer.unsent_offers();
        for message in peer.from_worker.drain(..) {
            self.pool.on_last_message(peer.id, message, unsent, self.now);
        }
        peer.unsent.clear();
        let has_received = peer.to_worker.is_empty();
        let state = if peer.lives { ProcessState::Lives { has_received } } else { ProcessState::Ended(None) };
        self.pool.retire(peer.id, cause, unsent, state, self.now);
    }

    fn died(&mut self, peer: usize) -> bool {
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
                    let leaves =
                        |worker: &WorkerStats| worker.state == WorkerState::Draining || self.pool.is_removed(worker.id);
                    let sent_to = &self.sent_to[usize::from(connection)];
                    let unasked = self.pool.workers().find(|worker| !leaves(worker) && !sent_to.contains(&worker.id));
                    if let Some(WorkerStats { id, .. }) = unasked {
                        let broken = format!("connection {connection} is given up, and worker {id} has not had it");
                        self.broken.get_or_insert(broken);
                    }
                }
                Event::Granted(ticket) => {
                    self.tickets.retain(|waiting| *waiting != ticket);
                    self.permits += 1;
                }
                Event::Wake(_) | Event::FenceDeferred(_) | Event::Close(_) | Event::ShutDown(_) => {}
            }
        }
    }

    fn decide(&mut self, connection: u8, fate: Fate) {
        let before = std::mem::replace(&mut self.fates[usize::from(connection)], fate);
        if before != Fate::Accepted {
            self.broken.get_or_insert(format!("connection {connection} is decided twice: {before:?}, {fate:?}"));
        }
    }

    /// # Errors
    /// The part of the promise that is broken.
    pub(super) fn check(&self) -> Result<(), String> {
        self.broken.clone().map_or(Ok(()), Err)?;
        for (serial, fate) in (0u8..).zip(&self.fates) {
            let honest = self.peers.iter().filter(|peer| !peer.lies);
            let given = Vec::from_iter(honest.filter(|peer| peer.given.contains(&serial)).map(|peer| peer.process));
            if given.len() > 1 {
                return Err(format!("connection {serial} is given to {given:?}"));
            }
            if let (Fate::Adopted(by), [to]) = (fate, &given[..])
                && by != to
            {
                return Err(format!("connection {serial} was given to {to}, and is counted for {by}"));
            }
            let owners = self.owners(serial);
            if owners != usize::from(*fate == Fate::Accepted) {
                return Err(format!("connection {serial} has {owners} owners, and is {fate:?}"));
            }
        }
        // At its last attempt a connection waits for a worker that has not failed with it.
        let is_choosy = |waiter: &&Waiter<u8>| matches!(waiter, Waiter::Connection(pending) if pending.is_at_last_attempt(self.pool.config.max_offers));
        match self.pool.queue.waiters().find(|waiter| !is_choosy(waiter)) {
            Some(waiter) if self.pool.free() > 0 => Err(format!("{waiter:?} waits, and a worker has room")),
            _ => Ok(()),
        }
    }

    /// The number of places of the pool that have a connection which is not decided.
    fn owners(&self, serial: u8) -> usize {
        let waiting = self.pool.queue.iter().filter(|pending| pending.connection == serial).count();
        let in_accounts = self.pool.accounts().map(|(_, _, account)| account.count_of(&serial)).sum::<usize>();
        waiting + in_accounts
    }

    /// All that is left to do is done, in turns, by workers that do what they should. Time passes.
    pub(super) fn settle(&mut self) {
        while self.step(Step::GiveUp) {}
        let honest = self.pool.add_worker(None);
        self.start(honest);
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

impl Step {
    /// The number of the peer that it is about.
    pub(super) fn peer(self) -> Option<usize> {
        match self {
            Self::Dispatch | Self::Reserve | Self::DispatchReserved | Self::GiveUp => None,
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
            | Self::Lie(peer, _)
            | Self::Restart(peer) => Some(peer),
        }
    }
}
