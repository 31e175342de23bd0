//! The account of one link of a worker: the connections planned for it, its unanswered offers, and
//! its demand.

mod answers;

use std::{collections::VecDeque, convert::Infallible, time::Instant};

pub(super) use answers::Remains;

use super::{
    Pending, ProcessInfo,
    offers::Offers,
    timeouts::{Drain, Timeouts},
};
use crate::handoff::{
    dispatcher::{RetireCause, WorkerState, builder::Config},
    protocol::{MAX_UNANSWERED, ToWorker, VERSION},
};

/// The account of one link of a worker, from its beginning to its end.
///
/// A client's connection is in the account from its plan until the worker answers the offer or is
/// retired. The number of offers made is not stored: it is
/// `adopted + rejected + unanswered.len()`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Account<C> {
    pub(super) process: ProcessInfo,
    /// The time when the process connected.
    pub(super) since: Instant,
    phase: AccountPhase,
    /// The most descriptors of an offer that the worker takes. 0 before its HELLO.
    max_fds: u8,
    /// The number of connections that the worker had adopted before this link began, and that had
    /// not ended then. `None` if the worker cannot be moved.
    open_before: Option<u64>,
    /// The worker has another link, to the dispatcher that replaces this one.
    pub(super) has_next_link: bool,
    /// The worker was sent a MOVE.
    has_moved: bool,
    /// Connections to be offered. The worker's task has not taken them yet, so they can still go to
    /// another worker.
    planned: Offers<C>,
    /// Offers that were made and not answered, the oldest first.
    unanswered: Offers<C>,
    /// Never falls, except after a refusal.
    demand: u64,
    adopted: u64,
    rejected: u64,
    /// `finished <= open_before + adopted`.
    finished: u64,
    /// Messages to be sent before the next offer.
    control: VecDeque<ToWorker<Infallible, ()>>,
    /// The worker gets nothing until the other new workers of its replacement are ready.
    pub(super) is_held_back: bool,
    /// The task of the worker has taken everything, so it has to be woken for the next message.
    is_asleep: bool,
    pub(super) timeouts: Timeouts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum AccountPhase {
    /// The worker has not sent HELLO.
    Starting,
    Open,
    /// The worker takes no more offers.
    Draining,
}

/// The next message to be sent to a worker.
pub(super) struct NextMessage<'a, C> {
    pub(super) message: ToWorker<&'a C, ()>,
    /// True if it is an offer of a connection that was offered before.
    pub(super) is_repeated: bool,
}

/// Returns the error for a worker that has broken the protocol.
fn misbehaved<T>(how: impl Into<String>) -> Result<T, RetireCause> {
    Err(RetireCause::Misbehaved(how.into()))
}

impl<C> Account<C> {
    pub(super) fn new(process: ProcessInfo, hello_by: Instant, now: Instant) -> Self {
        Self {
            process,
            since: now,
            phase: AccountPhase::Starting,
            max_fds: 0,
            open_before: None,
            has_next_link: false,
            has_moved: false,
            planned: Offers::default(),
            unanswered: Offers::default(),
            demand: 0,
            adopted: 0,
            rejected: 0,
            finished: 0,
            control: VecDeque::new(),
            is_held_back: false,
            is_asleep: true,
            timeouts: Timeouts::new(hello_by),
        }
    }

    // Queries.

    pub(super) fn state(&self) -> WorkerState {
        match self.phase {
            AccountPhase::Starting => WorkerState::Starting,
            AccountPhase::Open if self.is_held_back => WorkerState::Starting,
            AccountPhase::Open if self.timeouts.is_late() => WorkerState::Silent,
            AccountPhase::Open => WorkerState::Ready,
            AccountPhase::Draining => WorkerState::Draining,
        }
    }

    /// The number of offers made, which is also the number of the next offer.
    fn made(&self) -> u64 {
        self.adopted + self.rejected + self.unanswered.len() as u64
    }

    /// The number of connections that are planned for the worker or offered to it.
    pub(super) fn pending(&self) -> u64 {
        (self.planned.len() + self.unanswered.len()) as u64
    }

    /// The number of descriptors of all pending connections.
    pub(super) fn pending_fds(&self) -> usize {
        self.planned.fds + self.unanswered.fds
    }

    /// The number of adopted connections that have not ended.
    pub(super) fn active(&self) -> u64 {
        self.ever_open() - self.finished
    }

    /// The number of connections that were open at the beginning of this link or adopted at it.
    fn ever_open(&self) -> u64 {
        self.open_before.unwrap_or(0).saturating_add(self.adopted)
    }

    pub(super) fn is_draining(&self) -> bool {
        self.phase == AccountPhase::Draining
    }

    /// Returns true if the worker is known to have adopted a connection.
    pub(super) fn has_adopted(&self) -> bool {
        self.ever_open() > 0
    }

    pub(super) fn has_moved(&self) -> bool {
        self.has_moved
    }

    /// Returns true if the worker may be able to go on at another link. Only its HELLO decides that
    /// for certain.
    pub(super) fn may_move(&self) -> bool {
        self.phase == AccountPhase::Starting
            || self.phase == AccountPhase::Open && self.open_before.is_some()
    }

    /// Returns true if the worker takes an offer with this number of descriptors.
    pub(super) fn takes(&self, fds: usize) -> bool {
        fds <= self.max_fds.into()
    }

    /// The number of further connections that can be planned for the worker.
    pub(super) fn room(&self) -> u64 {
        // A suspect stays the only pending connection of its worker until it is answered.
        let has_suspect = [self.planned.front(), self.unanswered.front()]
            .iter()
            .flatten()
            .any(|first| first.is_alone);
        if self.state() != WorkerState::Ready || has_suspect || self.timeouts.is_paused() {
            return 0;
        }
        let asked_for = self.demand.saturating_sub(self.made() + self.planned.len() as u64);
        asked_for.min(MAX_UNANSWERED.saturating_sub(self.pending()))
    }

    #[cfg(test)]
    pub(super) fn count_of(&self, connection: &C) -> usize
    where
        C: PartialEq,
    {
        self.planned
            .iter()
            .chain(self.unanswered.iter())
            .filter(|pending| pending.connection == *connection)
            .count()
    }

    // To the worker.

    /// Plans an offer. Returns true if the worker's task has to be woken.
    pub(super) fn plan(&mut self, pending: Pending<C>) -> bool {
        self.planned.push_back(pending);
        self.must_wake()
    }

    /// Queues a message, to be sent before the next offer.
    fn send(&mut self, message: ToWorker<Infallible, ()>) {
        self.control.push_back(message);
    }

    /// Takes out the next message to be sent. An offer counts as made from now on.
    pub(super) fn next_message(&mut self, now: Instant) -> Option<NextMessage<'_, C>> {
        if let Some(control) = self.control.pop_front() {
            let message = control.map(|never| match never {});
            return Some(NextMessage { message, is_repeated: false });
        }
        let number = self.made();
        let Some(mut pending) = self.planned.pop_front() else {
            self.is_asleep = true;
            return None;
        };
        pending.offer(number, now);
        let offered = self.unanswered.push_back(pending);
        let message = ToWorker::Offer { number, offer: &offered.connection };
        Some(NextMessage { message, is_repeated: offered.offers > 1 })
    }

    // From the worker.

    /// Checks a HELLO, and answers it with WELCOME, which is sent before all other messages.
    pub(super) fn on_hello(
        &mut self,
        (lowest, highest): (u8, u8),
        max_fds: u8,
        open: Option<u64>,
        now: Instant,
    ) -> Result<(), RetireCause> {
        if self.timeouts.is_greeted() {
            return misbehaved("it sent a second HELLO");
        }
        if !(lowest..=highest).contains(&VERSION) {
            return misbehaved(format!(
                "it supports versions {lowest} to {highest}, not {VERSION}"
            ));
        }
        if max_fds == 0 {
            return misbehaved("it takes only offers without descriptors");
        }
        self.timeouts.on_hello(now);
        (self.max_fds, self.open_before) = (max_fds, open);
        if self.phase == AccountPhase::Starting {
            self.phase = AccountPhase::Open;
        }
        self.control.push_front(ToWorker::Welcome { version: VERSION });
        Ok(())
    }

    pub(super) fn on_demand(&mut self, total: u64) -> Result<(), RetireCause> {
        // Only `on_refusal` lowers the demand.
        if total < self.demand {
            return misbehaved(format!("its demand fell from {} to {total}", self.demand));
        }
        self.demand = total;
        Ok(())
    }

    pub(super) fn on_load(&mut self, finished: u64) -> Result<(), RetireCause> {
        if finished < self.finished {
            return misbehaved(format!(
                "its finished connections fell from {} to {finished}",
                self.finished
            ));
        }
        if finished > self.ever_open() {
            return misbehaved(format!(
                "it finished {finished} connections and adopted {}",
                self.ever_open()
            ));
        }
        self.finished = finished;
        Ok(())
    }

    pub(super) fn on_pong(&mut self, nonce: u64) -> Result<(), RetireCause> {
        if !self.timeouts.on_pong(nonce) {
            return misbehaved(format!("it answered ping {nonce}, which was not the last"));
        }
        Ok(())
    }

    /// Cancels the demand that is not met, because the worker has no room or no time. The worker
    /// gets nothing for a while, even if it asks again. Returns what was planned for it.
    pub(super) fn on_refusal(&mut self, now: Instant) -> Vec<Pending<C>> {
        self.demand = self.made();
        self.timeouts.pause(now);
        self.planned.take(..)
    }

    /// Takes out what is planned for the worker if it is late with a PONG, so that others get it.
    pub(super) fn take_back_if_silent(&mut self) -> Vec<Pending<C>> {
        if self.timeouts.is_late() { self.planned.take(..) } else { Vec::new() }
    }

    // The end.

    /// Stops making offers to the worker. Returns what was planned for it. A worker that has not
    /// sent HELLO gets nothing anyway, and drains after that.
    pub(super) fn drain(&mut self) -> Vec<Pending<C>> {
        if self.phase != AccountPhase::Starting {
            self.phase = AccountPhase::Draining;
        }
        self.planned.take(..)
    }

    /// Sends a DRAIN with this deadline, unless the last one had the same. Returns true if the
    /// worker's task has to be woken.
    pub(super) fn send_drain(&mut self, drain: Drain, now: Instant) -> bool {
        if self.timeouts.drain(drain) {
            let within = drain.until.map(|until| until.saturating_duration_since(now));
            self.send(ToWorker::Drain { within });
        }
        self.must_wake()
    }

    /// Hands the worker on to the dispatcher that replaces this one: the worker moves if it can,
    /// and drains otherwise. A worker that has not sent HELLO is handed on after that. Returns what
    /// was planned for the worker.
    pub(super) fn hand_on(&mut self, now: Instant) -> Vec<Pending<C>> {
        match self.phase {
            AccountPhase::Open if self.has_next_link && self.open_before.is_some() => {
                self.move_away()
            }
            AccountPhase::Open => {
                self.send_drain(Drain { until: None }, now);
                self.drain()
            }
            AccountPhase::Starting | AccountPhase::Draining => Vec::new(),
        }
    }

    /// Sends a MOVE to another link. The worker gets no more offers at this link. Returns what was
    /// planned for it.
    pub(super) fn move_away(&mut self) -> Vec<Pending<C>> {
        self.has_moved = true;
        self.send(ToWorker::Move(()));
        self.drain()
    }

    /// Returns true if the worker's task has to be woken. The caller has to wake it, because
    /// further calls return false until the task has taken everything.
    pub(super) fn must_wake(&mut self) -> bool {
        std::mem::take(&mut self.is_asleep)
    }

    /// Does what is due. [`Timeouts::next_timeout`] returns a later time afterwards.
    ///
    /// # Errors
    /// Returns the cause if the worker has to be retired.
    pub(super) fn on_timeout(
        &mut self,
        now: Instant,
        config: &Config,
        may_fence: impl FnOnce() -> bool,
    ) -> Result<(), RetireCause> {
        let oldest =
            self.unanswered.front().and_then(|oldest| Some((oldest.number, oldest.offered_at?)));
        let next = self.made();
        let due = self.timeouts.on_timeout(now, config, oldest, next, may_fence)?;
        due.into_iter().flatten().for_each(|message| self.send(message));
        Ok(())
    }

    pub(super) fn next_timeout(&self, config: &Config) -> Option<Instant> {
        let oldest =
            self.unanswered.front().and_then(|oldest| Some((oldest.number, oldest.offered_at?)));
        self.timeouts.next_timeout(config, oldest)
    }
}
