//! The limits of a connection.

use std::time::Duration;

/// The greatest number of descriptors that one `sendmsg` takes: `SCM_MAX_FD` of Linux, see unix(7).
pub(crate) const SCM_MAX_FD: usize = 253;

/// The limits of a connection, for each direction. [`UidLimits`](crate::socket::UidLimits) limits
/// all connections of one uid together.
///
/// [`FrameCodec`](crate::FrameCodec) checks its limits before memory is reserved. A codec of your
/// own has to do that itself: see [`Codec::limits`](crate::codec::Codec::limits).
///
/// ```
/// use fdwire::{FrameCodec, Limits};
///
/// let limits = Limits::default().max_payload_bytes(64 << 20).max_fds_per_frame(1000);
/// let codec = FrameCodec::new(limits);
/// # let _ = codec;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The length of a frame's payload in bytes, sent or received. Default: 8 MiB. The wire format
    /// allows no more than 4 GiB - 1.
    pub max_payload_bytes: usize,

    /// The number of descriptors of a frame, sent or received. Default: 253. The wire format allows
    /// no more than 65,535.
    pub max_fds_per_frame: usize,

    /// The number of descriptors that may wait: received before the message that claims them, or
    /// accepted for sending. Default: 506.
    ///
    /// A sender of this crate sends at most 253 descriptors before the first byte of their frame.
    /// So a receiver holds at most [`max_fds_per_frame`](Self#structfield.max_fds_per_frame) + 253
    /// of them. If this limit is smaller, a frame with many descriptors may end the connection with
    /// [`Error::UnclaimedFds`](crate::Error::UnclaimedFds).
    pub max_queued_fds: usize,

    /// The number of bytes accepted for sending at which a sink begins to wait. Default: 256 KiB.
    ///
    /// A sink accepts an item while less than this is queued, so the last item may exceed the
    /// limit.
    pub max_queued_bytes: usize,

    /// The longest time to wait for the rest of a message. Default: 30 s.
    ///
    /// The time begins when there is nothing more to receive, although part of a message has
    /// arrived, or a descriptor that no message has claimed. Time in which the receiver is not
    /// polled does not count. When the time is over, the stream ends with
    /// [`Error::Unfinished`](crate::Error::Unfinished).
    ///
    /// Without this limit, a peer could keep a connection open forever by sending its own end of
    /// the connection in a message that it never finishes: the connection would wait for itself.
    pub max_unfinished_time: Duration,
}

impl Default for Limits {
    /// 8 MiB of payload and 253 descriptors a frame; 506 descriptors and 256 KiB queued; 30 s for
    /// the rest of a message.
    fn default() -> Self {
        Self {
            max_payload_bytes: 8 << 20,
            max_fds_per_frame: SCM_MAX_FD,
            max_queued_fds: 2 * SCM_MAX_FD,
            max_queued_bytes: 256 << 10,
            max_unfinished_time: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// Returns the limits with another [`max_payload_bytes`](Self#structfield.max_payload_bytes).
    #[must_use]
    pub const fn max_payload_bytes(mut self, bytes: usize) -> Self {
        self.max_payload_bytes = bytes;
        self
    }

    /// Returns the limits with another [`max_fds_per_frame`](Self#structfield.max_fds_per_frame).
    /// Raises [`max_queued_fds`](Self#structfield.max_queued_fds) to this number + 253 if it is
    /// less.
    ///
    /// Connections that a listener has accepted also need so much room in
    /// [`UidLimits::max_fds`](crate::socket::UidLimits#structfield.max_fds).
    #[must_use]
    pub const fn max_fds_per_frame(mut self, fds: usize) -> Self {
        self.max_fds_per_frame = fds;
        let queued = fds.saturating_add(SCM_MAX_FD);
        if self.max_queued_fds < queued {
            self.max_queued_fds = queued;
        }
        self
    }

    /// Returns the limits with another [`max_queued_fds`](Self#structfield.max_queued_fds).
    #[must_use]
    pub const fn max_queued_fds(mut self, fds: usize) -> Self {
        self.max_queued_fds = fds;
        self
    }

    /// Returns the limits with another [`max_queued_bytes`](Self#structfield.max_queued_bytes).
    #[must_use]
    pub const fn max_queued_bytes(mut self, bytes: usize) -> Self {
        self.max_queued_bytes = bytes;
        self
    }

    /// Returns the limits with another
    /// [`max_unfinished_time`](Self#structfield.max_unfinished_time). [`Duration::MAX`] means no
    /// limit.
    #[must_use]
    pub const fn max_unfinished_time(mut self, time: Duration) -> Self {
        self.max_unfinished_time = time;
        self
    }

    /// Returns true if one more message may be accepted while this many bytes and descriptors wait
    /// to be sent.
    #[inline]
    pub(crate) fn leave_room_beside(&self, bytes: usize, fds: usize) -> bool {
        bytes < self.max_queued_bytes.max(1) && fds < self.max_queued_fds.max(1)
    }
}
