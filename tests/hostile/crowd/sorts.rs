//! The sorts of hostile connections, and the resources that each may take.

use fdwire::SocketKind;
use serde::{Deserialize, Serialize};

use super::{
    attackers::{OWN_ENDS, QUICK_ROUNDS, SENT_OF_PROMISED},
    victim::MAX_QUEUED_FDS,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Sort {
    /// Connects and sends nothing.
    Silent,
    /// Sends a frame byte by byte.
    Drip,
    /// Announces a large frame. Most attackers send nothing of it, and some all but the last byte.
    LargeFrame,
    /// Announces more descriptors than it sends.
    PromisedFds,
    /// Sends as many descriptors as may wait, and no frame that claims them.
    UnclaimedFds,
    /// Sends its own end of the connection in an unfinished frame, and closes its copy.
    OwnEnd,
    /// Sends a slow socket, whose `close` takes an hour, with bytes that are no frame.
    SlowSocket,
    /// The same at the head of 253 descriptors.
    SlowSocketFirst,
    /// Sends slow sockets in frames that the victim drops.
    SlowSocketInFrame,
    /// Sends slow sockets in frames that the victim sends back, and does not receive those.
    SlowSocketEchoed,
    /// Sends a slow socket at the bottom of a nest of Unix sockets.
    Nested,
    /// Sends frames of 253 descriptors as fast as they are received. The victim drops them.
    Flood,
    /// The same, and the victim takes the descriptors and closes them itself.
    FloodTaken,
    /// Sends 253 descriptors with bytes that are no frame.
    BadFlood,
    /// Sends random bytes.
    Garbage,
    /// Sends out-of-band bytes between frames.
    OutOfBand,
    /// Sends packets of no bytes with 253 descriptors.
    EmptyPackets,
    /// Sends frames and never receives the echoes.
    NeverReads,
    /// Connects and closes at once, in a loop.
    ConnectsAndCloses,
    /// Each attacker is of another sort.
    Mix,
}

impl Sort {
    /// All sorts. The mix is the last.
    pub(super) const ALL: [Self; 20] = [
        Self::Silent,
        Self::Drip,
        Self::LargeFrame,
        Self::PromisedFds,
        Self::UnclaimedFds,
        Self::OwnEnd,
        Self::SlowSocket,
        Self::SlowSocketFirst,
        Self::SlowSocketInFrame,
        Self::SlowSocketEchoed,
        Self::Nested,
        Self::Flood,
        Self::FloodTaken,
        Self::BadFlood,
        Self::Garbage,
        Self::OutOfBand,
        Self::EmptyPackets,
        Self::NeverReads,
        Self::ConnectsAndCloses,
        Self::Mix,
    ];

    /// Returns true if a connection of this kind can do it.
    pub(super) fn exists_on(self, kind: SocketKind) -> bool {
        match self {
            Self::OutOfBand => kind == SocketKind::Stream,
            Self::EmptyPackets => kind == SocketKind::SeqPacket,
            _ => true,
        }
    }

    /// Returns true if it sends sockets whose `close` takes an hour.
    pub(super) fn sends_slow_sockets(self) -> bool {
        matches!(
            self,
            Self::SlowSocket
                | Self::SlowSocketFirst
                | Self::SlowSocketInFrame
                | Self::SlowSocketEchoed
                | Self::Nested
                | Self::Mix
        )
    }

    /// Returns the sort of one of the attackers.
    pub(super) fn of_attacker(self, index: usize) -> Self {
        if self == Self::Mix { Self::ALL[index % (Self::ALL.len() - 1)] } else { self }
    }

    /// Returns the most descriptors that the victim may have because of one connection, including
    /// the connection itself.
    pub(super) fn most_fds(self) -> usize {
        let of_peer = match self {
            Self::PromisedFds => SENT_OF_PROMISED,
            Self::UnclaimedFds => MAX_QUEUED_FDS,
            Self::OwnEnd => OWN_ENDS,
            Self::SlowSocket | Self::SlowSocketEchoed | Self::Nested => 1,
            Self::SlowSocketInFrame => 2,
            Self::SlowSocketFirst | Self::EmptyPackets | Self::BadFlood | Self::FloodTaken => 253,
            // The descriptors of a frame, and those that wait to be closed. Nothing is received
            // while more of them wait.
            Self::Flood => 253 + MAX_QUEUED_FDS,
            Self::ConnectsAndCloses => QUICK_ROUNDS - 1, // connections
            _ => 0,
        };
        1 + of_peer
    }

    /// Returns the most bytes that the victim may have because of one connection.
    pub(super) fn most_bytes(self, index: usize) -> usize {
        // A read buffer, a queue for sending, and packets on their way.
        const EACH: usize = 3 * (256 << 10);
        EACH + if self == Self::LargeFrame && fills(index) { LARGE } else { 0 }
    }
}

/// The payload of a large frame: the default limit.
pub(super) const LARGE: usize = 8 << 20;

/// Returns true for the attackers of [`Sort::LargeFrame`] that send all but the last byte.
pub(super) fn fills(index: usize) -> bool {
    index % 16 == 2
}
