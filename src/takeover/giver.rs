//! The running server's side of one takeover, as a value: no socket, no clock.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::protocol::{AbortReason, FromTaker, Refusal, Versions};

/// One takeover, seen by the process that serves.
///
/// ```text
///         HELLO        welcome()          offered()          READY           drained(), RELEASE
///   Hello -----> Asked --------> Offering --------> Waiting -----> Draining ---------------> Over
///     |            |                |                 |               | taker's end, HAND_BACK
///     |            | refuse()       '-- abort ---.    | abort         '-----------> Over, serving
///     |            |                             v    v
///     |            |                             Cutting --- READY was written ---> Draining
///     |            v                                |
///     '---------> Over, serving <-------------------' end of what was written
/// ```
///
/// It serves in every state except `Draining` and the end that follows from it. Only one event
/// makes it stop: READY was read. Only two events make it serve again: HAND_BACK, and the end of a
/// taker that has not sent RELEASE. A taker that was cut off can send neither HAND_BACK nor
/// RELEASE, so its takeover is final only after DRAINED.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Giver {
    state: State,
    settings: GiverSettings,
    /// Number of listeners that were offered.
    listeners: u32,
    declined: BTreeSet<u32>,
    deadline: Option<Instant>,
    steps: VecDeque<GiverStep>,
}

/// The versions that a giver speaks, and its time limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GiverSettings {
    pub(super) versions: Versions,
    /// From the connection to HELLO, and from there until everything was sent.
    pub(super) answer: Duration,
    /// From COMPLETE to READY.
    pub(super) ready: Duration,
}

/// An action that the caller has to take next, in the order of these values.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum GiverStep {
    /// Call [`Giver::welcome`] or [`Giver::refuse`].
    Asked,
    /// Send WELCOME, then the listeners and the state, then call [`Giver::offered`].
    SendOffer { version: u8 },
    /// Send REFUSED.
    SendRefused(Refusal),
    /// Send STATUS.
    SendStatus,
    /// Send COMPLETE.
    SendComplete,
    /// Shut down the receiving direction, and read on to the end: from then on no READY can be
    /// written, and one that was written before is read.
    Cut,
    /// Send ABORTED.
    SendAborted(AbortReason),
    /// Accept no more. The taker has no use for some listeners, named by their numbers.
    Stop { declined: BTreeSet<u32> },
    /// Send the locks and COMMIT.
    SendCommit { baton: Bytes },
    /// Accept again.
    Resume(Undone),
    /// Send RESUMED.
    SendResumed,
    /// Close the copies of listeners and locks.
    GiveUpCopies,
    /// Send DRAINED.
    SendDrained,
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
    /// HELLO is to come.
    Hello,
    /// The server decides whether there is a takeover now.
    Asked { version: u8 },
    /// Listeners and state are on their way.
    Offering,
    /// READY is to come.
    Waiting,
    /// The receiving direction is shut down; what was written before is read to its end.
    Cutting { reason: AbortReason, ready_counts: bool },
    /// The taker accepts. `given`: COMMIT is sent. `cut`: the receiving direction is shut down, so
    /// its end is not the taker's end.
    Draining { given: bool, cut: bool },
    /// Nothing follows.
    Over { serving: bool },
}

impl Giver {
    /// Returns the giver's side of a new connection.
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
                match self.settings.versions.highest_common(Versions { lowest, highest }) {
                    Some(version) => {
                        self.state = State::Asked { version };
                        self.steps.push_back(GiverStep::Asked);
                    }
                    None => self.refuse(Refusal::Version),
                }
            }
            (State::Hello, FromTaker::Status) => {
                self.steps.push_back(GiverStep::SendStatus);
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
                self.steps.push_back(GiverStep::SendResumed);
            }
            (State::Draining { .. }, FromTaker::Release) => self.give_up(),
            (State::Over { .. }, _) => {} // it crossed the last message
            _ => self.on_violation(),
        }
    }

    /// Handles a breach of the protocol, after which nothing more can be understood.
    ///
    /// A taker that serves is not dead because of that. So nothing is undone: two would serve.
    pub(super) fn on_violation(&mut self) {
        // After READY: the taker serves, so this process must not serve again.
        if self.is_draining() {
            return self.give_up();
        }
        self.abort(AbortReason::Misbehaved);
        // Anything that comes behind a violation means nothing.
        if let State::Cutting { ready_counts, .. } = &mut self.state {
            *ready_counts = false;
        }
    }

    /// Handles the end of the taker, after everything that it wrote was read. After a
    /// [cut](GiverStep::Cut) that is not the same as [`on_end`](Self::on_end).
    pub(super) fn on_taker_gone(&mut self) {
        match self.state {
            State::Draining { .. } => self.resume(Undone::Ended),
            _ => self.on_end(),
        }
    }

    /// Handles the end of everything that can be read: the taker has closed its end, or the giver
    /// has cut it off.
    pub(super) fn on_end(&mut self) {
        match self.state {
            State::Draining { cut: false, .. } => self.resume(Undone::Ended),
            State::Draining { cut: true, .. } => {}
            State::Cutting { reason, .. } => {
                self.steps.push_back(GiverStep::SendAborted(reason));
                self.end(true);
            }
            State::Over { .. } => {}
            State::Hello | State::Asked { .. } | State::Offering | State::Waiting => self.end(true),
        }
    }

    /// Begins to offer the listeners.
    pub(super) fn welcome(&mut self, now: Instant) {
        if let State::Asked { version } = self.state {
            self.state = State::Offering;
            self.deadline = now.checked_add(self.settings.answer);
            self.steps.push_back(GiverStep::SendOffer { version });
        }
    }

    /// Refuses a takeover.
    pub(super) fn refuse(&mut self, reason: Refusal) {
        if matches!(self.state, State::Hello | State::Asked { .. }) {
            self.steps.push_back(GiverStep::SendRefused(reason));
            self.end(true);
        }
    }

    /// Notes that this number of listeners, and all state, are sent.
    pub(super) fn offered(&mut self, now: Instant, listeners: u32) {
        if self.state == State::Offering {
            self.listeners = listeners;
            self.state = State::Waiting;
            self.deadline = now.checked_add(self.settings.ready);
            self.steps.push_back(GiverStep::SendComplete);
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

    /// Passes the baton on, which the application has put down.
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
            // A baton that the application still holds is lost with it; the rest has to move.
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
