use std::{collections::VecDeque, io::IoSlice, os::fd::OwnedFd};

use bytes::{Buf, Bytes, BytesMut};
use smallvec::SmallVec;

use super::{Grouping, Plan};
use crate::{Error, limits::SCM_MAX_FD};

/// Shared bytes from this length on go out from where they are; shorter ones are cheaper to copy than to point at.
pub(super) const SHARE_FROM: usize = 2048;

/// Most pieces of one `sendmsg`: one more makes it fail with `EMSGSIZE`.
const IOV_MAX: usize = 1024;

/// A run of messages, or one message in it, is shorter than this.
const RUN_BELOW: usize = 32 << 10;

/// Messages that wait to be sent: their bytes, and the descriptors that they carry.
///
/// An [`Encoder`](super::Encoder) appends to it. Each call of [`encode`](super::Encoder::encode) is one message.
#[derive(Debug)]
pub struct SendBuf<F = OwnedFd> {
    /// Copied bytes that wait, from `copied_start` on. Those before it are sent.
    copied: Vec<u8>,
    copied_start: usize,
    /// Shared bytes that wait, each behind copied ones: the first behind `shared[0].copied_before`
    /// bytes, and so on. The copied bytes from `tail_start` on are behind all of them.
    shared: VecDeque<Shared>,
    tail_start: usize,
    /// Number of bytes that wait, copied and shared ones.
    bytes: usize,
    /// Descriptors that wait, in the order of the messages that they belong to.
    fds: VecDeque<F>,
    /// The finished messages, without the run. Small ones without descriptors that follow each other
    /// count as one. Each message has `unsent_fds <= SCM_MAX_FD * unsent_bytes`: there is always a
    /// byte that the descriptors which are left can go with.
    pub(super) messages: VecDeque<Message>,
    /// Number of bytes of `messages`.
    message_bytes: usize,
    /// Number of bytes of all finished messages. Those above `message_bytes` are the run: small
    /// messages without descriptors, which `plan` counts as one message. To finish one more of them
    /// only changes this number.
    finished_bytes: usize,
    /// Number of descriptors of all finished messages. What is above these two numbers is the open
    /// message, which an encoder is writing.
    finished_fds: usize,
    /// Number of bytes of the open message up to which the receiver needs it to know its length. 0:
    /// never announced.
    open_head: usize,
    /// Most pieces of the open message, without the tail.
    open_pieces: usize,
    /// Descriptors already sent of messages whose first byte is not. At most `SCM_MAX_FD`.
    pub(super) ahead: usize,
    /// What a packet holds at most; `None` on a stream.
    max_packet_bytes: Option<usize>,
}

/// Bytes that are not copied.
#[derive(Debug)]
struct Shared {
    /// Number of copied bytes between the shared ones before and these.
    copied_before: usize,
    bytes: Bytes,
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
    /// Whether a run of this length may become a part of this message, which must be one too.
    fn takes_run(&self, bytes: usize) -> bool {
        let has_fds = self.unsent_fds > 0 || self.sent_fds > 0;
        let is_short = self.unsent_bytes + bytes < RUN_BELOW;
        is_short && !has_fds && self.grouping == Grouping::Free && !self.begun
    }
}

impl<F> SendBuf<F> {
    /// An empty buffer.
    pub fn new() -> Self {
        Self {
            copied: Vec::new(),
            copied_start: 0,
            shared: VecDeque::new(),
            tail_start: 0,
            bytes: 0,
            fds: VecDeque::new(),
            messages: VecDeque::new(),
            message_bytes: 0,
            finished_bytes: 0,
            finished_fds: 0,
            open_head: 0,
            open_pieces: 0,
            ahead: 0,
            max_packet_bytes: None,
        }
    }

    /// Appends a copy of `bytes`.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        self.copied.extend_from_slice(bytes);
        self.bytes += bytes.len();
    }

    /// Appends copies of both, with one check for room. For short messages.
    #[inline]
    pub(super) fn put_header_and_payload(&mut self, header: [u8; 8], payload: &[u8]) {
        self.copied.reserve(header.len() + payload.len());
        self.copied.extend_from_slice(&header);
        self.copied.extend_from_slice(payload);
        self.bytes += header.len() + payload.len();
    }

    /// Appends `bytes`, without copying them if they are long.
    #[inline]
    pub fn put_bytes(&mut self, bytes: Bytes) {
        // A packet is one call, and a call takes no more pieces than this.
        if bytes.len() < SHARE_FROM || self.open_pieces + 2 >= IOV_MAX {
            return self.put_slice(&bytes);
        }
        self.open_pieces += 2;
        self.bytes += bytes.len();
        self.shared.push_back(Shared { copied_before: self.copied.len() - self.tail_start, bytes });
        self.tail_start = self.copied.len();
    }

    /// Attaches a descriptor to the message. Between which of its bytes this is done makes no difference:
    /// [`Grouping`] decides where it goes.
    pub fn put_fd(&mut self, fd: F) {
        self.put_fds([fd]);
    }

    /// Attaches descriptors to the message, in their order.
    pub fn put_fds(&mut self, fds: impl IntoIterator<Item = F>) {
        // One by one: usually there is one, for which `VecDeque::extend` takes longer.
        fds.into_iter().for_each(|fd| self.fds.push_back(fd));
    }

    /// Says that a receiver which has the message's bytes up to here knows its length, and so has room for the rest
    /// whatever the size of the packets it comes in ([`Decoder::missing_bytes`](super::Decoder::missing_bytes)).
    /// Large messages then go in packets of more than 65,600 bytes, which a receiver without `missing_bytes` would lose.
    pub fn announce_length(&mut self) {
        self.open_head = self.len() - self.finished_bytes;
    }

    #[cfg(test)]
    pub(crate) fn withdraw_announcement(&mut self) {
        self.open_head = 0;
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
        self.len() == 0
    }

    /// Number of descriptors that wait.
    pub fn fd_count(&self) -> usize {
        self.fds.len()
    }

    /// Takes the waiting bytes and descriptors out.
    pub fn into_parts(self) -> (BytesMut, Vec<F>) {
        let mut bytes = BytesMut::with_capacity(self.len());
        self.all_pieces().for_each(|piece| bytes.extend_from_slice(piece));
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
        let bytes = self.len();
        let has_fds = self.fds.len() != self.finished_fds;
        if bytes - self.message_bytes >= RUN_BELOW || has_fds || grouping != Grouping::Free {
            return self.commit_apart(grouping);
        }
        self.finished_bytes = bytes;
        (self.open_head, self.open_pieces) = (0, 0);
        Ok(())
    }

    /// The same for a message that the run cannot take.
    #[inline(never)] // so that `commit` is short
    fn commit_apart(&mut self, grouping: Grouping) -> Result<(), Error> {
        let (bytes, fds) = (self.len() - self.finished_bytes, self.fds.len() - self.finished_fds);
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
        self.end_run();
        if bytes > 0 {
            let head = if self.open_head == 0 { bytes } else { self.open_head };
            self.push(Message {
                unsent_bytes: bytes,
                unsent_fds: fds,
                unsent_head: head,
                grouping,
                ..Message::default()
            });
        }
        (self.open_head, self.open_pieces) = (0, 0);
        Ok(())
    }

    /// Number of bytes of the run if nothing else waits, and one call has pieces enough for it.
    #[inline]
    pub(super) fn only_run(&self) -> Option<usize> {
        let has_pieces = self.shared.len() < IOV_MAX / 2;
        (self.messages.is_empty() && has_pieces).then_some(self.finished_bytes)
    }

    /// Counts the run among `messages`: as a part of the last one if that is such a run too, short and
    /// not begun.
    pub(super) fn end_run(&mut self) {
        let bytes = self.finished_bytes - self.message_bytes;
        if bytes == 0 {
            return;
        }
        match self.messages.back_mut() {
            Some(last) if last.takes_run(bytes) => {
                last.unsent_bytes += bytes;
                last.unsent_head = last.unsent_bytes;
                self.message_bytes += bytes;
            }
            _ => self.push(Message { unsent_bytes: bytes, unsent_head: bytes, ..Message::default() }),
        }
    }

    fn push(&mut self, message: Message) {
        self.message_bytes += message.unsent_bytes;
        self.finished_bytes = self.message_bytes;
        self.finished_fds += message.unsent_fds;
        self.messages.push_back(message);
    }

    /// Takes out what was written since the last message ended. Returns its descriptors.
    pub(crate) fn roll_back(&mut self) -> Vec<F> {
        (self.open_head, self.open_pieces) = (0, 0);
        let mut surplus = self.bytes - self.finished_bytes;
        self.bytes = self.finished_bytes;
        loop {
            let in_tail = surplus.min(self.copied.len() - self.tail_start);
            self.copied.truncate(self.copied.len() - in_tail);
            surplus -= in_tail;
            if surplus == 0 {
                break;
            }
            let last = self.shared.pop_back().expect("no other bytes are left");
            self.tail_start -= last.copied_before;
            surplus -= last.bytes.len(); // shared bytes are of one message
        }
        self.fds.split_off(self.finished_fds).into()
    }

    /// Moves all messages of `later` behind those of this buffer. Nothing of them may have been sent.
    pub(crate) fn append(&mut self, later: &mut Self) {
        debug_assert!(later.ahead == 0 && later.messages.front().is_none_or(|message| !message.begun));
        debug_assert!([&*self, &*later].iter().all(|buf| buf.has_no_open_message()));
        if let Some(first) = later.shared.front_mut() {
            first.copied_before += self.copied.len() - self.tail_start;
            self.tail_start = self.copied.len() + later.tail_start - later.copied_start;
        }
        self.copied.extend_from_slice(&later.copied[later.copied_start..]);
        later.copied.clear();
        (later.copied_start, later.tail_start) = (0, 0);
        self.shared.append(&mut later.shared);
        self.bytes += std::mem::take(&mut later.bytes);
        self.fds.append(&mut later.fds);
        self.end_run();
        later.end_run();
        self.messages.append(&mut later.messages);
        self.message_bytes += std::mem::take(&mut later.message_bytes);
        self.finished_bytes += std::mem::take(&mut later.finished_bytes);
        self.finished_fds += std::mem::take(&mut later.finished_fds);
    }

    fn has_no_open_message(&self) -> bool {
        self.len() == self.finished_bytes && self.fds.len() == self.finished_fds
    }

    /// The first `limit` bytes that wait, as far as `IOV_MAX` pieces reach.
    pub(crate) fn io_slices(&self, mut limit: usize) -> SmallVec<[IoSlice<'_>; 8]> {
        let mut slices = SmallVec::new();
        if self.shared.is_empty() {
            let waiting = &self.copied[self.copied_start..];
            slices.push(IoSlice::new(&waiting[..limit.min(waiting.len())]));
            return slices;
        }
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
    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.all_pieces().take(IOV_MAX)
    }

    fn all_pieces(&self) -> impl Iterator<Item = &[u8]> {
        let mut end = self.copied_start;
        let before_tail = self.shared.iter().flat_map(move |shared| {
            let start = end;
            end += shared.copied_before;
            [&self.copied[start..end], &shared.bytes]
        });
        before_tail.chain([&self.copied[self.tail_start..]]).filter(|piece| !piece.is_empty())
    }

    /// Number of bytes that `IOV_MAX` pieces reach.
    pub(super) fn reachable_bytes(&self) -> usize {
        let most_pieces = 2 * self.shared.len() + 1;
        if most_pieces <= IOV_MAX { self.len() } else { self.pieces().map(<[u8]>::len).sum() }
    }

    /// The first `count` descriptors that wait.
    pub(crate) fn first_fds(&self, count: usize) -> impl ExactSizeIterator<Item = &F> + Clone {
        self.fds.range(..count)
    }

    /// Removes what a send took: `bytes` of them, which may be fewer than planned, and all descriptors of the plan,
    /// which went with the first byte however short the write was. Returns those descriptors.
    pub(crate) fn sent(&mut self, plan: Plan, bytes: usize) -> impl Iterator<Item = F> {
        debug_assert!(0 < bytes && bytes <= plan.bytes);
        if self.only_run() == Some(bytes) {
            self.finished_bytes = 0;
            self.remove_bytes(bytes);
            return None.into_iter().flatten();
        }
        self.end_run();
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
        self.message_bytes -= bytes;
        self.finished_bytes -= bytes;
        self.finished_fds -= plan.fds;
        self.remove_bytes(bytes);
        // An empty `Drain` would take longer than all else here.
        (plan.fds > 0).then(|| self.fds.drain(..plan.fds)).into_iter().flatten()
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
        while count > 0
            && let Some(first) = self.shared.front_mut()
        {
            let copied = count.min(first.copied_before);
            first.copied_before -= copied;
            self.copied_start += copied;
            count -= copied;
            let shared = count.min(first.bytes.len());
            first.bytes.advance(shared);
            count -= shared;
            if first.bytes.is_empty() {
                self.shared.pop_front();
            }
        }
        // What is left to remove is at the start of the tail.
        self.copied_start += count;
        self.tail_start = self.tail_start.max(self.copied_start);
        self.remove_sent_copies();
    }

    /// Moves the copied bytes that wait to the front, if they are no more than those that were sent: so
    /// each byte is moved once at most, on average.
    fn remove_sent_copies(&mut self) {
        let sent = self.copied_start;
        if sent >= self.copied.len() - sent {
            self.copied.drain(..sent);
            self.copied_start = 0;
            self.tail_start -= sent;
        }
    }
}

impl<F> Default for SendBuf<F> {
    fn default() -> Self {
        Self::new()
    }
}
