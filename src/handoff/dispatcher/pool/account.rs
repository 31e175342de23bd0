//! The account of one worker's link: what is planned for it, what it was offered, and what it asked
//! for.

use std::{
    collections::VecDeque,
    convert::Infallible,
    ops::{Deref, RangeBounds},
    time::Instant,
};

use super::{Pending, ProcessInfo, clock::Clock};
use crate::handoff::{
    dispatcher::{RetireCause, WorkerState, builder::Config},
    protocol::{FromWorker, MAX_UNANSWERED, ToWorker, VERSION},
};

/// The account of one process of a worker, from its connection to its retirement.
///
/// A connection is in it from the moment when it is planned for the worker until it is answered, or
/// the worker is retired. The number of offers made is `adopted + rejected + unanswered.len()`;
/// everything else that others want to know is derived as well.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Account<C> {
    pub(super) process: ProcessInfo,
    pub(super) since: Instant,
    phase: Phase,
    /// The most descriptors of an offer that it takes.
    max_fds: u8,
    /// Connections that it had adopted before this link began, and that had not ended then. `None`
    /// if it can't be moved.
    open_before: Option<u64>,
    /// There is another link for it, to the dispatcher that goes on in the place of this one.
    pub(super) has_next_link: bool,
    /// It was told to go on at another link.
    has_moved: bool,
    /// To be offered. Not even the worker's task has them.
    planned: Offers<C>,
    /// Offered and not answered, the oldest first.
    unanswered: Offers<C>,
    demand: u64,
    adopted: u64,
    rejected: u64,
    finished: u64,
    /// To be sent before the next offer.
    control: VecDeque<ToWorker<Infallible, ()>>,
    /// It gets nothing until the other new workers of a replacement are ready.
    pub(super) is_held_back: bool,
    /// Its task has been told everything that there is for it.
    is_asleep: bool,
    pub(super) clock: Clock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// It has not said hello.
    Starting,
    Open,
    /// It takes nothing more.
    Draining,
}

fn misbehaved<T>(how: impl Into<String>) -> Result<T, RetireCause> {
    Err(RetireCause::Misbehaved(how.into()))
}

impl<C> Account<C> {
    pub(super) fn new(process: ProcessInfo, hello_by: Instant, now: Instant) -> Self {
        Self {
            process,
            since: now,
            phase: Phase::Starting,
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
            clock: Clock::new(hello_by),
        }
    }

    // Queries.

    pub(super) fn state(&self) -> WorkerState {
        match self.phase {
            Phase::Starting => WorkerState::Starting,
            Phase::Open if self.is_held_back => WorkerState::Starting,
            Phase::Open if self.clock.is_late() => WorkerState::Silent,
            Phase::Open => WorkerState::Ready,
            Phase::Draining => WorkerState::Draining,
        }
    }

    /// The number of offers that were made, which is the number of the next one.
    fn made(&self) -> u64 {
        self.adopted + self.rejected + self.unanswered.len() as u64
    }

    /// The number of connections that wait for its answer, sent or not.
    pub(super) fn pending(&self) -> u64 {
        (self.planned.len() + self.unanswered.len()) as u64
    }

    /// The number of descriptors of those.
    pub(super) fn pending_fds(&self) -> usize {
        self.planned.fds + self.unanswered.fds
    }

    /// The number of adopted connections that have not ended.
    pub(super) fn active(&self) -> u64 {
        self.ever_open() - self.finished
    }

    /// The number of connections that this link has ever been told of as adopted.
    fn ever_open(&self) -> u64 {
        self.open_before.unwrap_or(0).saturating_add(self.adopted)
    }

    pub(super) fn is_draining(&self) -> bool {
        self.phase == Phase::Draining
    }

    pub(super) fn has_adopted(&self) -> bool {
        self.ever_open() > 0
    }

    pub(super) fn has_moved(&self) -> bool {
        self.has_moved
    }

    /// Returns true if it may be able to go on at another link.
    pub(super) fn may_move(&self) -> bool {
        self.phase == Phase::Starting || self.phase == Phase::Open && self.open_before.is_some()
    }

    pub(super) fn takes(&self, fds: usize) -> bool {
        fds <= self.max_fds.into()
    }

    /// The number of further connections that it takes.
    pub(super) fn room(&self) -> u64 {
        // A suspect is its only offer until it has answered.
        let has_suspect = [self.planned.front(), self.unanswered.front()]
            .iter()
            .flatten()
            .any(|first| first.is_alone);
        if self.state() != WorkerState::Ready || has_suspect || self.clock.is_paused() {
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
        self.wake()
    }

    fn send(&mut self, message: ToWorker<Infallible, ()>) {
        self.control.push_back(message);
    }

    /// The next message to be sent, and whether it repeats an offer of the connection. An offer
    /// counts as made from now on.
    pub(super) fn next_message(&mut self, now: Instant) -> Option<(ToWorker<&C, ()>, bool)> {
        if let Some(control) = self.control.pop_front() {
            return Some((control.map(|never| match never {}), false));
        }
        let number = self.made();
        let Some(mut pending) = self.planned.pop_front() else {
            self.is_asleep = true;
            return None;
        };
        pending.offer(number, now);
        let offered = self.unanswered.push_back(pending);
        Some((ToWorker::Offer { number, offer: &offered.connection }, offered.offers > 1))
    }

    // From the worker.

    pub(super) fn on_hello(
        &mut self,
        (lowest, highest): (u8, u8),
        max_fds: u8,
        open: Option<u64>,
        now: Instant,
    ) -> Result<(), RetireCause> {
        if self.clock.is_greeted() {
            return misbehaved("a second hello");
        }
        if !(lowest..=highest).contains(&VERSION) {
            return misbehaved(format!("it speaks versions {lowest} to {highest}, not {VERSION}"));
        }
        if max_fds == 0 {
            return misbehaved("it takes offers with no descriptors only");
        }
        self.clock.on_hello(now);
        (self.max_fds, self.open_before) = (max_fds, open);
        if self.phase == Phase::Starting {
            self.phase = Phase::Open;
        }
        self.control.push_front(ToWorker::Welcome { version: VERSION });
        Ok(())
    }

    /// A number, or an answer to a ping. The rest is up to the pool.
    pub(super) fn on_number(&mut self, message: FromWorker) -> Result<(), RetireCause> {
        match message {
            FromWorker::Demand { total } if total < self.demand => {
                return misbehaved(format!("its demand fell from {} to {total}", self.demand));
            }
            FromWorker::Demand { total } => self.demand = total,
            FromWorker::Load { finished } if finished < self.finished => {
                return misbehaved(format!(
                    "its finished connections fell from {} to {finished}",
                    self.finished
                ));
            }
            FromWorker::Load { finished } if finished > self.ever_open() => {
                return misbehaved(format!(
                    "it finished {finished} connections and adopted {}",
                    self.ever_open()
                ));
            }
            FromWorker::Load { finished } => self.finished = finished,
            FromWorker::Pong { nonce } if !self.clock.on_pong(nonce) => {
                return misbehaved(format!("it answered ping {nonce}, which was not the last"));
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes out the next `count` offers, which are answered. It can't have seen the last `unsent`
    /// ones.
    ///
    /// # Errors
    /// If they are not the next ones, or were not made.
    fn answered(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let (next, sent) =
            (self.adopted + self.rejected, self.unanswered.len().saturating_sub(unsent));
        if first != next {
            return misbehaved(format!("it answered offer {first} instead of {next}"));
        }
        match usize::try_from(count) {
            Ok(count) if count <= sent => Ok(self.unanswered.take(..count)),
            _ => misbehaved(format!("it answered {count} offers, {sent} were unanswered")),
        }
    }

    pub(super) fn on_adopted(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let adopted = self.answered(first, count, unsent)?;
        self.adopted += u64::from(count);
        if count > 0 {
            self.clock.on_adopted();
        }
        Ok(adopted)
    }

    pub(super) fn on_rejected(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Result<Vec<Pending<C>>, RetireCause> {
        let rejected = self.answered(first, count, unsent)?;
        self.rejected += u64::from(count);
        Ok(rejected)
    }

    /// It has no room or no time: what it has asked for and was not offered is void, and it gets
    /// nothing for a while even if it asks again. Returns what was planned for it.
    pub(super) fn on_refusal(&mut self, now: Instant) -> Vec<Pending<C>> {
        self.demand = self.made();
        self.clock.pause(now);
        self.planned.take(..)
    }

    pub(super) fn adopted_at_last(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Vec<Pending<C>> {
        let adopted = self.answered_at_last(first, count, unsent);
        self.adopted += adopted.len() as u64;
        adopted
    }

    /// Takes out everything that it was sent as its own.
    pub(super) fn adopt_all(&mut self, unsent: usize) -> Vec<Pending<C>> {
        let adopted = self.unanswered.take(..self.unanswered.len().saturating_sub(unsent));
        self.adopted += adopted.len() as u64;
        adopted
    }

    /// Everything that it has sent completely counts, whatever else it has sent: takes out the
    /// offers that a message answers, if it was sent these.
    pub(super) fn answered_at_last(
        &mut self,
        first: u64,
        count: u32,
        unsent: usize,
    ) -> Vec<Pending<C>> {
        let sent = self.unanswered.len().saturating_sub(unsent);
        let Some(past) = self.unanswered.get(sent.wrapping_sub(1)).map(|last| last.number + 1)
        else {
            return Vec::new();
        };
        let Some(end) = first.checked_add(count.into()).filter(|end| *end <= past) else {
            return Vec::new();
        };
        let (answered, rest): (Vec<_>, Vec<_>) = self
            .unanswered
            .take(..)
            .into_iter()
            .partition(|pending| (first..end).contains(&pending.number));
        for pending in rest {
            self.unanswered.push_back(pending);
        }
        answered
    }

    /// If it is silent, others get what is planned for it. Returns that.
    pub(super) fn take_back_if_silent(&mut self) -> Vec<Pending<C>> {
        if self.clock.is_late() { self.planned.take(..) } else { Vec::new() }
    }

    // The end.

    /// It gets nothing more. Returns what was planned for it.
    pub(super) fn drain(&mut self) -> Vec<Pending<C>> {
        if self.phase != Phase::Starting {
            self.phase = Phase::Draining;
        }
        self.planned.take(..)
    }

    /// It is to finish what it has until then. Returns true if its task has to be woken.
    pub(super) fn tell_to_drain(&mut self, until: Option<Instant>, now: Instant) -> bool {
        if self.clock.drain(until) {
            let within = until.map(|until| until.saturating_duration_since(now));
            self.send(ToWorker::Drain { within });
        }
        self.wake()
    }

    /// Another dispatcher goes on in the place of this one: the worker goes on with that if it
    /// can, and leaves otherwise. One that has not said hello does so after that. Returns what was
    /// planned for it.
    pub(super) fn hand_on(&mut self, now: Instant) -> Vec<Pending<C>> {
        match self.phase {
            Phase::Open if self.has_next_link && self.open_before.is_some() => self.move_away(),
            Phase::Open => {
                self.tell_to_drain(None, now);
                self.drain()
            }
            Phase::Starting | Phase::Draining => Vec::new(),
        }
    }

    /// It is to go on at another link, and gets nothing more at this one. Returns what was planned
    /// for it.
    pub(super) fn move_away(&mut self) -> Vec<Pending<C>> {
        self.has_moved = true;
        self.send(ToWorker::Move(()));
        self.drain()
    }

    /// Returns true if its task has to be woken.
    pub(super) fn wake(&mut self) -> bool {
        std::mem::take(&mut self.is_asleep)
    }

    /// Does what is due, after which [`Clock::next_timeout`] names a later time.
    pub(super) fn on_timeout(
        &mut self,
        now: Instant,
        config: &Config,
        may_fence: impl FnOnce() -> bool,
    ) -> Result<(), RetireCause> {
        let oldest =
            self.unanswered.front().and_then(|oldest| Some((oldest.number, oldest.offered_at?)));
        let next = self.made();
        let due = self.clock.on_timeout(now, config, oldest, next, may_fence)?;
        due.into_iter().flatten().for_each(|message| self.send(message));
        Ok(())
    }

    pub(super) fn next_timeout(&self, config: &Config) -> Option<Instant> {
        let oldest =
            self.unanswered.front().and_then(|oldest| Some((oldest.number, oldest.offered_at?)));
        self.clock.next_timeout(config, oldest)
    }

    /// Takes everything that is left. The last `unsent` offers were not sent.
    pub(super) fn retire(mut self, unsent: usize) -> Remains<C> {
        let sent = self.unanswered.len().saturating_sub(unsent);
        let mut unseen = self.unanswered.take(sent..);
        let repeated = unseen.iter().filter(|pending| pending.offers > 1).count();
        unseen.iter_mut().for_each(|pending| pending.offers -= 1);
        unseen.extend(self.planned.take(..));
        Remains { unanswered: self.unanswered.take(..), unseen, repeated: repeated as u64 }
    }
}

/// The offers that a worker has not answered when it is retired.
pub(super) struct Remains<C> {
    /// It may have seen these.
    pub(super) unanswered: Vec<Pending<C>>,
    /// It has not seen these.
    pub(super) unseen: Vec<Pending<C>>,
    /// The number of repeated offers among those that were made and not sent.
    pub(super) repeated: u64,
}

/// Offers in their order, and the number of their descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Offers<C> {
    offers: VecDeque<Pending<C>>,
    fds: usize,
}

impl<C> Offers<C> {
    fn push_back(&mut self, pending: Pending<C>) -> &Pending<C> {
        self.fds += pending.fds;
        self.offers.push_back(pending);
        &self.offers[self.offers.len() - 1]
    }

    fn pop_front(&mut self) -> Option<Pending<C>> {
        let first = self.offers.pop_front()?;
        self.fds -= first.fds;
        Some(first)
    }

    fn take(&mut self, range: impl RangeBounds<usize>) -> Vec<Pending<C>> {
        let taken = Vec::from_iter(self.offers.drain(range));
        self.fds -= taken.iter().map(|pending| pending.fds).sum::<usize>();
        taken
    }
}

impl<C> Default for Offers<C> {
    fn default() -> Self {
        Self { offers: VecDeque::new(), fds: 0 }
    }
}

impl<C> Deref for Offers<C> {
    type Target = VecDeque<Pending<C>>;

    fn deref(&self) -> &VecDeque<Pending<C>> {
        &self.offers
    }
}
