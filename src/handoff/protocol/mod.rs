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

/// The only version of the protocol that this crate supports.
pub const VERSION: u8 = 1;

/// The longest payload of a frame in bytes. It limits an offer: its prefix, its metadata, and its
/// addresses together.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The most descriptors of an offer: the one of the connection, and those of its bundle.
pub const MAX_OFFER_FDS: usize = 16;

/// The most unanswered offers of a worker, even if it asks for more. One `sendmsg` takes the same
/// number of descriptors (`SCM_MAX_FD`, unix(7)).
pub const MAX_UNANSWERED: u64 = 253;

/// A message of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FromWorker {
    /// The worker's first message: the versions that it supports.
    Hello {
        /// The lowest version.
        lowest: u8,
        /// The highest version.
        highest: u8,
        /// The most descriptors of an offer that the worker takes, at least 1.
        max_fds: u8,
        /// The number of connections that were adopted at earlier links and have not ended. `None`
        /// if the worker does not support [`ToWorker::Move`].
        open: Option<u64>,
    },
    /// The worker takes this many offers in total, counted from the beginning of the link. The
    /// number is 0 at first, and falls only after a [refusal](self#refusals).
    Demand {
        /// The number of offers.
        total: u64,
    },
    /// The worker adopts the next unanswered offers, in the order of their numbers.
    Adopted {
        /// The number of the first offer that this message answers. It equals the number of offers
        /// that the worker has answered before.
        first: u64,
        /// The number of offers that this message answers.
        count: u32,
    },
    /// The worker rejects the next unanswered offers, in the order of their numbers.
    Rejected {
        /// The number of the first offer, as in [`Adopted`](Self::Adopted).
        first: u64,
        /// The number of offers that this message answers.
        count: u32,
        /// The reason for the rejection.
        reason: RejectReason,
    },
    /// This many adopted connections have ended since the beginning of this link, including those
    /// that were open then. The number never falls.
    Load {
        /// The number of connections.
        finished: u64,
    },
    /// The answer to a [`ToWorker::Ping`].
    Pong {
        /// The number from the ping.
        nonce: u64,
    },
    /// The worker takes no more offers.
    Draining,
    /// All adopted connections of the worker have ended. No message follows.
    Goodbye,
}

/// The reason why a worker rejects an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectReason {
    /// The worker has no room, usually because it has too few descriptors left.
    Full,
    /// The worker takes no more connections.
    Draining,
    /// The dispatcher has recalled the offer.
    Recalled,
    /// The descriptor is not a connection of the transport that the offer names.
    Unusable,
    /// A reason of a later revision of the protocol. It counts as [`Full`](Self::Full).
    Other(u8),
}

/// A message of a dispatcher. `O` is the type of an offered connection, and `L` that of a new link.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ToWorker<O = Offer, L = NewLink> {
    /// The dispatcher's first message, sent after the worker's [`FromWorker::Hello`].
    Welcome {
        /// The version of all messages that follow, in both directions.
        version: u8,
    },
    /// The dispatcher offers a connection.
    Offer {
        /// The number of offers before this one.
        number: u64,
        /// The connection.
        offer: O,
    },
    /// The worker has to reject all unanswered offers with a lower number at once.
    Recall {
        /// The number of the first offer that is not recalled.
        before: u64,
    },
    /// The worker has to answer with a [`FromWorker::Pong`] at once.
    Ping {
        /// The number to repeat in the answer.
        nonce: u64,
    },
    /// The worker has to take no more offers, to finish the connections that it has adopted, and
    /// then to send [`FromWorker::Goodbye`].
    Drain {
        /// The time that the worker has for that, or `None` without a limit. It is sent in whole
        /// milliseconds, at most `u32::MAX - 1`.
        within: Option<Duration>,
    },
    /// The dispatcher has fenced the worker, and takes no more answers. No message follows.
    Fenced,
    /// The worker has to [go on at another socket](self#moves). This link stays open, without
    /// further offers.
    Move(L),
}

impl<O, L> ToWorker<O, L> {
    /// Replaces the offered connection by another value.
    pub fn map<P>(self, offer: impl FnOnce(O) -> P) -> ToWorker<P, L> {
        self.map_both(offer, |link| link)
    }

    /// Replaces the offered connection and the new link by other values.
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

/// The worker's end of a new link, to the dispatcher that the worker moves to.
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
    /// The address of the client.
    pub peer: Address,
    /// The address that the client has connected to.
    pub local: Address,
    /// The bytes that were already read from the socket. They come before those that it still has.
    pub prefix: Bytes,
    /// The metadata from the dispatcher's application.
    pub metadata: Bytes,
    /// The socket.
    pub fd: F,
    /// Further descriptors that belong to the connection, adopted or rejected together with it.
    /// Their meaning is up to the applications, which can describe it in the metadata.
    pub bundle: Vec<F>,
}

impl<F> Offer<F> {
    /// Returns the descriptors of the offer, the socket first.
    pub(super) fn fds(&self) -> impl Iterator<Item = &F> {
        [&self.fd].into_iter().chain(&self.bundle)
    }

    /// Takes the descriptors out of the offer, the socket first.
    pub(super) fn into_fds(self) -> impl Iterator<Item = F> {
        [self.fd].into_iter().chain(self.bundle)
    }
}
