//! The actions that the state machines of both sides return, for their tasks to take.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::protocol::{AbortReason, FromTaker, Refusal};

/// An action that the task of a [`Giver`](super::giver::Giver) has to take next. Actions are taken
/// in the order in which they are returned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum GiverStep {
    /// A takeover is requested: call `welcome` or `refuse`.
    Decide,
    /// Send WELCOME, then the listeners and the state, then call `offered`.
    SendOffer { version: u8 },
    /// Send REFUSED.
    SendRefused(Refusal),
    /// Send STATUS.
    SendStatus,
    /// Send COMPLETE.
    SendComplete,
    /// Shut down the receiving direction, and read on to the end. From then on no READY can be
    /// written, and a READY that was written before is read.
    Cut,
    /// Send ABORTED.
    SendAborted(AbortReason),
    /// Stop accepting. `declined` has the numbers of the listeners that the taker does not use.
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
pub(super) enum Undone {
    /// The new process has ended.
    Ended,
    /// The new process has handed everything back, with its baton.
    HandedBack(Bytes),
}

/// An action that the task of a [`Taker`](super::taker::Taker) has to take next. Actions are taken
/// in the order in which they are returned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum TakerStep {
    /// Send a message. After READY, call `on_ready_written` or `on_send_failed`.
    Send(FromTaker),
    /// The offer is complete: the application can set itself up.
    Offered,
    /// Try to get the lock, and call `on_lock`.
    TryLock,
    /// Accept connections.
    Serve,
    /// Take ownership of everything that the giver had. The baton is `None` if the giver has ended
    /// before it could pass it on, or if it was lost on the way.
    Confirmed(Option<Bytes>),
    /// Go on serving, and keep the baton: the giver can't serve again.
    NotHandedBack(Bytes),
    /// Stop accepting: the giver serves.
    Stop,
    /// Close the connection without writing what is still queued. Nothing was taken over.
    Fail(Failure),
}

/// The reason why nothing was taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    /// The giver has refused the takeover.
    Refused(Refusal),
    /// The giver has called the takeover off.
    Aborted(AbortReason),
    /// The giver has ended before the offer was complete.
    GiverGone,
    /// Another process has the lock of the path.
    AnotherServes,
    /// The giver did not answer in time.
    TimedOut,
    /// The giver has broken the protocol.
    Misbehaved,
}
