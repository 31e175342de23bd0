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
    pub(super) book: Book<u8>,
    /// Taken from the pool and not sent.
    pub(super) unsent: VecDeque<ToWorker<u8>>,
    pub(super) to_worker: VecDeque<ToWorker<u8>>,
    pub(super) from_worker: VecDeque<FromWorker>,
    /// What its application has got.
    pub(super) given: Vec<u8>,
    finished: usize,
    pub(super) lives: bool,
    pub(super) hangs: bool,
    /// It does not do as it says, so nothing is promised of what it gets.
    pub(super) lies: bool,
    /// Its socket has failed, and each side sees the end.
    pub(super) is_cut: bool,
    pub(super) is_retired: bool,
}

impl Peer {
    pub(super) fn new(id: WorkerId, process: ProcessId, window: u64) -> Self {
        Self {
            id,
            process,
            book: Book::new(window, u64::MAX, 1),
            unsent: VecDeque::new(),
            to_worker: VecDeque::new(),
            from_worker: VecDeque::new(),
            given: Vec::new(),
            finished: 0,
            lives: true,
            hangs: false,
            lies: false,
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

    pub(super) fn unsent_offers(&self) -> usize {
        self.unsent.iter().filter(|message| matches!(message, ToWorker::Offer { .. })).count()
    }

    pub(super) fn get(&mut self, unfit: Option<RejectReason>) -> bool {
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
        if self.book.on_message(message.map(|offer| unfit.map_or(Ok(offer), Err))).is_err() {
            self.book.end(false);
            self.is_cut = true;
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
