//! The steps of the simulation.

use crate::handoff::protocol::{FromWorker, RejectReason};

/// One step of the simulation. A `usize` is the number of a peer, except in `Replace`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::handoff::dispatcher::pool) enum Step {
    Dispatch,
    /// A caller wants a slot for a future connection.
    Reserve,
    /// An accept loop waits until any worker has room.
    WaitForAny,
    /// A caller dispatches a connection to its reserved slot.
    DispatchReserved,
    /// A caller stops waiting for a slot, or gives up a reserved one.
    GiveUp,
    /// The dispatcher's task takes all messages from the pool.
    Take(usize),
    /// The socket takes one of these messages.
    Send(usize),
    /// The worker reads one message. If there is a reason, it cannot take an offer.
    Get(usize, Option<RejectReason>),
    /// The application of the worker asks for a connection.
    Ask(usize),
    /// A connection that the application has received ends.
    Finish(usize),
    /// The worker sends one message.
    Answer(usize),
    /// The dispatcher's task reads one message, or the end of the stream.
    Read(usize),
    /// The next timer of the link goes off.
    Timeout(usize),
    /// The worker dies.
    Crash(usize),
    /// The worker stops doing anything.
    Hang(usize),
    /// The socket fails.
    Cut(usize),
    /// Another process reads a message from the worker's socket.
    Steal(usize),
    /// The worker's application drains.
    Drain(usize),
    /// The dispatcher's application removes the worker.
    Remove(usize),
    /// The workers of the default group are replaced by this number of new ones.
    Replace(usize),
    /// Nobody waits for the last replacement any longer.
    Abandon,
    /// The worker sends a message that its book has not produced.
    Lie(usize, FromWorker),
    /// The worker is started again.
    Restart(usize),
}

impl Step {
    /// Returns the number of the peer that takes the step, or `None` if it concerns no single peer.
    pub(in crate::handoff::dispatcher::pool) fn peer(self) -> Option<usize> {
        match self {
            Self::Dispatch
            | Self::Reserve
            | Self::WaitForAny
            | Self::DispatchReserved
            | Self::GiveUp
            | Self::Replace(_)
            | Self::Abandon => None,
            Self::Take(peer)
            | Self::Send(peer)
            | Self::Get(peer, _)
            | Self::Ask(peer)
            | Self::Finish(peer)
            | Self::Answer(peer)
            | Self::Read(peer)
            | Self::Timeout(peer)
            | Self::Crash(peer)
            | Self::Hang(peer)
            | Self::Cut(peer)
            | Self::Steal(peer)
            | Self::Drain(peer)
            | Self::Remove(peer)
            | Self::Lie(peer, _)
            | Self::Restart(peer) => Some(peer),
        }
    }
}
