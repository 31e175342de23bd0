use super::{
    Grouping, SendBuf,
    buffers::{PAGE, SMALL_PACKET},
    messages::Message,
};
use crate::limits::SCM_MAX_FD;

/// What one `sendmsg` is to carry: the first `bytes` that wait, and the first `fds`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) bytes: usize,
    pub(crate) fds: usize,
}

/// What a send may put into one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// A byte stream: any number of bytes.
    Stream,
    /// Packets. A receiver that knows how much of a message is missing has room for that; otherwise
    /// it has room for `small` bytes, and is sent no more.
    Packets {
        /// Most bytes of any packet.
        small: usize,
        /// Most bytes of a packet that holds only the rest of one message whose length the receiver
        /// knows.
        large: usize,
    },
}

/// Most bytes of a packet that any socket takes.
pub(super) const LARGEST_PACKET: usize = 4_263_616;

/// Most bytes of a packet that a socket with a send buffer of this size takes (`SO_SNDBUF`): 32
/// less, and never more than [`LARGEST_PACKET`].
pub(crate) fn largest_packet(send_buffer_bytes: usize) -> usize {
    send_buffer_bytes.saturating_sub(32).clamp(Carrier::SMALLEST, LARGEST_PACKET)
}

impl Carrier {
    /// Packets on a socket with a send buffer of this size (`SO_SNDBUF`): a quarter of it, or
    /// `small`. Above a quarter the kernel does not say that there is room; so while the receiver
    /// copies such packets, a sender copies the next ones, where larger packets have each wait for
    /// the other.
    pub(crate) fn packets(send_buffer_bytes: usize) -> Self {
        let most = largest_packet(send_buffer_bytes);
        let small = SMALL_PACKET.min(most);
        Self::Packets { small, large: (send_buffer_bytes / 4).clamp(small, most) }
    }

    /// The same with packets of half of `bytes` at most, after the kernel had no memory for one of
    /// `bytes`: it has to be in one piece. Not below 2 KiB.
    pub(crate) fn smaller_than(self, bytes: usize) -> Self {
        self.limited_to((bytes / 2).max(Self::SMALLEST))
    }

    /// The same with packets of twice the size, up to those of `largest`.
    pub(crate) fn larger(self, largest: Self) -> Self {
        match self {
            Self::Stream => self,
            Self::Packets { large, .. } => largest.limited_to(2 * large),
        }
    }

    fn limited_to(self, bytes: usize) -> Self {
        match self {
            Self::Stream => self,
            Self::Packets { small, large } => Self::Packets { small: small.min(bytes), large: large.min(bytes) },
        }
    }

    const SMALLEST: usize = 2048;
}

/// Returns true if `later` may go out in a call with messages before it. `before` is
/// [`Grouping::Free`] only if all of them are.
fn may_join(before: Grouping, later: &Message) -> bool {
    match (before, later.grouping) {
        (Grouping::Free, Grouping::Free) => true,
        (Grouping::Alone, _) | (_, Grouping::Alone) => false,
        _ => later.unsent_fds == 0,
    }
}

impl<F> SendBuf<F> {
    /// The next send: as many waiting messages as one call takes, their descriptors with them.
    /// Empty only if nothing waits.
    ///
    /// Descriptors attach to the first byte of a `sendmsg`, even when a short write takes no more
    /// than that byte. So it carries those of messages whose first byte is in it, at most 253, and
    /// fewer by those `ahead`: a receiver never holds more than 253 descriptors of messages it has
    /// seen nothing of. A message whose descriptors do not all fit is cut, and keeps a byte for
    /// each further send that they need.
    ///
    /// Always takes at least a byte. Let the first message have `u` unsent descriptors. If it is
    /// begun, `ahead` counts only descriptors of later messages, and those go after all of its own:
    /// either `u = 0` or `ahead = 0`. If it is not, `ahead` is what was sent of its own `n <= 253 *
    /// bytes`. Either way `u` less this send's share needs a byte less than the message has left.
    pub(crate) fn plan(&mut self, carrier: Carrier) -> Plan {
        let most = match carrier {
            Carrier::Stream => usize::MAX,
            Carrier::Packets { small, .. } => small,
        };
        if let Some(bytes) = self.only_run().filter(|&bytes| bytes <= most) {
            return Plan { bytes, fds: 0 };
        }
        self.end_run();
        let Some(first) = self.messages.front() else { return Plan::default() };
        let (small, large) = match carrier {
            // Whole pages: each packet of a message begins where the one before it began in a page,
            // in the sender's memory and in the receiver's, and none strays to where copies are
            // slow ([`PAGE_START`](super::buffers::PAGE_START)).
            Carrier::Packets { small, large } if first.grouping != Grouping::Alone => {
                (small, if large < PAGE { large } else { large - large % PAGE })
            }
            // A message that has a packet to itself goes whole. `commit` has seen to it that it
            // fits.
            _ => (usize::MAX, usize::MAX),
        };
        let rest_of_long_message = large < usize::MAX && first.unsent_head == 0;
        let mut room = if rest_of_long_message { large.min(first.unsent_bytes) } else { small };
        // Only as many bytes as there are pieces for, or what is cut off would lose its
        // descriptors' place.
        room = room.min(self.reachable_bytes());

        let mut plan = Plan::default();
        // The strictest grouping in the call. After a change of codec, messages of several wait.
        let mut grouping = first.grouping;
        for message in &self.messages {
            let fits_a_packet = message.unsent_bytes <= small;
            if plan.bytes > 0 {
                if !may_join(grouping, message) {
                    break;
                }
                if message.grouping != Grouping::Free {
                    grouping = message.grouping;
                }
                if message.unsent_bytes > room && (fits_a_packet || room < message.unsent_head) {
                    break; // cut only what is too long for a packet, and not inside its head
                }
            }
            let fds = message.unsent_fds.min(SCM_MAX_FD - self.ahead - plan.fds);
            let keep = (message.unsent_fds - fds).div_ceil(SCM_MAX_FD);
            let (most, head) = (room.min(message.unsent_bytes - keep), message.unsent_head);
            // The receiver copies what comes with the head to where it has room for the rest. Let
            // that be the head alone, unless the rest takes a packet more then.
            let packets_after = |first: usize| (message.unsent_bytes - first).div_ceil(large);
            let only_head = !fits_a_packet && 0 < head && head < most && packets_after(head) == packets_after(most);
            let bytes = if only_head { head } else { most };
            if bytes == 0 {
                break;
            }
            plan.bytes += bytes;
            plan.fds += fds;
            room -= bytes;
            if bytes < message.unsent_bytes {
                break;
            }
        }
        plan
    }
}
