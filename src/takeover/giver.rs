//! The running server's side of one takeover, as a value: no socket, no clock.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    protocol::{AbortReason, FromTaker, Refusal, Versions},
    steps::{GiverStep, Undone},
};

/// One takeover, from the point of view of the process that serves.
///
/// ```text
///         HELLO        welcome()          offered()          READY           drained(), RELEASE
///   Hello ---> Requested ------> Offering --------> Waiting -----> Draining ---------------> Over
///     |            |                |                 |               | taker's end, HAND_BACK
///     |            | refuse()       '-- abort ---.    | abort         '-----------> Over, serving
///     |            |                             v    v
///     |            |                             Cutting --- READY was written ---> Draining
///     |            v                                |
///     '---------> Over, serving <-------------------' end of what was written
/// ```
///
/// The process serves in every state except `Draining` and the end that follows from it. Only one
/// event makes it stop: READY was read. Only two events make it serve again: HAND_BACK, and the end
/// of a taker that has not sent RELEASE. A taker that was cut off can send neither HAND_BACK nor
/// RELEASE, so its takeover is final only after DRAINED.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Giver {
    state: State,
    settings: GiverSettings,
    /// Number of listeners that were offered.
    listeners: u32,
    /// Numbers of listeners that the taker does not use. They move into [`GiverStep::Stop`].
    declined: BTreeSet<u32>,
    /// The end of the current wait. `None` once READY was read or the takeover was called off.
    deadline: Option<Instant>,
    /// Actions that the task has not taken yet.
    steps: VecDeque<GiverStep>,
}

/// The versions that a giver speaks, and its time limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GiverSettings {
    pub(super) versions: Versions,
    /// The longest time from the connection to HELLO, and from there until everything was sent.
    pub(super) answer: Duration,
    /// The longest time from COMPLETE to READY.
    pub(super) ready: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    /// The giver waits for HELLO.
    Hello,
    /// The server decides whether this takeover may begin.
    Requested { version: u8 },
    /// Listeners and state are being sent.
    Offering,
    /// The giver waits for READY.
    Waiting,
    /// The takeover is called off. The receiving direction is shut down, and what was written
    /// before is read to its end. A READY that is found there counts if `ready_counts`.
    Cutting { reason: AbortReason, ready_counts: bool },
    /// The taker accepts. `given` is true if COMMIT was sent. `cut` is true if the receiving
    /// direction is shut down: then the end of the data is not the taker's end.
    Draining { given: bool, cut: bool },
    /// The connection is of no more use. `serving` is true if this process serves.
    Over { serving: bool },
}

impl Giver {
    /// Returns the state machine of a new connection.
    pub(super) fn new(now: Instant, settings: GiverSettings) -> Self {
        Self {
            state: State::Hello,
            settings,
            listeners: 0,
            declined: BTreeSet::new(),
            deadline: now.checked_add(settings.answer),
            steps: VecDeque::new(),
        }
    }

    /// Returns true unless this takeover has stopped this process from accepting connections.
    pub(super) fn is_serving(&self) -> bool {
        !matches!(self.state, State::Draining { .. } | State::Over { serving: false })
    }

    /// Returns true if the taker accepts and this process may still have to serve again.
    pub(super) fn is_draining(&self) -> bool {
        matches!(self.state, State::Draining { .. })
    }

    /// Returns true if the connection can be closed once all steps are taken.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over { .. })
    }

    /// Returns true if this process holds the baton.
    #[cfg(test)]
    pub(super) fn holds_baton(&self) -> bool {
        match self.state {
            State::Draining { given, .. } => !given,
            State::Over { serving } => serving,
            _ => true,
        }
    }

    /// Returns the next action to take. Call it after each event, until it returns `None`.
    pub(super) fn next_step(&mut self) -> Option<GiverStep> {
        self.steps.pop_front()
    }

    /// Returns the time at which to call [`on_timeout`](Self::on_timeout).
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// Calls the takeover off if the current wait has lasted too long.
    pub(super) fn on_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.abort(AbortReason::TimedOut);
    }

    /// Handles a message of the taker. One that has no place in the current state is a breach.
    pub(super) fn on_message(&mut self, message: FromTaker) {
        match (self.state, message) {
            // The first message: a request for a takeover, or for the status.
            (State::Hello, FromTaker::Hello { lowest, highest }) => {
                match self.settings.versions.highest_common(Versions { lowest, highest }) {
                    Some(version) => {
                        self.state = State::Requested { version };
                        self.steps.push_back(GiverStep::Decide);
                    }
                    None => self.refuse(Refusal::Version),
                }
            }
            (State::Hello, FromTaker::Status) => {
                self.steps.push_back(GiverStep::SendStatus);
                self.end(true);
            }
            // Between COMPLETE and READY, and what was written then and is read after the cut.
            (State::Waiting | State::Cutting { .. }, FromTaker::Decline { number })
                if number < self.listeners =>
            {
                self.declined.insert(number);
            }
            (State::Waiting | State::Cutting { ready_counts: true, .. }, FromTaker::Ready) => {
                self.stop()
            }
            // After READY.
            (State::Draining { .. }, FromTaker::HandBack { baton }) => {
                self.resume(Undone::HandedBack(baton));
                self.steps.push_back(GiverStep::SendResumed);
            }
            (State::Draining { .. }, FromTaker::Release) => self.give_up(),
            // The taker wrote this before it read the giver's last message.
            (State::Over { .. }, _) => {}
            _ => self.on_violation(),
        }
    }

    /// Handles a breach of the protocol. Nothing that comes after it counts.
    pub(super) fn on_violation(&mut self) {
        // After READY the taker serves, and a breach does not prove that it has ended. If this
        // process served again, both would serve.
        if self.is_draining() {
            return self.give_up();
        }
        self.abort(AbortReason::Misbehaved);
        if let State::Cutting { ready_counts, .. } = &mut self.state {
            *ready_counts = false;
        }
    }

    /// Handles the end of the taker, after everything that it wrote was read. After a
    /// [cut](GiverStep::Cut), the end of the data does not prove that the taker has ended: use
    /// [`on_end`](Self::on_end) for that.
    pub(super) fn on_taker_gone(&mut self) {
        match self.state {
            State::Draining { .. } => self.resume(Undone::Ended),
            _ => self.on_end(),
        }
    }

    /// Handles the end of the data: the taker has closed its end, or the giver has cut it off.
    pub(super) fn on_end(&mut self) {
        match self.state {
            State::Draining { cut: false, .. } => self.resume(Undone::Ended),
            State::Draining { cut: true, .. } => {}
            State::Cutting { reason, .. } => {
                self.steps.push_back(GiverStep::SendAborted(reason));
                self.end(true);
            }
            State::Over { .. } => {}
            State::Hello | State::Requested { .. } | State::Offering | State::Waiting => {
                self.end(true)
            }
        }
    }

    /// Begins to offer the listeners.
    pub(super) fn welcome(&mut self, now: Instant) {
        if let State::Requested { version } = self.state {
            self.state = State::Offering;
            self.deadline = now.checked_add(self.settings.answer);
            self.steps.push_back(GiverStep::SendOffer { version });
        }
    }

    /// Refuses a takeover.
    pub(super) fn refuse(&mut self, reason: Refusal) {
        if matches!(self.state, State::Hello | State::Requested { .. }) {
            self.steps.push_back(GiverStep::SendRefused(reason));
            self.end(true);
        }
    }

    /// Handles the end of the offer: all state and this number of listeners were sent.
    pub(super) fn offered(&mut self, now: Instant, listeners: u32) {
        if self.state == State::Offering {
            self.listeners = listeners;
            self.state = State::Waiting;
            self.deadline = now.checked_add(self.settings.ready);
            self.steps.push_back(GiverStep::SendComplete);
        }
    }

    /// Begins to call the takeover off. If READY was written before, it takes place all the same.
    pub(super) fn abort(&mut self, reason: AbortReason) {
        match self.state {
            State::Hello | State::Requested { .. } => self.end(true),
            State::Offering | State::Waiting => {
                // A READY before COMPLETE is a violation and does not count.
                let ready_counts = self.state == State::Waiting;
                self.state = State::Cutting { reason, ready_counts };
                self.deadline = None;
                self.steps.push_back(GiverStep::Cut);
            }
            State::Cutting { .. } | State::Draining { .. } | State::Over { .. } => {}
        }
    }

    /// Sends COMMIT with the baton, which the application has put down.
    pub(super) fn give(&mut self, baton: Bytes) {
        if let State::Draining { given: given @ false, .. } = &mut self.state {
            *given = true;
            self.steps.push_back(GiverStep::SendCommit { baton });
        }
    }

    /// Makes the takeover final, because the application has finished its connections. The caller
    /// first reads everything that is readable.
    pub(super) fn drained(&mut self) {
        if self.is_draining() {
            // If the application still holds its baton, the baton is lost. The rest has to move.
            self.give(Bytes::new());
            self.give_up();
        }
    }

    fn stop(&mut self) {
        let cut = matches!(self.state, State::Cutting { .. });
        self.state = State::Draining { given: false, cut };
        self.deadline = None;
        self.steps.push_back(GiverStep::Stop { declined: std::mem::take(&mut self.declined) });
    }

    fn resume(&mut self, undone: Undone) {
        self.steps.push_back(GiverStep::Resume(undone));
        self.end(true);
    }

    fn give_up(&mut self) {
        self.steps.extend([GiverStep::GiveUpCopies, GiverStep::SendDrained]);
        self.end(false);
    }

    fn end(&mut self, serving: bool) {
        self.state = State::Over { serving };
        self.deadline = None;
    }
}
