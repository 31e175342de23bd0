//! The new process's side of one takeover, as a value: no socket, no clock.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::protocol::{AbortReason, FromTaker, Refusal, ToTaker, Versions};

/// The time between two attempts to get the lock of the path.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// The same, once the lock should have been free long ago: something else holds it.
const SLOW_LOCK_RETRY: Duration = Duration::from_secs(1);

/// One takeover, seen by the process that wants to serve.
///
/// ```text
///          WELCOME             COMPLETE          ready()           READY was written
///   Hello ---------> Receiving --------> Offered -------> Readying ----------> Unconfirmed
///                                           |                | can't be written  |  | giver's end
///                            giver's end,   |                v             COMMIT |  | or a breach
///                            then ready()   |               Cut                  |  v
///                                           |                | giver's end       |  Relocking
///                                           '----> Locking <-'                   v      |
///                                             lock |   | no lock         Confirmed      | lock
///                                         Final <--'   '--> Ended    DRAINED |          |
///                                                                  or an end '-> Final <'
/// ```
///
/// It serves from `Unconfirmed` on. Two events make it serve. Either READY was written in full, so
/// the giver reads it. Or the giver has gone without it, and the lock of the path proves that no
/// other process serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Taker {
    state: State,
    settings: TakerSettings,
    deadline: Option<Instant>,
    steps: VecDeque<TakerStep>,
}

/// The versions that a taker speaks, and its time limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TakerSettings {
    pub(super) versions: Versions,
    /// For each message until COMPLETE, and for sending READY.
    pub(super) answer: Duration,
    /// From the giver's end until its lock is free: an exiting process closes one thing after
    /// another.
    pub(super) lock: Duration,
}

/// An action that the caller has to take next, in the order of these values.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum TakerStep {
    /// Send a message. After READY, [`Taker::on_ready_written`] or [`Taker::on_send_failed`].
    Send(FromTaker),
    /// Everything is here.
    Offered,
    /// Try to get the lock, and call [`Taker::on_lock`].
    TryLock,
    /// Accept connections.
    Serve,
    /// Everything of the giver is this process's now, with its baton. `None` if the giver has ended
    /// before it could pass the baton on, or it was lost on the way.
    Confirmed(Option<Bytes>),
    /// The giver has refused to serve again, or has ended: the baton is here as before.
    NotHandedBack(Bytes),
    /// Accept no more: the giver serves.
    Stop,
    /// Nothing was taken over. Close the connection without writing what is still queued.
    Fail(Failure),
}

/// The reason why nothing was taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    Refused(Refusal),
    Aborted(AbortReason),
    /// The giver has ended before everything was here.
    GiverGone,
    /// Another process has the lock of the path.
    AnotherServes,
    /// No answer in time.
    TimedOut,
    Misbehaved,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    /// HELLO is sent.
    Hello,
    /// Listeners and state are on their way. `left`: number of listeners to come.
    Receiving { left: u32 },
    /// The application sets itself up.
    Offered { giver_gone: bool },
    /// READY is to be written and is not yet, or not in full.
    Readying,
    /// READY can't be written. A reason may still come.
    Cut,
    /// The giver has gone without READY: the lock decides.
    Locking { until: Option<Instant> },
    /// READY was written in full: this process serves.
    Unconfirmed,
    /// The same, and the giver has gone before COMMIT, or has broken the protocol and was sent
    /// RELEASE. The lock is on its way to be free.
    Relocking { until: Option<Instant> },
    /// COMMIT is here. The giver may still have to serve again.
    Confirmed,
    /// HAND_BACK is written, or will be; this process serves until the answer.
    HandingBack { baton: Bytes },
    /// RELEASE is written, or will be.
    Releasing,
    /// This process serves, and the giver never will again.
    Final,
    /// This process does not serve.
    Ended,
}

impl Taker {
    pub(super) fn new(now: Instant, settings: TakerSettings) -> Self {
        let Versions { lowest, highest } = settings.versions;
        let hello = FromTaker::Hello { lowest, highest };
        Self {
            state: State::Hello,
            settings,
            deadline: now.checked_add(settings.answer),
            steps: [TakerStep::Send(hello)].into(),
        }
    }

    /// Returns true if this process accepts connections.
    pub(super) fn is_serving(&self) -> bool {
        matches!(
            self.state,
            State::Unconfirmed
                | State::Relocking { .. }
                | State::Confirmed
                | State::HandingBack { .. }
                | State::Releasing
                | State::Final
        )
    }

    /// Returns true if the connection is of no more use, once all steps are done.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Final | State::Ended)
    }

    /// Returns true if this process has everything that it needs to serve, and has not given up.
    #[cfg(test)]
    pub(super) fn has_everything(&self) -> bool {
        !matches!(self.state, State::Hello | State::Receiving { .. } | State::Ended)
    }

    /// Returns true if this process holds the baton.
    #[cfg(test)]
    pub(super) fn holds_baton(&self) -> bool {
        matches!(self.state, State::Confirmed | State::Releasing | State::Final)
    }

    /// Returns true if something is to be done.
    pub(super) fn has_steps(&self) -> bool {
        !self.steps.is_empty()
    }

    pub(super) fn next_step(&mut self) -> Option<TakerStep> {
        self.steps.pop_front()
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn on_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.state {
            // A READY that was not written in full never will be: this process closes its end.
            State::Hello | State::Receiving { .. } | State::Readying => {
                self.fail(Failure::TimedOut)
            }
            State::Cut => self.begin_locking(now),
            State::Locking { .. } | State::Relocking { .. } => {
                self.deadline = None;
                self.steps.push_back(TakerStep::TryLock);
            }
            _ => self.deadline = None,
        }
    }

    pub(super) fn on_message<F>(&mut self, now: Instant, message: &ToTaker<F>) {
        if let State::Hello | State::Receiving { .. } = self.state {
            self.deadline = now.checked_add(self.settings.answer); // it does not hang
        }
        match (&mut self.state, message) {
            // The offer, in this order.
            (State::Hello, ToTaker::Welcome { version, listeners })
                if self.settings.versions.contains(*version) =>
            {
                self.state = State::Receiving { left: *listeners };
            }
            (State::Hello, ToTaker::Refused { reason }) => self.fail(Failure::Refused(*reason)),
            (State::Receiving { left }, ToTaker::Listeners(listeners))
                if *left as usize >= listeners.len() =>
            {
                *left -= listeners.len() as u32;
            }
            (
                State::Receiving { .. },
                ToTaker::State { .. }
                | ToTaker::Workers { .. }
                | ToTaker::Generations { .. }
                | ToTaker::Lanes { .. },
            ) => {}
            (State::Receiving { left: 0 }, ToTaker::Complete) => {
                self.state = State::Offered { giver_gone: false };
                self.deadline = None;
                self.steps.push_back(TakerStep::Offered);
            }
            (
                State::Hello
                | State::Receiving { .. }
                | State::Offered { .. }
                | State::Readying
                | State::Cut
                | State::Locking { .. },
                ToTaker::Aborted { reason },
            ) => self.fail(Failure::Aborted(*reason)),
            // After the cut.
            (State::Unconfirmed, ToTaker::Locks { .. }) => {}
            (State::Unconfirmed, ToTaker::Commit { baton, .. }) => {
                self.state = State::Confirmed;
                self.steps.push_back(TakerStep::Confirmed(Some(baton.clone())));
            }
            // COMMIT has crossed RELEASE. The lock comes with it, and will not be free otherwise.
            (State::Relocking { .. }, ToTaker::Commit { baton, .. }) => {
                self.state = State::Releasing;
                self.deadline = None;
                self.steps.push_back(TakerStep::Confirmed(Some(baton.clone())));
            }
            (State::Relocking { .. }, _) => {}
            (State::HandingBack { .. }, ToTaker::Resumed) => {
                self.steps.push_back(TakerStep::Stop);
                self.state = State::Ended;
            }
            (State::HandingBack { .. } | State::Confirmed | State::Releasing, ToTaker::Drained) => {
                self.on_giver_final();
            }
            (State::Final | State::Ended, _) => {}
            _ => self.on_violation(now),
        }
    }

    /// Handles a breach of the protocol, or the loss of descriptors, after which nothing more can
    /// be read.
    ///
    /// If this process serves, it goes on, and makes sure that the giver does not serve as well.
    pub(super) fn on_violation(&mut self, now: Instant) {
        match self.state {
            State::Relocking { .. } | State::Final | State::Ended => {}
            State::Releasing => self.state = State::Final,
            // COMMIT will never be here in full. The giver gives up the lock after RELEASE.
            State::Unconfirmed => {
                self.steps.push_back(TakerStep::Send(FromTaker::Release));
                self.begin_relocking(now);
            }
            _ if self.is_serving() => {
                self.steps.push_back(TakerStep::Send(FromTaker::Release));
                self.on_giver_final();
            }
            _ => self.fail(Failure::Misbehaved),
        }
    }

    /// Handles the giver's end, after everything that it wrote was read.
    pub(super) fn on_end(&mut self, now: Instant) {
        match self.state {
            State::Hello | State::Receiving { .. } => self.fail(Failure::GiverGone),
            // The application goes on setting itself up: it may have to serve.
            State::Offered { .. } => self.state = State::Offered { giver_gone: true },
            State::Readying | State::Cut => self.begin_locking(now),
            State::Unconfirmed => self.begin_relocking(now),
            State::Confirmed | State::HandingBack { .. } | State::Releasing => {
                self.on_giver_final()
            }
            State::Locking { .. } | State::Relocking { .. } | State::Final | State::Ended => {}
        }
    }

    /// Declines a listener that the application has no use for.
    pub(super) fn decline(&mut self, number: u32) {
        if self.state == (State::Offered { giver_gone: false }) {
            self.steps.push_back(TakerStep::Send(FromTaker::Decline { number }));
        }
    }

    /// Begins to take over: the application is set up.
    pub(super) fn ready(&mut self, now: Instant) {
        match self.state {
            State::Offered { giver_gone: true } => self.begin_locking(now),
            State::Offered { giver_gone: false } => {
                self.state = State::Readying;
                self.deadline = now.checked_add(self.settings.answer);
                self.steps.push_back(TakerStep::Send(FromTaker::Ready));
            }
            _ => {}
        }
    }

    /// Notes that the socket has taken the last byte of READY: the giver reads it, or has died.
    pub(super) fn on_ready_written(&mut self) {
        if self.state == State::Readying {
            self.state = State::Unconfirmed;
            self.deadline = None;
            self.steps.push_back(TakerStep::Serve);
        }
    }

    /// Notes that nothing more can be written.
    pub(super) fn on_send_failed(&mut self, now: Instant) {
        if self.state == State::Readying {
            self.state = State::Cut;
            self.deadline = now.checked_add(self.settings.lock);
        }
    }

    /// Takes the result of a [`TakerStep::TryLock`].
    pub(super) fn on_lock(&mut self, now: Instant, is_ours: bool) {
        match self.state {
            State::Locking { .. } if is_ours => {
                self.finish();
                self.steps.extend([TakerStep::Serve, TakerStep::Confirmed(None)]);
            }
            State::Relocking { .. } if is_ours => {
                self.finish();
                self.steps.push_back(TakerStep::Confirmed(None));
            }
            State::Locking { until } if until.is_some_and(|until| now >= until) => {
                self.fail(Failure::AnotherServes);
            }
            // A process that serves already never gives up.
            State::Relocking { until } | State::Locking { until } => {
                let is_late = until.is_some_and(|until| now >= until);
                let wait = if is_late { SLOW_LOCK_RETRY } else { LOCK_RETRY };
                self.deadline = now.checked_add(wait);
            }
            _ => {}
        }
    }

    /// Asks the giver to serve again. Returns false if it never will.
    pub(super) fn hand_back(&mut self, baton: Bytes) -> bool {
        let confirmed = self.state == State::Confirmed;
        if confirmed {
            self.steps.push_back(TakerStep::Send(FromTaker::HandBack { baton: baton.clone() }));
            self.state = State::HandingBack { baton };
        }
        confirmed
    }

    /// Makes sure that the giver never serves again.
    pub(super) fn release(&mut self) {
        if self.state == State::Confirmed {
            self.state = State::Releasing;
            self.steps.push_back(TakerStep::Send(FromTaker::Release));
        }
    }

    fn begin_locking(&mut self, now: Instant) {
        self.state = State::Locking { until: now.checked_add(self.settings.lock) };
        self.deadline = None;
        self.steps.push_back(TakerStep::TryLock);
    }

    fn begin_relocking(&mut self, now: Instant) {
        self.state = State::Relocking { until: now.checked_add(self.settings.lock) };
        self.deadline = None;
        self.steps.push_back(TakerStep::TryLock);
    }

    fn on_giver_final(&mut self) {
        if let State::HandingBack { baton } = &self.state {
            self.steps.push_back(TakerStep::NotHandedBack(baton.clone()));
        }
        self.finish();
    }

    fn finish(&mut self) {
        self.state = State::Final;
        self.deadline = None;
    }

    fn fail(&mut self, failure: Failure) {
        self.state = State::Ended;
        self.deadline = None;
        self.steps.clear(); // a READY that was not sent must not be sent now
        self.steps.push_back(TakerStep::Fail(failure));
    }
}
