//! The limits of a system call, and the type of a plan.

use super::buffers::SMALL_PACKET;

/// The plan for one `sendmsg`: the number of waiting bytes and descriptors that it carries.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) bytes: usize,
    pub(crate) fds: usize,
}

/// The limits of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// A byte stream: any number of bytes.
    Stream,
    /// Packets. If a receiver knows how many bytes of a message are missing, it has room for them.
    /// Otherwise it has room for `small` bytes.
    Packets {
        /// The greatest length of a packet of whole messages.
        small: usize,
        /// The greatest length of a packet that contains only the rest of one message whose length
        /// the receiver knows.
        large: usize,
    },
}

/// The greatest length of a packet on any socket.
pub(super) const LARGEST_PACKET: usize = 4_263_616;

/// Returns the greatest length of a packet on a socket with a send buffer of this size
/// (`SO_SNDBUF`): 32 bytes less, and at most [`LARGEST_PACKET`].
pub(crate) fn largest_packet(send_buffer_bytes: usize) -> usize {
    send_buffer_bytes.saturating_sub(32).clamp(Carrier::SMALLEST, LARGEST_PACKET)
}

impl Carrier {
    /// Returns the limits on a socket with a send buffer of this size (`SO_SNDBUF`). Large packets
    /// are a quarter of it, or `small` if that is more.
    ///
    /// The kernel reports the socket as writable only while less than a quarter of the buffer is in
    /// use. With packets of that size the sender copies the next packet while the receiver copies
    /// this one. With larger packets, each waits for the other.
    pub(crate) fn packets(send_buffer_bytes: usize) -> Self {
        let most = largest_packet(send_buffer_bytes);
        let small = SMALL_PACKET.min(most);
        Self::Packets { small, large: (send_buffer_bytes / 4).clamp(small, most) }
    }

    /// Returns the limits for packets of at most half of `bytes`, and at least 2 KiB. Use it if the
    /// kernel had no contiguous memory for a packet of `bytes`.
    pub(crate) fn smaller_than(self, bytes: usize) -> Self {
        self.limited_to((bytes / 2).max(Self::SMALLEST))
    }

    /// Returns the limits for packets of twice the size, at most those of `largest`.
    pub(crate) fn larger(self, largest: Self) -> Self {
        match self {
            Self::Stream => self,
            Self::Packets { large, .. } => largest.limited_to(2 * large),
        }
    }

    fn limited_to(self, bytes: usize) -> Self {
        match self {
            Self::Stream => self,
            Self::Packets { small, large } => {
                Self::Packets { small: small.min(bytes), large: large.min(bytes) }
            }
        }
    }

    const SMALLEST: usize = 2048;
}
