//! The sizes of a message that waits to be sent.

use std::num::NonZero;

use super::Grouping;
use crate::{error::Error, limits::SCM_MAX_FD};

/// The limit of a run, and of a message in a run, in bytes. Both are shorter than this.
pub(super) const RUN_BELOW: usize = 32 << 10;

/// The end of a part of the open message, in bytes and descriptors of the buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenPart {
    pub(super) end_bytes: usize,
    pub(super) end_fds: usize,
    /// The head, as in [`SendBuf::open_head`](super::SendBuf::open_head).
    pub(super) head: Option<NonZero<usize>>,
}

/// The unsent rest of a message, or of a part of one.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Message {
    pub(super) unsent_bytes: usize,
    pub(super) unsent_fds: usize,
    pub(super) sent_fds: usize,
    /// The number of unsent bytes after which the receiver knows the length of the message.
    pub(super) unsent_head: usize,
    /// True if the first byte has been sent.
    pub(super) begun: bool,
    pub(super) grouping: Grouping,
}

impl Message {
    /// Returns true if a run of this length and grouping may become a part of this message, which
    /// must be a run itself.
    pub(super) fn takes_run(&self, bytes: usize, grouping: Grouping) -> bool {
        let has_fds = self.unsent_fds > 0 || self.sent_fds > 0;
        let is_short = self.unsent_bytes + bytes < RUN_BELOW;
        is_short && !has_fds && self.grouping == grouping && !self.begun
    }

    /// Checks that the calls for this message can carry its descriptors. If it has to be one
    /// packet, also checks that it fits.
    pub(super) fn check(&self, max_packet_bytes: Option<usize>) -> Result<(), Error> {
        let (bytes, fds) = (self.unsent_bytes, self.unsent_fds);
        if fds > SCM_MAX_FD.saturating_mul(bytes) {
            return Err(Error::TooManyFdsForLength { fds, bytes });
        }
        if let (Grouping::Alone, Some(limit)) = (self.grouping, max_packet_bytes) {
            if bytes > limit {
                return Err(Error::FrameTooLong { bytes, limit });
            }
            if fds > SCM_MAX_FD {
                return Err(Error::TooManyFds { fds, limit: SCM_MAX_FD });
            }
        }
        Ok(())
    }
}
