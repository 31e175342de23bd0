//! One process of a worker: the shipped book, and a socket in memory.

use std::{collections::VecDeque, time::Instant};

use super::ProcessId;
use crate::handoff::{
    dispatcher::WorkerId,
    incoming::book::Book,
    protocol::{FromWorker, RejectReason, ToWorker},
};

/// One process of a worker, and its socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    pub(super) id: WorkerId,
    pub(super) process: ProcessId,
    max_fds: u8,
    pub(super) book: Book<u8>,
    /// Messages taken from the pool and not sent.
    pub(super) unsent: VecDeque<ToWorker<u8, ()>>,
    pub(super) to_worker: VecDeque<ToWorker<u8, ()>>,
    pub(super) from_worker: VecDeque<FromWorker>,
    /// Offers that were sent and whose answer was not read. After the worker is retired, its
    /// process may hold copies of these.
    pub(super) sent: VecDeque<u8>,
    /// The connections that its application has received.
    pub(super) given: Vec<u8>,
    finished: usize,
    pub(super) lives: bool,
    pub(super) hangs: bool,
    /// The dispatcher has read a DRAINING of this worker.
    pub(super) is_draining: bool,
    /// The dispatcher has read a refusal of this worker, and no DEMAND after it.
    pub(super) has_refused: bool,
    /// The worker sends false messages, so the promise does not hold for what it gets.
    pub(super) lies: bool,
    /// Another process has read from the worker's socket.
    pub(super) is_robbed: bool,
    /// The error with which the worker reports that the dispatcher breaks the protocol.
    pub(super) complaint: Option<String>,
    /// The socket has failed, and each side gets the end of the stream.
    pub(super) is_cut: bool,
    pub(super) is_retired: bool,
}

impl Peer {
    pub(super) fn new(id: WorkerId, process: ProcessId, window: u64, max_fds: u8) -> Self {
        Self {
            id,
            process,
            max_fds,
            book: Book::new(window, u64::MAX, max_fds),
            unsent: VecDeque::new(),
            to_worker: VecDeque::new(),
            from_worker: VecDeque::new(),
            sent: VecDeque::new(),
            given: Vec::new(),
            finished: 0,
            lives: true,
            hangs: false,
            is_draining: false,
            has_refused: false,
            lies: false,
            is_robbed: false,
            complaint: None,
            is_cut: false,
            is_retired: false,
        }
    }

    pub(super) fn works(&self) -> bool {
        self.lives && !self.hangs
    }

    /// Returns true if the end of the stream follows what was sent to the worker.
    pub(super) fn gets_end(&self) -> bool {
        self.is_retired || self.is_cut
    }

    pub(super) fn can_write(&self) -> bool {
        self.works() && !self.is_retired && !self.is_cut
    }

    /// Returns true if both sides should agree about everything.
    pub(super) fn is_honest(&self) -> bool {
        !self.lies && !self.is_robbed
    }

    /// Notes that the dispatcher reads a message. An answer is about the oldest offers.
    pub(super) fn on_read(&mut self, message: FromWorker) {
        match message {
            FromWorker::Adopted { count, .. } | FromWorker::Rejected { count, .. } => {
                self.sent.drain(..self.sent.len().min(count as usize));
            }
            FromWorker::Draining => self.is_draining = true,
            FromWorker::Demand { .. } => self.has_refused = false,
            _ => {}
        }
        self.has_refused |=
            matches!(message, FromWorker::Rejected { reason, .. } if reason.is_refusal());
    }

    /// Returns the reason why the worker must not be offered a connection, if there is one.
    pub(super) fn must_not_get(&self, fds: usize) -> Option<&'static str> {
        match self {
            _ if fds > self.max_fds.into() => Some("takes no bundles"),
            Self { is_draining: true, .. } => Some("drains"),
            Self { has_refused: true, lies: false, .. } => {
                Some("has refused, and has not asked again")
            }
            _ => None,
        }
    }

    pub(super) fn unsent_offers(&self) -> usize {
        self.unsent.iter().filter(|message| matches!(message, ToWorker::Offer { .. })).count()
    }

    /// Processes one message from the dispatcher. Returns false if nothing happened.
    pub(super) fn receive(&mut self, rejection: Option<RejectReason>) -> bool {
        if !self.works() || self.book.has_ended() {
            return false;
        }
        let Some(message) = self.to_worker.pop_front() else {
            let is_end = self.gets_end();
            if is_end {
                self.book.end(false);
            }
            return is_end;
        };
        let message = message.map_both(
            |offer| rejection.map_or(Ok(offer), Err),
            |()| unreachable!("nobody replaces this dispatcher"),
        );
        if let Err(error) = self.book.on_message(message) {
            self.book.end(false);
            self.is_cut = true;
            self.complaint = Some(error.to_string());
        }
        true
    }

    /// Lets the application ask for one connection. Returns false if nothing happened.
    pub(super) fn ask(&mut self) -> bool {
        let before = self.book.clone();
        self.book.adopt(1);
        self.give();
        self.book != before
    }

    /// Gives the application all connections whose adoption was sent.
    fn give(&mut self) {
        self.given.extend(self.book.take_adopted::<Vec<_>>(usize::MAX));
    }

    /// Ends one of the connections that the application has received, if there is one.
    pub(super) fn finish(&mut self, now: Instant) -> bool {
        let may = self.finished < self.given.len();
        if may {
            self.finished += 1;
            self.book.finish(now);
        }
        may
    }

    /// Sends one message. The application gets the connections whose adoption was in it.
    pub(super) fn answer(&mut self, now: Instant) -> bool {
        if self.book.has_ended() {
            return false;
        }
        self.book.ask(now, || u64::MAX);
        if let Some(due) = self.book.next_timeout() {
            self.book.on_timeout(due);
        }
        self.book.leave();
        let Some(message) = self.book.next_message() else { return false };
        if self.can_write() {
            self.from_worker.push_back(message);
            self.book.on_sent(1);
            self.give();
        } else {
            self.book.end(false);
        }
        true
    }
}
