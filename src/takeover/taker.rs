//! The new process's side of one takeover, as a value: no socket, no clock.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    protocol::{FromTaker, ToTaker, Versions},
    steps::{Failure, TakerStep},
};

/// The time between two attempts to get the lock of the path.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// The time between two attempts once the lock should have been free long ago: another process
/// holds it.
const SLOW_LOCK_RETRY: Duration = Duration::from_secs(1);

/// One takeover, from the point of view of the process that is going to serve.
///
/// ```text
///          WELCOME             COMPLETE          ready()           READY was written
///   Hello ---------> Receiving --------> Offered -------> Readying ----------> Unconfirmed
///                                           |                | can't be written  |  | giver's end
///                            giver's end,   |                v            COMMIT |  | or a breach
///                            then ready()   |               Cut                  |  v
///                                           |                | giver's end       |  Relocking
///                                           '----> Locking <-'                   v      |
///                                             lock |   | no lock         Confirmed      | lock
///                                         Final <--'   '--> Ended    DRAINED |          |
///                                                                  or an end '-> Final <'
/// ```
///
/// The process serves in `Unconfirmed` and in all states that follow, except `Ended`. Two events
/// make it serve. Either READY was written in full, so the giver will read it. Or the giver has
/// ended without reading READY, and the lock of the path proves that no other process serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Taker {
    state: State,
    settings: TakerSettings,
    /// The time at which the current wait ends, or the lock is tried again. `None` without either.
    deadline: Option<Instant>,
    /// Actions that the task has not taken yet.
    steps: VecDeque<TakerStep>,
}

/// The versions that a taker speaks, and its time limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TakerSettings {
    pub(super) versions: Versions,
    /// The longest wait for each message until COMPLETE, and for the socket to take READY.
    pub(super) answer: Duration,
    /// The longest time from the giver's end until its lock is free. The kernel closes the files of
    /// a process that exits one after another.
    pub(super) lock: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    /// HELLO is sent, and the taker waits for WELCOME.
    Hello,
    /// The offer is being received. `missing` is the number of listeners that have not come.
    Receiving { missing: u32 },
    /// The offer is complete, and the application sets itself up.
    Offered { giver_gone: bool },
    /// READY is queued, and is not written in full.
    Readying,
    /// READY can't be written. An ABORTED with a reason may still come.
    Cut,
    /// The giver has ended without READY. This process serves if it gets the lock by `until`.
    Locking { until: Option<Instant> },
    /// READY was written in full: this process serves, and waits for COMMIT.
    Unconfirmed,
    /// This process serves, and COMMIT will not come: the giver has ended, or has broken the
    /// protocol and was sent RELEASE. Either way its lock becomes free.
    Relocking { until: Option<Instant> },
    /// COMMIT was received. The giver may still have to serve again.
    Confirmed,
    /// HAND_BACK is queued or written. This process serves until the answer.
    HandingBack { baton: Bytes },
    /// RELEASE is queued or written. This process waits for DRAINED.
    Releasing,
    /// This process serves, and the giver can't serve again.
    Final,
    /// This process does not serve.
    Ended,
}

impl Taker {
    /// Returns the state machine of a new connection, with HELLO as its first step.
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

    /// Returns true if the connection can be closed once all steps are taken.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Final | State::Ended)
    }

    /// Returns true if this process has the whole offer, and has not given up.
    #[cfg(test)]
    pub(super) fn has_everything(&self) -> bool {
        !matches!(self.state, State::Hello | State::Receiving { .. } | State::Ended)
    }

    /// Returns true if this process holds the baton.
    #[cfg(test)]
    pub(super) fn holds_baton(&self) -> bool {
        matches!(self.state, State::Confirmed | State::Releasing | State::Final)
    }

    /// Returns true if [`next_step`](Self::next_step) has an action.
    pub(super) fn has_steps(&self) -> bool {
        !self.steps.is_empty()
    }

    /// Returns the next action to take. Call it after each event, until it returns `None`.
    pub(super) fn next_step(&mut self) -> Option<TakerStep> {
        self.steps.pop_front()
    }

    /// Returns the time at which to call [`on_timeout`](Self::on_timeout).
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// Gives up, or tries the lock again, if the time for that has come.
    pub(super) fn on_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.state {
            // If READY is not written in full, its rest is never sent: this process closes its end.
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

    /// Handles a message of the giver. One that has no place in the current state is a breach.
    pub(super) fn on_message<F>(&mut self, now: Instant, message: &ToTaker<F>) {
        if let State::Hello | State::Receiving { .. } = self.state {
            // The limit is for the time between two messages, because the giver does not hang.
            self.deadline = now.checked_add(self.settings.answer);
        }
        match (&mut self.state, message) {
            // The answer to HELLO.
            (State::Hello, ToTaker::Welcome { version, listeners })
                if self.settings.versions.contains(*version) =>
            {
                self.state = State::Receiving { missing: *listeners };
            }
            (State::Hello, ToTaker::Refused { reason }) => self.fail(Failure::Refused(*reason)),
            // The offer. COMPLETE counts only if no listener is missing.
            (State::Receiving { missing }, ToTaker::Listeners(listeners))
                if *missing as usize >= listeners.len() =>
            {
                *missing -= listeners.len() as u32;
            }
            (
                State::Receiving { .. },
                ToTaker::State { .. }
                | ToTaker::Workers { .. }
                | ToTaker::Generations { .. }
                | ToTaker::Lanes { .. },
            ) => {}
            (State::Receiving { missing: 0 }, ToTaker::Complete) => {
                self.state = State::Offered { giver_gone: false };
                self.deadline = None;
                self.steps.push_back(TakerStep::Offered);
            }
            // The giver may call the takeover off until READY was written in full.
            (
                State::Hello
                | State::Receiving { .. }
                | State::Offered { .. }
                | State::Readying
                | State::Cut
                | State::Locking { .. },
                ToTaker::Aborted { reason },
            ) => self.fail(Failure::Aborted(*reason)),
            // After READY.
            (State::Unconfirmed, ToTaker::Locks { .. }) => {}
            (State::Unconfirmed, ToTaker::Commit { baton, .. }) => {
                self.state = State::Confirmed;
                self.steps.push_back(TakerStep::Confirmed(Some(baton.clone())));
            }
            // The giver wrote COMMIT before it read RELEASE. The lock has come with it, so it would
            // never become free.
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

    /// Handles a breach of the protocol, or the loss of descriptors. Nothing can be read after it.
    ///
    /// If this process serves, it goes on, and makes sure that the giver does not serve again.
    pub(super) fn on_violation(&mut self, now: Instant) {
        match self.state {
            State::Relocking { .. } | State::Final | State::Ended => {}
            State::Releasing => self.state = State::Final,
            // COMMIT can no longer be read. The giver releases the lock after RELEASE.
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

    /// Handles the end of the giver, after everything that it wrote was read.
    pub(super) fn on_end(&mut self, now: Instant) {
        match self.state {
            State::Hello | State::Receiving { .. } => self.fail(Failure::GiverGone),
            // The application is not interrupted: once it is ready, it serves if it gets the lock.
            State::Offered { .. } => self.state = State::Offered { giver_gone: true },
            State::Readying | State::Cut => self.begin_locking(now),
            State::Unconfirmed => self.begin_relocking(now),
            State::Confirmed | State::HandingBack { .. } | State::Releasing => {
                self.on_giver_final()
            }
            State::Locking { .. } | State::Relocking { .. } | State::Final | State::Ended => {}
        }
    }

    /// Declines a listener that the application does not use.
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

    /// Handles that the socket has taken the last byte of READY: the giver reads it, or has died.
    pub(super) fn on_ready_written(&mut self) {
        if self.state == State::Readying {
            self.state = State::Unconfirmed;
            self.deadline = None;
            self.steps.push_back(TakerStep::Serve);
        }
    }

    /// Handles that nothing more can be written.
    pub(super) fn on_send_failed(&mut self, now: Instant) {
        if self.state == State::Readying {
            self.state = State::Cut;
            self.deadline = now.checked_add(self.settings.lock);
        }
    }

    /// Handles the result of a [`TakerStep::TryLock`].
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
            // Try again later. A process that serves already (`Relocking`) never gives up.
            State::Relocking { until } | State::Locking { until } => {
                let is_late = until.is_some_and(|until| now >= until);
                let wait = if is_late { SLOW_LOCK_RETRY } else { LOCK_RETRY };
                self.deadline = now.checked_add(wait);
            }
            _ => {}
        }
    }

    /// Asks the giver to serve again. Returns false if it can't be asked in the current state.
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

    /// Waits for the lock before this process serves.
    fn begin_locking(&mut self, now: Instant) {
        self.state = State::Locking { until: now.checked_add(self.settings.lock) };
        self.deadline = None;
        self.steps.push_back(TakerStep::TryLock);
    }

    /// Waits for the lock while this process serves.
    fn begin_relocking(&mut self, now: Instant) {
        self.state = State::Relocking { until: now.checked_add(self.settings.lock) };
        self.deadline = None;
        self.steps.push_back(TakerStep::TryLock);
    }

    /// Handles that the giver can't serve again.
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
