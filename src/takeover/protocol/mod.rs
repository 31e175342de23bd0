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

/// The lowest version of the protocol that this crate speaks.
pub const LOWEST_VERSION: u8 = 1;

/// The highest version of the protocol that this crate speaks.
pub const HIGHEST_VERSION: u8 = 1;

/// A range of versions of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::takeover) struct Versions {
    pub(in crate::takeover) lowest: u8,
    pub(in crate::takeover) highest: u8,
}

/// The longest payload of a message in bytes. It also limits application state and batons.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The greatest number of descriptors in one message.
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
    /// The taker does not use this listener. Sent only before [`Ready`](Self::Ready).
    Decline {
        /// The number of the listener in the order of the announcements, from 0.
        number: u32,
    },
    /// The taker accepts connections from the moment at which this is written in full.
    Ready,
    /// A request that the giver serve again. The taker goes on accepting until the answer.
    HandBack {
        /// The baton of the application.
        baton: Bytes,
    },
    /// The giver never needs to serve again: it gives up its copies of the listeners.
    Release,
    /// The first message of a process that only requests a [`ToTaker::Status`].
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
    /// The giver refuses a takeover now. Nothing follows.
    Refused {
        /// The reason.
        reason: Refusal,
    },
    /// A part of the listeners, in their order.
    Listeners(Vec<Offered<F>>),
    /// A part of the application's state.
    State {
        /// Bytes of the application.
        bytes: Bytes,
        /// Descriptors of the application.
        fds: Fds<F>,
    },
    /// The taker's generation, and lanes to processes that still have connections on a UDP socket.
    /// One or more of these messages come between [`Welcome`](Self::Welcome) and
    /// [`Complete`](Self::Complete).
    Lanes {
        /// The generation of the taker: its number among all processes.
        generation: u32,
        /// The generation of the giver.
        giver: u32,
        /// The lanes.
        lanes: Vec<Lane<F>>,
    },
    /// The processes that were replaced and still run, the oldest first. The giver itself is the
    /// last.
    Generations {
        /// The time for which each process has been replaced, in milliseconds. 0 for the giver.
        replaced_for: Vec<u64>,
        /// The leash of each process: a socket whose other end is open as long as that process
        /// drains. A byte that is written to it asks the process to leave.
        fds: Fds<F>,
    },
    /// A part of what a dispatcher passes on with its workers. Comes between
    /// [`Welcome`](Self::Welcome) and [`Complete`](Self::Complete).
    Workers {
        /// Bytes of the [hand-off](crate::handoff::Dispatcher::prepare_succession).
        bytes: Bytes,
        /// New links of the workers, and handles of their processes.
        fds: Fds<F>,
    },
    /// All listeners and all state were sent. The taker may send [`FromTaker::Ready`].
    Complete,
    /// The takeover is called off: the giver goes on serving, and no [`FromTaker::Ready`] can reach
    /// it. Nothing follows.
    Aborted {
        /// The reason.
        reason: AbortReason,
    },
    /// Locks of the paths to which listeners are bound. Sent after [`FromTaker::Ready`].
    Locks {
        /// One lock for each listener with a [path](Offered::path_id), in their order.
        fds: Fds<F>,
    },
    /// The takeover is confirmed: the giver has read [`FromTaker::Ready`] and has stopped
    /// accepting.
    Commit {
        /// The baton of the application.
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
        /// The process id of the giver, in its PID namespace.
        pid: u32,
        /// True while a takeover is under way.
        takeover_in_progress: bool,
        /// The processes that were replaced and still run, the oldest first: the process id, or 0
        /// if it is not known, and the time in milliseconds for which it has been replaced.
        generations: Vec<(u32, u64)>,
    },
}

/// A listener that is offered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Offered<F = OwnedFd> {
    /// The identity of the listener.
    pub identity: Identity,
    /// `SO_COOKIE` of the socket: a number that all copies of one socket share, and no other socket
    /// has.
    pub cookie: u64,
    /// Device and inode of the path, if the giver may remove it. That right moves to the taker.
    pub path_id: Option<(u64, u64)>,
    /// The socket.
    pub fd: F,
}

/// A lane to another process: a Unix socket of kind SEQPACKET that carries datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Lane<F = OwnedFd> {
    /// The number of the UDP socket in the order of the announcements, from 0.
    pub listener: u32,
    /// The generation of the process that receives at the other end.
    pub generation: u32,
    /// This end of the lane.
    pub fd: F,
}

impl<F> Offered<F> {
    /// Returns the same with another descriptor.
    pub fn with_fd<G>(self, fd: impl FnOnce(F) -> G) -> Offered<G> {
        let Self { identity, cookie, path_id, fd: old } = self;
        Offered { identity, cookie, path_id, fd: fd(old) }
    }
}

impl<F> Lane<F> {
    /// Returns the same with another descriptor.
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

/// Divides items that have one descriptor each over as few messages as possible.
pub(in crate::takeover) fn in_messages<T>(mut items: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    std::iter::from_fn(move || {
        let rest = items.split_off(items.len().min(MAX_MESSAGE_FDS));
        Some(std::mem::replace(&mut items, rest)).filter(|message| !message.is_empty())
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
            Self::Busy => "another process is taking over from it",
            Self::Version => "it speaks no version of the protocol that this process speaks",
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
