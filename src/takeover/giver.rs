//! The running server's side of one takeover, as a value: no socket, no clock.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::protocol::{AbortReason, FromTaker, HIGHEST_VERSION, LOWEST_VERSION, Refusal};

/// One takeover, seen by the process that serves.
///
/// ```text
///         HELLO        welcome()          offered()          READY           drained(), RELEASE
///   Hello -----> Asked --------> Offering --------> Waiting -----> Draining ------------------> Over
///     |            |                |                 |               | the taker's end, HAND_BACK
///     |            | refuse()       '-- abort ---.    | abort         '--------------> Over, serving
///     |            |                             v    v
///     |            |                             Cutting --- READY was written ---> Draining
///     |            v                                |
///     '---------> Over, serving <-------------------' end of what was written
/// ```
///
/// It serves in every state but `Draining` and what follows from it. Only one thing makes it stop:
/// READY was read. Only two make it serve again: the end of a taker that has not said RELEASE, and
/// HAND_BACK. A taker that was cut off can say neither, so it takes over for good only after
/// DRAINED.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Giver {
    state: State,
    limits: GiverLimits,
    /// Number of listeners that were offered.
    listeners: u32,
    declined: BTreeSet<u32>,
    deadline: Option<Instant>,
    steps: VecDeque<GiverStep>,
}

/// How long a giver waits, and for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GiverLimits {
    /// From the connection to HELLO, and from there until everything was sent.
    pub(super) answer: Duration,
    /// From COMPLETE to READY.
    pub(super) ready: Duration,
}

/// What has to be done next, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum GiverStep {
    /// Call [`Giver::welcome`] or [`Giver::refuse`].
    Asked,
    /// Send WELCOME, then the listeners and the state, then call [`Giver::offered`].
    Offer { version: u8 },
    /// Send REFUSED.
    Refuse(Refusal),
    /// Send STATUS.
    TellStatus,
    /// Send COMPLETE.
    Complete,
    /// Shut down the receiving direction, and read on to the end: from then on no READY can be
    /// written, and one that was written before is read.
    Cut,
    /// Send ABORTED.
    Abort(AbortReason),
    /// Accept no more. The taker has no use for some listeners, named by their numbers.
    Stop { declined: BTreeSet<u32> },
    /// Send the locks and YOURS.
    Give { baton: Bytes },
    /// Accept again.
    Resume(Undone),
    /// Send RESUMED.
    TellResumed,
    /// Close the copies of listeners and locks.
    GiveUpCopies,
    /// Send DRAINED.
    TellDrained,
}

/// The reason why a server accepts again after another process has replaced it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub(super) enum Undone {
    /// The new process has ended.
    Ended,
    /// The new process has given everything back, with its baton.
    HandedBack(Bytes),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    /// Waits for HELLO.
    Hello,
    /// The server decides whether there is a takeover now.
    Asked { version: u8 },
    /// Listeners and state are on their way.
    Offering,
    /// Waits for READY.
    Waiting,
    /// The receiving direction is shut down; what was written before is read to its end.
    Cutting { reason: AbortReason, ready_counts: bool },
    /// The taker accepts. `given`: YOURS is sent. `cut`: the receiving direction is shut down, so
    /// its end does not tell of the taker's.
    Draining { given: bool, cut: bool },
    /// Nothing follows.
    Over { serving: bool },
}

impl Giver {
    /// Answers a connection.
    pub(super) fn new(now: Instant, limits: GiverLimits) -> Self {
        Self {
            state: State::Hello,
            limits,
            listeners: 0,
            declined: BTreeSet::new(),
            deadline: now.checked_add(limits.answer),
            steps: VecDeque::new(),
        }
    }

    /// Returns true if this process accepts connections, as far as this takeover goes.
    pub(super) fn is_serving(&self) -> bool {
        !matches!(self.state, State::Draining { .. } | State::Over { serving: false })
    }

    /// Returns true if the taker accepts and this process may still have to serve again.
    pub(super) fn is_draining(&self) -> bool {
        matches!(self.state, State::Draining { .. })
    }

    /// Returns true if the connection is of no more use, once all steps are done.
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

    pub(super) fn next_step(&mut self) -> Option<GiverStep> {
        self.steps.pop_front()
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn on_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.abort(AbortReason::TimedOut);
    }

    pub(super) fn on_message(&mut self, message: FromTaker) {
        match (self.state, message) {
            (State::Hello, FromTaker::Hello { lowest, highest }) => {
                let version = highest.min(HIGHEST_VERSION);
                if version < lowest.max(LOWEST_VERSION) {
                    self.refuse(Refusal::Version);
                } else {
                    self.state = State::Asked { version };
                    self.steps.push_back(GiverStep::Asked);
                }
            }
            (State::Hello, FromTaker::Status) => {
                self.steps.push_back(GiverStep::TellStatus);
                self.end(true);
            }
            (State::Waiting | State::Cutting { .. }, FromTaker::Decline { number })
                if number < self.listeners =>
            {
                self.declined.insert(number);
            }
            (State::Waiting | State::Cutting { ready_counts: true, .. }, FromTaker::Ready) => {
                self.stop()
            }
            (State::Draining { .. }, FromTaker::HandBack { baton }) => {
                self.resume(Undone::HandedBack(baton));
                self.steps.push_back(GiverStep::TellResumed);
            }
            (State::Draining { .. }, FromTaker::Release) => self.give_up(),
            (State::Over { .. }, _) => {} // crossed the last message
            _ => self.on_violation(),
        }
    }

    /// The taker broke the protocol, or nothing more can be read from it although it lives.
    ///
    /// A taker that serves is not dead because of that, so there is no undo: two would serve.
    pub(super) fn on_violation(&mut self) {
        if self.is_draining() {
            return self.give_up();
        }
        self.abort(AbortReason::Misbehaved);
        // What comes behind a violation means nothing.
        if let State::Cutting { ready_counts, .. } = &mut self.state {
            *ready_counts = false;
        }
    }

    /// The taker has closed its end of the connection, and what it wrote was read.
    ///
    /// After a [cut](GiverStep::Cut) that is not the same as [`on_end`](Self::on_end).
    pub(super) fn on_taker_gone(&mut self) {
        match self.state {
            State::Draining { .. } => self.resume(Undone::Ended),
            _ => self.on_end(),
        }
    }

    /// Nothing more can be read: the taker has closed its end, or the giver has cut it off.
    pub(super) fn on_end(&mut self) {
        match self.state {
            State::Draining { cut: false, .. } => self.resume(Undone::Ended),
            State::Draining { cut: true, .. } => {}
            State::Cutting { reason, .. } => {
                self.steps.push_back(GiverStep::Abort(reason));
                self.end(true);
            }
            State::Over { .. } => {}
            State::Hello | State::Asked { .. } | State::Offering | State::Waiting => self.end(true),
        }
    }

    /// The server offers its listeners.
    pub(super) fn welcome(&mut self, now: Instant) {
        if let State::Asked { version } = self.state {
            self.state = State::Offering;
            self.deadline = now.checked_add(self.limits.answer);
            self.steps.push_back(GiverStep::Offer { version });
        }
    }

    /// There is no takeover now.
    pub(super) fn refuse(&mut self, reason: Refusal) {
        if matches!(self.state, State::Hello | State::Asked { .. }) {
            self.steps.push_back(GiverStep::Refuse(reason));
            self.end(true);
        }
    }

    /// This number of listeners, and all state, are sent.
    pub(super) fn offered(&mut self, now: Instant, listeners: u32) {
        if self.state == State::Offering {
            self.listeners = listeners;
            self.state = State::Waiting;
            self.deadline = now.checked_add(self.limits.ready);
            self.steps.push_back(GiverStep::Complete);
        }
    }

    /// Calls the takeover off, unless READY was written before.
    pub(super) fn abort(&mut self, reason: AbortReason) {
        match self.state {
            State::Hello | State::Asked { .. } => self.end(true),
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

    /// The application has put down its exclusive thing, which the taker may pick up.
    pub(super) fn give(&mut self, baton: Bytes) {
        if let State::Draining { given: given @ false, .. } = &mut self.state {
            *given = true;
            self.steps.push_back(GiverStep::Give { baton });
        }
    }

    /// The application has finished its connections: nothing can be undone from here on. To be
    /// called only after everything that was readable was read.
    pub(super) fn drained(&mut self) {
        if self.is_draining() {
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
        self.steps.extend([GiverStep::GiveUpCopies, GiverStep::TellDrained]);
        self.end(false);
    }

    fn end(&mut self, serving: bool) {
        self.state = State::Over { serving };
        self.deadline = None;
    }
}
