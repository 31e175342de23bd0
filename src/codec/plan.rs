//! The plan of the next call: the messages that share it, and the place where the last one is cut.

use super::{
    Grouping, SendBuf,
    buffers::PAGE,
    carrier::{Carrier, Plan},
    message::Message,
};
use crate::limits::SCM_MAX_FD;

/// Returns true if `later` may share a call with the messages before it. `before` is
/// [`Grouping::Free`] only if all of those have this grouping.
fn may_join(before: Grouping, later: &Message) -> bool {
    match (before, later.grouping) {
        (Grouping::Free, Grouping::Free) => true,
        (Grouping::Alone, _) | (_, Grouping::Alone) => false,
        _ => later.unsent_fds == 0,
    }
}

impl<F> SendBuf<F> {
    /// Plans the next call: as many of the waiting messages as it takes, with their descriptors.
    /// The plan is empty only if nothing waits.
    ///
    /// # The rule for descriptors
    ///
    /// The kernel attaches the descriptors of a `sendmsg` to its first byte, and sends all of them
    /// even if it takes no more than that byte. So a call carries only descriptors of messages
    /// whose first byte it carries too. It carries at most 253, minus those that are already
    /// `ahead`: a receiver never holds more than 253 descriptors of messages of which it has no
    /// byte.
    ///
    /// If the descriptors of a message do not fit, the message is cut. It keeps one byte for each
    /// further call that its descriptors need.
    ///
    /// # An example
    ///
    /// On a stream, with [`Grouping::Free`], three messages wait, and no descriptor is ahead:
    ///
    /// | message | bytes | descriptors |
    /// |---|---|---|
    /// | A | 10 | 2 |
    /// | B | 8 | 300 |
    /// | C | 20 | 1 |
    ///
    /// 1. A fits: 10 bytes, 2 descriptors.
    /// 2. B gets the 253 - 2 = 251 descriptors that are left in this call. Its other 49 need one
    ///    more call (49 / 253, rounded up), so B keeps one byte and gives 7.
    /// 3. B is cut, so the plan ends: 10 + 7 = 17 bytes and 253 descriptors.
    ///
    /// If the kernel takes all 17 bytes, B is begun and none of its descriptors are ahead. The next
    /// plan is the rest of B (1 byte, 49 descriptors) and C: 21 bytes and 50 descriptors.
    ///
    /// If the kernel takes only 5 bytes, it has sent all 253 descriptors nevertheless. No byte of B
    /// is sent, so its 251 descriptors are ahead. The next plan is the rest of A (5 bytes) and
    /// again 7 bytes of B, with only 253 - 251 = 2 of its descriptors.
    ///
    /// # Why a plan is never empty while something waits
    ///
    /// Let `u` be the number of unsent descriptors of the first message.
    ///
    /// - If the message is begun, `ahead` counts only descriptors of later messages. They are sent
    ///   after all of its own, so `u` is 0 or `ahead` is 0.
    /// - If it is not begun, `ahead` counts only its own descriptors, of which it has at most 253
    ///   for each byte.
    ///
    /// In both cases, the descriptors that this call does not take need fewer bytes than are left.
    pub(crate) fn plan(&mut self, carrier: Carrier) -> Plan {
        // In the usual case only small messages without descriptors wait, and all of them fit.
        let most = match carrier {
            Carrier::Stream => usize::MAX,
            Carrier::Packets { small, .. } => small,
        };
        if let Some(bytes) = self.only_run().filter(|&bytes| bytes <= most) {
            return Plan { bytes, fds: 0 };
        }
        self.end_run();
        let Some(first) = self.messages.front() else { return Plan::default() };

        // The greatest length of a packet of whole messages (`small`), and of a packet that
        // contains only the rest of a message whose length the receiver knows (`large`).
        let (small, large) = match carrier {
            // A large packet has whole pages. Then each packet of a message begins at the same
            // place in a page as the one before, in the memory of both processes, and none begins
            // where copies are slow (`PAGE_START`).
            Carrier::Packets { small, large } if first.grouping != Grouping::Alone => {
                (small, if large < PAGE { large } else { large - large % PAGE })
            }
            // A message in a packet of its own is sent whole. `commit` has checked that it fits.
            _ => (usize::MAX, usize::MAX),
        };
        let is_rest_of_long_message = large < usize::MAX && first.unsent_head == 0;
        let mut room = if is_rest_of_long_message { large.min(first.unsent_bytes) } else { small };
        // The call can't carry more pieces than the kernel takes. Otherwise descriptors of a
        // message might be sent without its first byte.
        room = room.min(self.reachable_bytes());

        let mut plan = Plan::default();
        // The strictest grouping in the call. After a change of codec, messages of both may wait.
        let mut grouping = first.grouping;
        for message in &self.messages {
            let fits_a_packet = message.unsent_bytes <= small;
            if plan.bytes > 0 {
                // May this message share the call with the ones before?
                if !may_join(grouping, message) {
                    break;
                }
                if message.grouping != Grouping::Free {
                    grouping = message.grouping;
                }
                // Cut only a message that is too long for any packet, and not inside its head.
                if message.unsent_bytes > room && (fits_a_packet || room < message.unsent_head) {
                    break;
                }
            }
            // Its descriptors, and the bytes that it keeps for those that do not fit.
            let fds = message.unsent_fds.min(SCM_MAX_FD - self.ahead - plan.fds);
            let keep = (message.unsent_fds - fds).div_ceil(SCM_MAX_FD);
            let (most, head) = (room.min(message.unsent_bytes - keep), message.unsent_head);
            // The receiver copies the bytes that come with the head to the place where it has room
            // for the rest. So send the head alone, unless that takes one packet more. For example,
            // a frame of 8 + 102,400 bytes goes as 8 and 102,400 if `large` is 256 KiB. If `large`
            // is 64 KiB, it goes as 65,600 and 36,808, because 8, 65,536 and 36,864 would be three.
            let packets_after = |first: usize| (message.unsent_bytes - first).div_ceil(large);
            let only_head = !fits_a_packet
                && 0 < head
                && head < most
                && packets_after(head) == packets_after(most);
            let bytes = if only_head { head } else { most };
            if bytes == 0 {
                break;
            }
            plan.bytes += bytes;
            plan.fds += fds;
            room -= bytes;
            // A message that is cut ends the call.
            if bytes < message.unsent_bytes {
                break;
            }
        }
        plan
    }
}
