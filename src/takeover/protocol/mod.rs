#![doc = include_str!("../protocol.md")]

mod codec;
mod identity;
#[cfg(test)]
mod tests;

use std::{fmt, os::fd::OwnedFd};

use bytes::Bytes;

pub use codec::{GiverCodec, TakerCodec};
pub use identity::{Family, Identity, Kind};

use crate::Fds;
pub use crate::address::Address;

/// The lowest version of the protocol that is spoken here.
pub const LOWEST_VERSION: u8 = 1;

/// The highest version of the protocol that is spoken here.
pub const HIGHEST_VERSION: u8 = 1;

/// A range of versions of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::takeover) struct Versions {
    pub(in crate::takeover) lowest: u8,
    pub(in crate::takeover) highest: u8,
}

/// The longest payload of a message in bytes: limits application state and batons.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Most descriptors of one message.
pub const MAX_MESSAGE_FDS: usize = 253;

/// A message of the taker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FromTaker {
    /// The first message: the versions that the taker speaks.
    Hello {
        /// Lowest version.
        lowest: u8,
        /// Highest version.
        highest: u8,
    },
    /// The taker has no use for this listener. Before [`Ready`](Self::Ready) only.
    Decline {
        /// Number of the listener in the order of the announcements, from 0.
        number: u32,
    },
    /// The taker accepts connections from the moment at which this is written in full.
    Ready,
    /// The taker wants the giver to serve again. It goes on accepting until the answer.
    HandBack {
        /// The application's exclusive thing.
        baton: Bytes,
    },
    /// The giver never needs to serve again: it gives up its copies of the listeners.
    Release,
    /// The first message of a process that only wants a [`ToTaker::Status`].
    Status,
}

/// A message of the giver. `F` is the type of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToTaker<F = OwnedFd> {
    /// The answer to a [`FromTaker::Hello`].
    Welcome {
        /// The version that is spoken from here on.
        version: u8,
        /// Number of listeners that follow.
        listeners: u32,
    },
    /// No takeover now. Nothing follows.
    Refused {
        /// The reason.
        reason: Refusal,
    },
    /// Some listeners, in their order.
    Listeners(Vec<Offered<F>>),
    /// A piece of the application's state.
    State {
        /// Bytes of the application.
        bytes: Bytes,
        /// Descriptors of the application.
        fds: Fds<F>,
    },
    /// The taker's generation, and ways to processes whose connections have their datagrams on a
    /// listener's socket. One or more, between [`Welcome`](Self::Welcome) and
    /// [`Complete`](Self::Complete).
    Lanes {
        /// The number of the taker among all processes.
        generation: u32,
        /// That of the giver.
        giver: u32,
        /// The lanes.
        lanes: Vec<Lane<F>>,
    },
    /// The processes that were replaced and still run, from the oldest to the giver itself.
    Generations {
        /// The time for which each has been replaced, in milliseconds. 0 for the giver.
        replaced_for: Vec<u64>,
        /// A socket of each, whose other end lives as long as that process drains. A byte written
        /// there asks it to leave.
        fds: Fds<F>,
    },
    /// A part of what a dispatcher hands on with its workers. Between [`Welcome`](Self::Welcome)
    /// and [`Complete`](Self::Complete).
    Workers {
        /// Bytes of the [hand-off](crate::handoff::Dispatcher::prepare_succession).
        bytes: Bytes,
        /// Links and processes of the workers.
        fds: Fds<F>,
    },
    /// All listeners and all state were sent. The taker may send [`FromTaker::Ready`].
    Complete,
    /// The giver goes on serving, and no [`FromTaker::Ready`] can reach it. Nothing follows.
    Aborted {
        /// The reason.
        reason: AbortReason,
    },
    /// Locks of the paths that listeners are bound to. After [`FromTaker::Ready`].
    Locks {
        /// One lock for each listener with a [path](Offered::path_id), in their order.
        fds: Fds<F>,
    },
    /// Everything is the taker's: the giver has read [`FromTaker::Ready`] and accepts no more.
    Commit {
        /// The application's exclusive thing.
        baton: Bytes,
        /// The socket at which takeovers are requested, and the lock of its path.
        fds: Fds<F>,
    },
    /// The giver serves again after a [`FromTaker::HandBack`]. Nothing follows.
    Resumed,
    /// The giver has given up its copies and can't serve again. Nothing follows.
    Drained,
    /// The answer to a [`FromTaker::Status`]. Nothing follows.
    Status {
        /// Process id of the giver, in its PID namespace.
        pid: u32,
        /// A takeover is under way.
        is_under_way: bool,
        /// Process id, or 0 if it is not known, and the time for which it has been replaced in
        /// milliseconds, of each process that still runs; the oldest first.
        generations: Vec<(u32, u64)>,
    },
}

/// A listener that is offered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Offered<F = OwnedFd> {
    /// Its identity.
    pub identity: Identity,
    /// `SO_COOKIE` of the socket: the same for all copies of one socket, and of no other.
    pub cookie: u64,
    /// Device and inode of the path, if the giver may remove it: that right moves along.
    pub path_id: Option<(u64, u64)>,
    /// The socket.
    pub fd: F,
}

/// A way to another process: a Unix socket of kind SEQPACKET that carries datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Lane<F = OwnedFd> {
    /// Number of the UDP socket in the order of the announcements, from 0.
    pub listener: u32,
    /// The process that receives at the other end.
    pub generation: u32,
    /// This end.
    pub fd: F,
}

impl<F> Offered<F> {
    /// The same with another descriptor.
    pub fn with_fd<G>(self, fd: impl FnOnce(F) -> G) -> Offered<G> {
        let Self { identity, cookie, path_id, fd: old } = self;
        Offered { identity, cookie, path_id, fd: fd(old) }
    }
}

impl<F> Lane<F> {
    /// The same with another descriptor.
    pub fn with_fd<G>(self, fd: impl FnOnce(F) -> G) -> Lane<G> {
        let Self { listener, generation, fd: old } = self;
        Lane { listener, generation, fd: fd(old) }
    }
}

/// The reason why a giver refuses a takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// Another process is taking over.
    Busy,
    /// The server speaks none of the taker's versions.
    Version,
}

/// The reason why the giver called a takeover off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AbortReason {
    /// The taker was not ready in time.
    TimedOut,
    /// The taker broke the protocol.
    Misbehaved,
    /// The giver's application called it off.
    Withdrawn,
    /// The giver failed to send, for example because it has no descriptor left.
    Failed,
}

/// Divides things that have a descriptor each over as few messages as possible.
pub(in crate::takeover) fn in_messages<T>(mut things: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    std::iter::from_fn(move || {
        let rest = things.split_off(things.len().min(MAX_MESSAGE_FDS));
        Some(std::mem::replace(&mut things, rest)).filter(|message| !message.is_empty())
    })
}

impl Versions {
    /// The versions that this crate speaks.
    pub(in crate::takeover) const OURS: Self =
        Self { lowest: LOWEST_VERSION, highest: HIGHEST_VERSION };

    /// Returns true if a version is in the range.
    pub(in crate::takeover) fn contains(self, version: u8) -> bool {
        (self.lowest..=self.highest).contains(&version)
    }

    /// Returns the highest version that is in both ranges.
    pub(in crate::takeover) fn highest_common(self, other: Self) -> Option<u8> {
        let highest = self.highest.min(other.highest);
        (highest >= self.lowest.max(other.lowest)).then_some(highest)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "another process is taking over from it at the moment",
            Self::Version => "it speaks no version of the protocol that is spoken here",
        })
    }
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TimedOut => "the new process was not ready in time",
            Self::Misbehaved => "the new process broke the protocol",
            Self::Withdrawn => "the running server called it off",
            Self::Failed => "the running server failed to send its listeners",
        })
    }
}
