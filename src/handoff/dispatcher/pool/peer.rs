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
    /// Taken from the pool and not sent.
    pub(super) unsent: VecDeque<ToWorker<u8, ()>>,
    pub(super) to_worker: VecDeque<ToWorker<u8, ()>>,
    pub(super) from_worker: VecDeque<FromWorker>,
    /// Offers that were sent and whose answer was not read. After the end, copies of these may be
    /// here.
    pub(super) sent: VecDeque<u8>,
    /// The connections that its application has got.
    pub(super) given: Vec<u8>,
    finished: usize,
    pub(super) lives: bool,
    pub(super) hangs: bool,
    /// The dispatcher has read its DRAINING, or a refusal without another DEMAND after it.
    pub(super) is_draining: bool,
    pub(super) has_refused: bool,
    /// It does not do as it says, so nothing is promised of what it gets.
    pub(super) lies: bool,
    /// Something else has read from its socket.
    pub(super) is_robbed: bool,
    /// It has found that the dispatcher breaks the protocol.
    pub(super) complaint: Option<String>,
    /// Its socket has failed, and each side sees the end.
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

    /// Returns true if nothing more comes after what was sent to it.
    pub(super) fn sees_end(&self) -> bool {
        self.is_retired || self.is_cut
    }

    pub(super) fn can_write(&self) -> bool {
        self.works() && !self.is_retired && !self.is_cut
    }

    /// Returns true if both sides should agree about everything.
    pub(super) fn is_honest(&self) -> bool {
        !self.lies && !self.is_robbed
    }

    /// The dispatcher reads a message. An answer is about the oldest offers.
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

    /// The reason why it must not be offered this connection.
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

    pub(super) fn get(&mut self, rejection: Option<RejectReason>) -> bool {
        if !self.works() || self.book.has_ended() {
            return false;
        }
        let Some(message) = self.to_worker.pop_front() else {
            let is_end = self.sees_end();
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

    pub(super) fn ask(&mut self) -> bool {
        let before = self.book.clone();
        self.book.adopt(1);
        self.give();
        self.book != before
    }

    fn give(&mut self) {
        self.given.extend(self.book.take_adopted::<Vec<_>>(usize::MAX));
    }

    pub(super) fn finish(&mut self, now: Instant) -> bool {
        let may = self.finished < self.given.len();
        if may {
            self.finished += 1;
            self.book.finish(now);
        }
        may
    }

    /// Sends one message. Whatever an application has asked for it gets right then.
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
