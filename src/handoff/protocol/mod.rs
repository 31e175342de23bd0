#![doc = include_str!("../protocol.md")]

use std::{os::fd::OwnedFd, time::Duration};

use bytes::Bytes;

pub use super::{Address, Transport};

mod codec;
mod salvage;
#[cfg(test)]
mod tests;
mod wire;

pub(super) use codec::TolerantCodec;
pub use codec::{DispatcherCodec, WorkerCodec};
pub(super) use salvage::SalvagingCodec;

/// The version of the protocol that is spoken here.
pub const VERSION: u8 = 1;

/// Longest payload of a frame in bytes: what bounds the already-read bytes and the metadata of an
/// offer, together with their addresses.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The most descriptors of an offer: the connection's, and those of its bundle.
pub const MAX_OFFER_FDS: usize = 16;

/// The most offers that a worker has unanswered, whatever it asks for: as many descriptors as one
/// `sendmsg` takes.
pub const MAX_UNANSWERED: u64 = 253;

/// A message of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FromWorker {
    /// Its first message: the versions that it speaks.
    Hello {
        /// Lowest version.
        lowest: u8,
        /// Highest version.
        highest: u8,
        /// The most descriptors of an offer that it takes, at least 1.
        max_fds: u8,
        /// The number of adopted connections that have not ended, from links before this one.
        /// `None` if the worker takes no [`ToWorker::Move`].
        open: Option<u64>,
    },
    /// It takes this many offers in all, counted from the beginning. Initially none; falls only
    /// after a [refusal](self#refusals).
    Demand {
        /// Number of offers.
        total: u64,
    },
    /// The next unanswered offers, in the order of their numbers, are its own from here on.
    Adopted {
        /// The running total of its answers before this one, which is the number of the first offer
        /// that this one answers.
        first: u64,
        /// How many offers it answers.
        count: u32,
    },
    /// The next unanswered offers, in the order of their numbers, are not its own.
    Rejected {
        /// The same as in [`Adopted`](Self::Adopted).
        first: u64,
        /// How many offers it answers.
        count: u32,
        /// Why.
        reason: RejectReason,
    },
    /// This many adopted connections have ended in all, on this link, including those that were
    /// open at its beginning. Never falls.
    Load {
        /// Number of connections.
        finished: u64,
    },
    /// Answer to a [`ToWorker::Ping`].
    Pong {
        /// The ping's number.
        nonce: u64,
    },
    /// It takes no more offers.
    Draining,
    /// Its adopted connections have ended. Nothing follows.
    Goodbye,
}

/// Why a worker does not take an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectReason {
    /// It has no room, usually because it has too few descriptors left.
    Full,
    /// It takes no more connections.
    Draining,
    /// The dispatcher has asked for it back.
    Recalled,
    /// The descriptor is not a connection of the transport that the offer names.
    Unusable,
    /// A reason of a later revision of the protocol, which counts as [`Full`](Self::Full).
    Other(u8),
}

/// A message of a dispatcher. `O` is what an offer is about, and `L` a new link.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ToWorker<O = Offer, L = NewLink> {
    /// Its first message, once it has the worker's [`FromWorker::Hello`].
    Welcome {
        /// The version that is spoken from here on.
        version: u8,
    },
    /// A connection.
    Offer {
        /// The number of offers before it.
        number: u64,
        /// The connection.
        offer: O,
    },
    /// Offers with a lower number are to be rejected at once if they are unanswered.
    Recall {
        /// The first number that may stay.
        before: u64,
    },
    /// To be answered at once.
    Ping {
        /// A number to repeat.
        nonce: u64,
    },
    /// Take no more, finish what was adopted, then say [`FromWorker::Goodbye`].
    Drain {
        /// How long that may take; `None` without a limit. Goes out in whole milliseconds, at most
        /// `u32::MAX - 1` of them.
        within: Option<Duration>,
    },
    /// It takes no more answers from this worker. Nothing follows.
    Fenced,
    /// The conversation [goes on at another socket](self#moves). This link stays, without offers.
    Move(L),
}

impl<O, L> ToWorker<O, L> {
    /// Exchanges what an offer is about.
    pub fn map<P>(self, offer: impl FnOnce(O) -> P) -> ToWorker<P, L> {
        self.map_both(offer, |link| link)
    }

    /// Exchanges what an offer is about, and a new link.
    pub(in crate::handoff) fn map_both<P, M>(
        self,
        offer: impl FnOnce(O) -> P,
        link: impl FnOnce(L) -> M,
    ) -> ToWorker<P, M> {
        match self {
            Self::Welcome { version } => ToWorker::Welcome { version },
            Self::Offer { number, offer: before } => {
                ToWorker::Offer { number, offer: offer(before) }
            }
            Self::Recall { before } => ToWorker::Recall { before },
            Self::Ping { nonce } => ToWorker::Ping { nonce },
            Self::Drain { within } => ToWorker::Drain { within },
            Self::Fenced => ToWorker::Fenced,
            Self::Move(before) => ToWorker::Move(link(before)),
        }
    }
}

/// The worker's end of a link to the dispatcher that goes on with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NewLink<F = OwnedFd> {
    /// `SO_COOKIE` of the socket.
    pub cookie: u64,
    /// The socket.
    pub socket: F,
}

/// A connection that is offered to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer<F = OwnedFd> {
    /// `SO_COOKIE` of the socket, which is the same for every copy of it.
    pub cookie: u64,
    /// The kind of socket.
    pub transport: Transport,
    /// Address of the client.
    pub peer: Address,
    /// Address that it has connected to.
    pub local: Address,
    /// The bytes that were already read from it. They come before what the socket still has.
    pub prefix: Bytes,
    /// Metadata from the dispatcher's application.
    pub metadata: Bytes,
    /// The socket.
    pub fd: F,
    /// Further descriptors that belong to the connection, adopted or rejected together with it.
    /// The metadata says what they are: the protocol does not know.
    pub bundle: Vec<F>,
}

impl<F> Offer<F> {
    /// Its descriptors, the socket first.
    pub(super) fn fds(&self) -> impl Iterator<Item = &F> {
        [&self.fd].into_iter().chain(&self.bundle)
    }

    pub(super) fn into_fds(self) -> impl Iterator<Item = F> {
        [self.fd].into_iter().chain(self.bundle)
    }
}
