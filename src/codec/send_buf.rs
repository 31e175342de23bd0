use std::{collections::VecDeque, io::IoSlice, os::fd::OwnedFd};

use bytes::{Buf, Bytes, BytesMut};
use smallvec::SmallVec;

use super::{Grouping, Plan};
use crate::{Error, limits::SCM_MAX_FD};

/// Shared bytes from this length on go out from where they are; shorter ones are cheaper to copy than to point at.
const SHARE_FROM: usize = 2048;

/// Most pieces of one `sendmsg`: one more makes it fail with `EMSGSIZE`.
const IOV_MAX: usize = 1024;

/// Messages shorter than this are put together, up to twice this length.
const MERGED_BELOW: usize = 16 << 10;

/// Messages that wait to be sent: their bytes, and the descriptors that they carry.
///
/// An [`Encoder`](super::Encoder) appends to it. Each call of [`encode`](super::Encoder::encode) is one message.
#[derive(Debug)]
pub struct SendBuf<F = OwnedFd> {
    /// Bytes that wait: `segments`, then `tail`.
    segments: VecDeque<Bytes>,
    tail: BytesMut,
    bytes: usize,
    /// Descriptors that wait, those of all messages in one row.
    fds: VecDeque<F>,
    /// `bytes` and `fds` cut into messages; small ones without descriptors in a row count as one. The sums of both fields
    /// over all messages are `bytes` and `fds.len()`, and each message has `unsent_fds <= SCM_MAX_FD * unsent_bytes`: what is
    /// left always finds bytes to ride on.
    pub(super) messages: VecDeque<Message>,
    /// The message that an encoder is writing; belongs to `bytes` and `fds` already, to `messages` not yet.
    open: Message,
    /// In how many segments it is at most, the tail aside.
    open_segments: usize,
    /// Descriptors already sent of messages whose first byte is not. At most `SCM_MAX_FD`.
    pub(super) ahead: usize,
    /// What a packet holds at most; `None` on a stream.
    max_packet_bytes: Option<usize>,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Message {
    pub(super) unsent_bytes: usize,
    pub(super) unsent_fds: usize,
    sent_fds: usize,
    /// Of the unsent bytes, those without which the receiver does not know the message's length.
    pub(super) unsent_head: usize,
    /// Whether the first byte has been sent.
    pub(super) begun: bool,
    pub(super) grouping: Grouping,
}

impl Message {
    /// Whether a small message without descriptors that follows may count as a part of this one, which is such a one too.
    fn takes_small(&self) -> bool {
        let has_fds = self.unsent_fds > 0 || self.sent_fds > 0;
        self.unsent_bytes < MERGED_BELOW && !has_fds && self.grouping == Grouping::Free && !self.begun
    }
}

impl<F> SendBuf<F> {
    /// An empty buffer.
    pub fn new() -> Self {
        Self {
            segments: VecDeque::new(),
            tail: BytesMut::new(),
            bytes: 0,
            fds: VecDeque::new(),
            messages: VecDeque::new(),
            open: Message::default(),
            open_segments: 0,
            ahead: 0,
            max_packet_bytes: None,
        }
    }

    /// Appends a copy of `bytes`.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.bytes += bytes.len();
        self.open.unsent_bytes += bytes.len();
    }

    /// Appends `bytes`, without copying them if they are long.
    #[inline]
    pub fn put_bytes(&mut self, bytes: Bytes) {
        // A packet is one call, and a call takes no more pieces than this.
        if bytes.len() < SHARE_FROM || self.open_segments + 2 >= IOV_MAX {
            return self.put_slice(&bytes);
        }
        self.open_segments += 2;
        self.bytes += bytes.len();
        self.open.unsent_bytes += bytes.len();
        if !self.tail.is_empty() {
            self.segments.push_back(self.tail.split().freeze());
        }
        self.segments.push_back(bytes);
    }

    /// Attaches a descriptor to the message. Between which of its bytes this is done makes no difference:
    /// [`Grouping`] decides where it goes.
    pub fn put_fd(&mut self, fd: F) {
        self.put_fds([fd]);
    }

    /// Attaches descriptors to the message, in their order.
    pub fn put_fds(&mut self, fds: impl IntoIterator<Item = F>) {
        for fd in fds {
            self.fds.push_back(fd);
            self.open.unsent_fds += 1;
        }
    }

    /// Says that a receiver which has the message's bytes up to here knows its length, and so has room for the rest
    /// whatever the size of the packets it comes in ([`Decoder::missing_bytes`](super::Decoder::missing_bytes)).
    /// Large messages then go in packets of more than 65,600 bytes, which a receiver without `missing_bytes` would lose.
    pub fn announce_length(&mut self) {
        self.open.unsent_head = self.open.unsent_bytes;
    }

    #[cfg(test)]
    pub(crate) fn withdraw_announcement(&mut self) {
        self.open.unsent_head = 0;
    }

    /// Most bytes of a packet that the socket takes; `None` on a stream. Messages of a codec that asks for
    /// [`Grouping::Alone`] cannot be longer.
    pub fn max_packet_bytes(&self) -> Option<usize> {
        self.max_packet_bytes
    }

    pub(crate) fn set_max_packet_bytes(&mut self, bytes: Option<usize>) {
        self.max_packet_bytes = bytes;
    }

    /// Number of bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits. Descriptors never wait without bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Number of descriptors that wait.
    pub fn fd_count(&self) -> usize {
        self.fds.len()
    }

    /// Takes the waiting bytes and descriptors out.
    pub fn into_parts(mut self) -> (BytesMut, Vec<F>) {
        let mut bytes = BytesMut::with_capacity(self.bytes);
        self.segments.drain(..).for_each(|segment| bytes.extend_from_slice(&segment));
        bytes.extend_from_slice(&self.tail);
        (bytes, self.fds.into())
    }

    /// Takes the waiting descriptors out, and drops the bytes.
    pub fn into_fds(self) -> Vec<F> {
        self.fds.into()
    }

    /// Ends the message that was being written. A message of nothing at all vanishes.
    ///
    /// # Errors
    /// When no send can carry it. The message is still open then, for [`roll_back`](Self::roll_back).
    #[inline]
    pub(crate) fn commit(&mut self, grouping: Grouping) -> Result<(), Error> {
        let Message { unsent_bytes: bytes, unsent_fds: fds, unsent_head: head, .. } = self.open;
        if fds > SCM_MAX_FD.saturating_mul(bytes) {
            return Err(Error::TooManyFdsForLength { fds, bytes });
        }
        if let (Grouping::Alone, Some(limit)) = (grouping, self.max_packet_bytes) {
            if bytes > limit {
                return Err(Error::FrameTooLong { bytes, limit });
            }
            if fds > SCM_MAX_FD {
                return Err(Error::TooManyFds { fds, limit: SCM_MAX_FD });
            }
        }
        self.open = Message::default();
        self.open_segments = 0;
        let is_small = bytes < MERGED_BELOW && fds == 0 && grouping == Grouping::Free;
        match self.messages.back_mut() {
            _ if bytes == 0 => {}
            Some(last) if is_small && last.takes_small() => {
                last.unsent_bytes += bytes;
                last.unsent_head = last.unsent_bytes;
            }
            _ => {
                let unsent_head = if head == 0 { bytes } else { head }; // 0: never announced
                let (unsent_bytes, unsent_fds) = (bytes, fds);
                self.messages.push_back(Message {
                    unsent_bytes,
                    unsent_fds,
                    unsent_head,
                    grouping,
                    ..Message::default()
                });
            }
        }
        Ok(())
    }

    /// Takes out what was written since the last message ended. Returns its descriptors.
    pub(crate) fn roll_back(&mut self) -> Vec<F> {
        self.open_segments = 0;
        let open = std::mem::take(&mut self.open);
        self.bytes -= open.unsent_bytes;
        let mut surplus = open.unsent_bytes;
        let in_tail = surplus.min(self.tail.len());
        self.tail.truncate(self.tail.len() - in_tail);
        surplus -= in_tail;
        while surplus > 0 {
            let last = self.segments.back_mut().expect("segments hold all bytes but the tail's");
            let cut = surplus.min(last.len());
            last.truncate(last.len() - cut);
            surplus -= cut;
            if last.is_empty() {
                self.segments.pop_back();
            }
        }
        self.fds.split_off(self.fds.len() - open.unsent_fds).into()
    }

    /// Moves all messages of `later` behind those of this buffer. Nothing of them may have been sent.
    pub(crate) fn append(&mut self, later: &mut Self) {
        debug_assert!(later.ahead == 0 && later.messages.front().is_none_or(|message| !message.begun));
        debug_assert!([&self.open, &later.open].iter().all(|open| open.unsent_bytes == 0 && open.unsent_fds == 0));
        if !self.tail.is_empty() {
            self.segments.push_back(self.tail.split().freeze());
        }
        self.segments.append(&mut later.segments);
        self.tail = std::mem::take(&mut later.tail);
        self.bytes += std::mem::take(&mut later.bytes);
        self.fds.append(&mut later.fds);
        self.messages.append(&mut later.messages);
    }

    /// The first `limit` bytes that wait, as far as `IOV_MAX` pieces reach.
    pub(crate) fn io_slices(&self, mut limit: usize) -> SmallVec<[IoSlice<'_>; 8]> {
        let mut slices = SmallVec::new();
        for piece in self.pieces() {
            if limit == 0 {
                break;
            }
            let piece = &piece[..limit.min(piece.len())];
            limit -= piece.len();
            slices.push(IoSlice::new(piece));
        }
        slices
    }

    /// The bytes that wait, in at most `IOV_MAX` pieces.
    pub(super) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().map(|segment| &segment[..]).chain([&self.tail[..]]).take(IOV_MAX)
    }

    /// The first `count` descriptors that wait.
    pub(crate) fn first_fds(&self, count: usize) -> impl ExactSizeIterator<Item = &F> + Clone {
        self.fds.range(..count)
    }

    /// Removes what a send took: `bytes` of them, which may be fewer than planned, and all descriptors of the plan,
    /// which went with the first byte however short the write was. Returns those descriptors.
    pub(crate) fn sent(&mut self, plan: Plan, bytes: usize) -> impl Iterator<Item = F> {
        debug_assert!(0 < bytes && bytes <= plan.bytes);
        self.attribute_sent_fds(plan.fds);
        let mut left = bytes;
        while left > 0 {
            let message = self.messages.front_mut().expect("messages hold all bytes");
            if !message.begun {
                message.begun = true;
                self.ahead -= message.sent_fds;
            }
            let of_this = left.min(message.unsent_bytes);
            left -= of_this;
            message.unsent_bytes -= of_this;
            message.unsent_head = message.unsent_head.saturating_sub(of_this);
            if message.unsent_bytes == 0 {
                self.messages.pop_front();
            }
        }
        self.remove_bytes(bytes);
        self.fds.drain(..plan.fds)
    }

    fn attribute_sent_fds(&mut self, mut fds: usize) {
        for message in &mut self.messages {
            if fds == 0 {
                break;
            }
            let of_this = fds.min(message.unsent_fds);
            fds -= of_this;
            message.unsent_fds -= of_this;
            message.sent_fds += of_this;
            if !message.begun {
                self.ahead += of_this;
            }
        }
    }

    fn remove_bytes(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(first) = self.segments.front_mut() {
            let of_this = count.min(first.len());
            first.advance(of_this);
            count -= of_this;
            if !first.is_empty() {
                return;
            }
            self.segments.pop_front();
        }
        self.tail.advance(count);
    }
}

impl<F> Default for SendBuf<F> {
    fn default() -> Self {
        Self::new()
    }
}
