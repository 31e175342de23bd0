//! The state of the model: two processes, their connection, and the steps that each takes.

use std::time::Instant;

use bytes::Bytes;

use super::HOUR;
use crate::takeover::{
    giver::Giver,
    protocol::{AbortReason, FromTaker, ToTaker},
    steps::{Failure, GiverStep, TakerStep},
    taker::Taker,
};

/// Two processes, the connection between them, and the lock of the path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// `None` once the process is dead.
    pub(super) giver: Option<Giver>,
    /// `None` once the process is dead.
    pub(super) taker: Option<Taker>,
    pub(super) giver_accepts: bool,
    pub(super) taker_accepts: bool,
    pub(super) giver_has_lock: bool,
    pub(super) taker_has_lock: bool,
    /// Messages that were written and not read.
    pub(super) to_giver: Vec<FromTaker>,
    /// Messages that were written and not read.
    pub(super) to_taker: Vec<Sent>,
    /// True if half of READY was written. A stream allows that.
    pub(super) half_written: bool,
    /// True once the giver has shut down its receiving direction.
    pub(super) cut: bool,
    /// True once the giver has closed its end, or has died.
    pub(super) giver_closed: bool,
    /// True once the taker has closed its end, or has died.
    pub(super) taker_closed: bool,
    /// True once a process was killed.
    pub(super) killed: bool,
    /// The reason why the taker has given up after the offer was complete.
    pub(super) gave_up: Option<Failure>,
    /// True once the offer was complete.
    pub(super) offered: bool,
    /// True once the taker has lost COMMIT. It can read nothing more.
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
    /// Returns true if the giver lives and may serve, now or after an undo.
    pub(super) fn giver_may_serve(&self) -> bool {
        self.giver.as_ref().is_some_and(|giver| !giver.is_over() || giver.is_serving())
    }

    /// Returns true if the taker lives and has the whole offer: it serves or is going to.
    pub(super) fn taker_may_serve(&self) -> bool {
        self.taker.as_ref().is_some_and(Taker::has_everything)
    }

    /// Returns true if one of the two is about to stop accepting: it has read the message that
    /// stops it, or this message is being sent.
    pub(super) fn is_at_the_cut(&self) -> bool {
        let ready = self.to_giver.contains(&FromTaker::Ready);
        let giver_will_stop = self.giver.as_ref().is_some_and(|giver| !giver.is_serving());
        let resumed = self.to_taker.contains(&Sent::Resumed);
        let taker_will_stop = self.taker.as_ref().is_some_and(|taker| !taker.is_serving());
        // After HAND_BACK, RESUMED is the giver's next step.
        let giver_will_resume = self.giver.as_ref().is_some_and(|giver| {
            let mut giver = giver.clone();
            std::iter::from_fn(|| giver.next_step()).any(|step| step == GiverStep::SendResumed)
        });
        ready || giver_will_stop || resumed || taker_will_stop || giver_will_resume
    }

    /// Writes a message of the taker in full, or fails if the giver can't read it.
    pub(super) fn taker_writes(&mut self, now: Instant, message: FromTaker) {
        let taker = self.taker.as_mut().expect("the taker lives");
        if self.cut || self.giver_closed {
            return taker.on_send_failed(now);
        }
        if message == FromTaker::Ready {
            taker.on_ready_written();
        }
        self.to_giver.push(message);
    }

    /// Takes the next step of the giver. Returns `None` if there is none.
    pub(super) fn giver_step(&mut self, now: Instant) -> Option<()> {
        let giver = self.giver.as_mut()?;
        let Some(step) = giver.next_step() else {
            // After the last step, the connection is closed.
            if !giver.is_over() || self.giver_closed {
                return None;
            }
            self.giver_closed = true;
            return Some(());
        };
        match step {
            GiverStep::Decide => giver.welcome(now),
            GiverStep::SendOffer { .. } => {
                self.to_taker.push(Sent::Welcome);
                giver.offered(now, 0);
            }
            GiverStep::SendRefused(_) => unreachable!("there is only one taker"),
            GiverStep::SendStatus => unreachable!("nobody requests the status"),
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

    /// Takes the next step of the taker. Returns `None` if there is none.
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
                // A COMMIT that nobody has read contains a copy of the lock.
                let in_flight = self.to_taker.contains(&Sent::Commit);
                let is_free = !self.giver_has_lock && !in_flight;
                self.taker_has_lock |= is_free;
                // The time limit for the lock is over only while its owner lives. The model assumes
                // that the kernel releases the lock of a dead process in time.
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
