//! The state of the model: two processes with their connection, and the steps of each.

use std::time::Instant;

use bytes::Bytes;

use super::HOUR;
use crate::takeover::{
    giver::{Giver, GiverStep},
    protocol::{AbortReason, FromTaker, ToTaker},
    taker::{Failure, Taker, TakerStep},
};

/// Two processes, the connection between them, and the lock of the path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// `None` once it is dead.
    pub(super) giver: Option<Giver>,
    pub(super) taker: Option<Taker>,
    pub(super) giver_accepts: bool,
    pub(super) taker_accepts: bool,
    pub(super) giver_has_lock: bool,
    pub(super) taker_has_lock: bool,
    /// Written and not read.
    pub(super) to_giver: Vec<FromTaker>,
    pub(super) to_taker: Vec<Sent>,
    /// Half of READY was written, which a stream allows.
    pub(super) half_written: bool,
    /// The giver has shut down its receiving direction.
    pub(super) cut: bool,
    /// A side has closed its end, or has died.
    pub(super) giver_closed: bool,
    pub(super) taker_closed: bool,
    /// A process was killed.
    pub(super) killed: bool,
    /// The taker had everything once, and has given up for this reason.
    pub(super) gave_up: Option<Failure>,
    pub(super) offered: bool,
    /// The taker reads nothing more.
    pub(super) lost_commit: bool,
}

/// A message that the giver has written.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Sent {
    Welcome,
    Complete,
    Aborted(AbortReason),
    Commit,
    Resumed,
    Drained,
}

impl Sent {
    pub(super) fn message(&self) -> ToTaker<()> {
        match self {
            Self::Welcome => ToTaker::Welcome { version: 1, listeners: 0 },
            Self::Complete => ToTaker::Complete,
            Self::Aborted(reason) => ToTaker::Aborted { reason: *reason },
            Self::Commit => ToTaker::Commit { baton: Bytes::new(), fds: Default::default() },
            Self::Resumed => ToTaker::Resumed,
            Self::Drained => ToTaker::Drained,
        }
    }
}

impl World {
    /// Returns true if the giver may serve, now or after an undo.
    pub(super) fn giver_stands_by(&self) -> bool {
        self.giver.as_ref().is_some_and(|giver| !giver.is_over() || giver.is_serving())
    }

    /// Returns true if the taker serves or is going to.
    pub(super) fn taker_stands_by(&self) -> bool {
        self.taker.as_ref().is_some_and(Taker::has_everything)
    }

    /// Returns true if a message is on its way after which one of the two stops to accept.
    pub(super) fn is_at_the_cut(&self) -> bool {
        let ready = self.to_giver.contains(&FromTaker::Ready);
        let giver_is_told = self.giver.as_ref().is_some_and(|giver| !giver.is_serving());
        let resumed = self.to_taker.contains(&Sent::Resumed);
        let taker_is_told = self.taker.as_ref().is_some_and(|taker| !taker.is_serving());
        // After HAND_BACK, RESUMED is the giver's next step.
        let giver_tells = self.giver.as_ref().is_some_and(|giver| {
            let mut giver = giver.clone();
            std::iter::from_fn(|| giver.next_step()).any(|step| step == GiverStep::SendResumed)
        });
        ready || giver_is_told || resumed || taker_is_told || giver_tells
    }

    /// Writes a message of the taker in full, if anybody can read it.
    pub(super) fn taker_writes(&mut self, now: Instant, message: FromTaker) {
        let taker = self.taker.as_mut().expect("it lives");
        if self.cut || self.giver_closed {
            return taker.on_send_failed(now);
        }
        if message == FromTaker::Ready {
            taker.on_ready_written();
        }
        self.to_giver.push(message);
    }

    pub(super) fn giver_step(&mut self, now: Instant) -> Option<()> {
        let giver = self.giver.as_mut()?;
        let Some(step) = giver.next_step() else {
            // A connection that is of no more use is closed.
            if !giver.is_over() || self.giver_closed {
                return None;
            }
            self.giver_closed = true;
            return Some(());
        };
        match step {
            GiverStep::Asked => giver.welcome(now),
            GiverStep::SendOffer { .. } => {
                self.to_taker.push(Sent::Welcome);
                giver.offered(now, 0);
            }
            GiverStep::SendRefused(_) => unreachable!("it is not busy"),
            GiverStep::SendStatus => unreachable!("nobody asks for it"),
            GiverStep::SendComplete => self.to_taker.push(Sent::Complete),
            GiverStep::Cut => self.cut = true,
            GiverStep::SendAborted(reason) => self.to_taker.push(Sent::Aborted(reason)),
            GiverStep::Stop { .. } => self.giver_accepts = false,
            GiverStep::SendCommit { .. } => self.to_taker.push(Sent::Commit),
            GiverStep::Resume(_) => self.giver_accepts = true,
            GiverStep::SendResumed => self.to_taker.push(Sent::Resumed),
            GiverStep::GiveUpCopies => self.giver_has_lock = false,
            GiverStep::SendDrained => self.to_taker.push(Sent::Drained),
        }
        Some(())
    }

    pub(super) fn taker_step(&mut self, now: Instant) -> Option<()> {
        let taker = self.taker.as_mut()?;
        let Some(step) = taker.next_step() else {
            if !taker.is_over() || self.taker_closed {
                return None;
            }
            self.taker_closed = true;
            return Some(());
        };
        match step {
            TakerStep::Send(message) => {
                self.half_written = false;
                self.taker_writes(now, message);
            }
            TakerStep::Offered => self.offered = true,
            TakerStep::TryLock => {
                let in_flight = self.to_taker.contains(&Sent::Commit);
                let is_free = !self.giver_has_lock && !in_flight;
                self.taker_has_lock |= is_free;
                // Only as long as a process lives is it too late: see the limit's documentation.
                let late = if self.giver.is_some() { now + HOUR } else { now };
                self.taker.as_mut()?.on_lock(late, is_free);
            }
            TakerStep::Serve => self.taker_accepts = true,
            TakerStep::Confirmed(_) => self.taker_has_lock = true,
            TakerStep::NotHandedBack(_) => {}
            TakerStep::Stop | TakerStep::Fail(_) => {
                if let TakerStep::Fail(failure) = step {
                    self.gave_up = Some(failure).filter(|_| self.offered);
                }
                self.taker_accepts = false;
                self.taker_has_lock = false;
            }
        }
        Some(())
    }
}
