//! The links of the simulation, with a pool at one end and a book at the other.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use crate::handoff::{
    dispatcher::{
        RetireCause, WorkerId,
        pool::{Pool, ProcessState},
    },
    incoming::book::Book,
    protocol::{FromWorker, ToWorker},
};

/// One of the two dispatchers.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) pool: Pool<u8>,
    pub(super) lives: bool,
    /// The connections of the dispatcher whose adoption it has not read.
    pub(super) has: BTreeSet<u8>,
}

/// A link, with a pool at one end and a book at the other.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) side: usize,
    pub(super) id: WorkerId,
    pub(super) book: Book<u8>,
    pub(super) to_worker: VecDeque<ToWorker<u8, ()>>,
    pub(super) from_worker: VecDeque<FromWorker>,
    /// The number of MOVEs that were sent.
    pub(super) moves: usize,
    /// After this many MOVEs, the next one takes the worker back to this dispatcher.
    pub(super) returns_after: Option<usize>,
    /// The dispatcher's end is closed.
    pub(super) is_closed: bool,
    /// The book was ended.
    pub(super) has_ended: bool,
}

pub(super) fn later(now: Instant) -> Instant {
    now + Duration::from_secs(3600)
}

impl Link {
    pub(super) fn new(side: usize, id: WorkerId, book: Book<u8>) -> Self {
        Self {
            side,
            id,
            book,
            to_worker: VecDeque::new(),
            from_worker: VecDeque::new(),
            moves: 0,
            returns_after: None,
            is_closed: false,
            has_ended: false,
        }
    }

    /// Sends all messages of the dispatcher, as its task does.
    pub(super) fn send(&mut self, sides: &mut [Side; 2], now: Instant) {
        let side = &mut sides[self.side];
        while side.lives
            && !self.is_closed
            && let Some(message) = side.pool.next_message(self.id, now)
        {
            let is_offer = matches!(message, ToWorker::Offer { .. });
            assert!(self.moves == 0 || !is_offer, "an offer after a MOVE");
            self.moves += usize::from(matches!(message, ToWorker::Move(())));
            self.to_worker.push_back(message.map(|connection| *connection));
            if self.returns_after.is_some_and(|moves| self.moves > moves) {
                // After this message the dispatcher fences the worker that it takes back.
                for message in std::mem::take(&mut self.from_worker) {
                    side.pool.on_last_message(self.id, message, 0, now);
                }
                side.pool.relink(self.id, 0, later(now), now);
                self.is_closed = true;
            }
        }
    }

    /// Lets the dispatcher read a message.
    pub(super) fn read(&mut self, sides: &mut [Side; 2], now: Instant) -> bool {
        let side = &mut sides[self.side];
        if !side.lives || self.is_closed {
            return false;
        }
        let outcome = match self.from_worker.pop_front() {
            Some(message) => side.pool.on_message(self.id, message, 0, now),
            None if self.has_ended => Err(RetireCause::Ended),
            None => return false,
        };
        if let Err(cause) = outcome {
            assert!(!matches!(cause, RetireCause::Misbehaved(_)), "an honest worker: {cause:?}");
            self.is_closed = true;
            let state = ProcessState::Lives { has_received: true };
            side.pool.retire(self.id, &cause, 0, state, now);
        }
        true
    }

    /// Sends all messages of the worker. Returns the connections that its application gets.
    pub(super) fn answer(&mut self, now: Instant) -> Vec<u8> {
        if !self.has_ended && !self.is_closed {
            self.book.ask(now, || u64::MAX);
            if let Some(due) = self.book.next_timeout() {
                self.book.on_timeout(due);
            }
            self.book.leave();
            while let Some(message) = self.book.next_message() {
                self.from_worker.push_back(message);
                self.book.on_sent(1);
            }
        }
        self.book.take_adopted(usize::MAX)
    }

    /// Lets the worker read a message. Returns true if the message is a MOVE.
    pub(super) fn receive(&mut self) -> bool {
        match self.to_worker.pop_front() {
            Some(ToWorker::Move(())) => return true,
            Some(message) => {
                let message = message.map_both(Ok, |()| unreachable!("handled above"));
                self.book.on_message(message).expect("an honest dispatcher");
            }
            None => {}
        }
        false
    }
}
