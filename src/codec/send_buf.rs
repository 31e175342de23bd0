use std::{collections::VecDeque, io::IoSlice, mem, num::NonZero};

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use super::{
    Encoder, Grouping, Plan,
    pieces::{IOV_MAX, Pieces},
};
use crate::{Error, SendError, limits::SCM_MAX_FD, send_fd::SendFd};

/// Shared bytes from this length on go out from where they are; shorter ones are cheaper to copy than to point at.
pub(super) const SHARE_FROM: usize = 2048;

/// A run of messages, or one message in it, is shorter than this.
const RUN_BELOW: usize = 32 << 10;

/// Messages that wait to be sent: their bytes, and the descriptors that they carry.
///
/// An [`Encoder`](super::Encoder) appends to it. Each call of [`encode`](super::Encoder::encode) is one message, which may
/// have several [parts](Self::end_part).
#[derive(Debug)]
pub struct SendBuf<F = SendFd> {
    /// Bytes that wait.
    bytes: Pieces,
    /// Descriptors that wait, in the order of the messages that they belong to.
    fds: VecDeque<F>,
    /// The parts of the finished messages, without the run. Small ones without descriptors that follow each
    /// other count as one. Each has `unsent_fds <= SCM_MAX_FD * unsent_bytes`: there is always a byte that
    /// the descriptors which are left can go with.
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
    /// The grouping of all messages of the run. Never `Alone`.
    run_grouping: Grouping,
    /// The same, as long as the three fields below are as at the beginning of a message. One look at it is enough then.
    plain_run: Option<Grouping>,
    /// The parts of the open message that have ended.
    open_parts: Vec<OpenPart>,
    /// Number of bytes of the open part up to which the receiver needs it to know its length, plus one. `None`: never
    /// announced.
    open_head: Option<NonZero<usize>>,
    /// Most pieces of the open part, without the tail.
    open_pieces: usize,
    /// Descriptors already sent of messages whose first byte is not. At most `SCM_MAX_FD`.
    pub(super) ahead: usize,
    /// What a packet holds at most; `None` on a stream.
    max_packet_bytes: Option<usize>,
}

/// A part of a message that is not finished: where it ends, in bytes and descriptors of the buffer.
#[derive(Debug, Clone, Copy)]
struct OpenPart {
    end_bytes: usize,
    end_fds: usize,
    /// As in [`SendBuf::open_head`].
    head: Option<NonZero<usize>>,
}

/// A message that waits, or a part of one.
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
    /// Returns true if a run of this length and grouping may become a part of this message, which must be one too.
    fn takes_run(&self, bytes: usize, grouping: Grouping) -> bool {
        let has_fds = self.unsent_fds > 0 || self.sent_fds > 0;
        let is_short = self.unsent_bytes + bytes < RUN_BELOW;
        is_short && !has_fds && self.grouping == grouping && !self.begun
    }

    /// Checks that calls can carry it.
    fn check(&self, max_packet_bytes: Option<usize>) -> Result<(), Error> {
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

impl<F> SendBuf<F> {
    /// An empty buffer.
    pub fn new() -> Self {
        Self {
            bytes: Pieces::default(),
            fds: VecDeque::new(),
            messages: VecDeque::new(),
            message_bytes: 0,
            finished_bytes: 0,
            finished_fds: 0,
            run_grouping: Grouping::Free,
            plain_run: Some(Grouping::Free),
            open_parts: Vec::new(),
            open_head: None,
            open_pieces: 0,
            ahead: 0,
            max_packet_bytes: None,
        }
    }

    /// Appends a copy of `bytes`. With [`BufMut`](bytes::BufMut) in scope, numbers can be appended too.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        self.bytes.tail().extend_from_slice(bytes);
    }

    /// Where bytes are appended. Nothing may be taken out of it.
    #[inline]
    pub(crate) fn tail(&mut self) -> &mut Vec<u8> {
        self.bytes.tail()
    }

    /// Appends copies of both, with one check for room. For short messages.
    #[inline]
    pub(super) fn put_header_and_payload(&mut self, header: [u8; 8], payload: &[u8]) {
        let tail = self.bytes.tail();
        tail.reserve(header.len() + payload.len());
        tail.extend_from_slice(&header);
        tail.extend_from_slice(payload);
    }

    /// Appends `bytes`, without copying them if they are long.
    #[inline]
    pub fn put_shared(&mut self, bytes: Bytes) {
        // A packet is one call, and a call takes no more pieces than this.
        if bytes.len() < SHARE_FROM || self.open_pieces + 2 >= IOV_MAX {
            return self.put_slice(&bytes);
        }
        self.open_pieces += 2;
        self.plain_run = None;
        self.bytes.push_shared(bytes);
    }

    /// Attaches a descriptor to the message, or to the [part](Self::end_part) of it that is being written. Between which of its
    /// bytes this is done makes no difference: [`Grouping`] decides where it goes.
    pub fn put_fd(&mut self, fd: impl Into<F>) {
        self.put_fds([fd]);
    }

    /// Attaches descriptors to the message, or to the part of it, in their order.
    pub fn put_fds(&mut self, fds: impl IntoIterator<Item = impl Into<F>>) {
        // One by one: usually there is one, for which `VecDeque::extend` takes longer.
        fds.into_iter().for_each(|fd| self.fds.push_back(fd.into()));
    }

    /// Ends a part of the message. Descriptors attached before belong to the bytes written before, those attached
    /// after it to the bytes written after it. The end of the message ends its last part. A part without bytes and
    /// descriptors is none.
    ///
    /// For protocols in which one message has descriptors at several places, for example a request that is followed
    /// by a byte for each descriptor. The parts of a message stay together: no other task's message comes between them, and if
    /// the encoder fails, nothing of any part is sent.
    ///
    /// To a receiver, each part looks like a message:
    ///
    /// - The [grouping](super::Codec::grouping) holds between parts as it does between messages. With
    ///   [`FdsFirst`](Grouping::FdsFirst) the descriptors of each part come with that part's first byte and in a `sendmsg` of
    ///   their own. With [`Alone`](Grouping::Alone) each part is a call, and on SEQPACKET a packet, to itself. With
    ///   [`Free`](Grouping::Free) a part makes no difference that a receiver should rely on.
    /// - A part needs a byte for each 253 of its descriptors. Otherwise the whole message is refused with
    ///   [`Error::TooManyFdsForLength`].
    /// - [`announce_length`](Self::announce_length) is about the part that is being written.
    ///
    /// ```
    /// use fdwire::SendBuf;
    ///
    /// /// A request and its answer's place, each with a descriptor of its own, as OpenSSH wants them.
    /// fn encode(request: &[u8], fds: [i32; 2], dst: &mut SendBuf<i32>) {
    ///     dst.put_slice(request);
    ///     for fd in fds {
    ///         dst.end_part();
    ///         dst.put_slice(&[0]);
    ///         dst.put_fd(fd);
    ///     }
    /// }
    /// # let mut dst = SendBuf::new();
    /// # encode(b"request", [7, 8], &mut dst);
    /// # assert_eq!((dst.len(), dst.fd_count()), (9, 2));
    /// ```
    pub fn end_part(&mut self) {
        let (bytes, fds) = self.part_start();
        let (end_bytes, end_fds) = (self.len(), self.fds.len());
        if (end_bytes, end_fds) != (bytes, fds) {
            self.open_parts.push(OpenPart { end_bytes, end_fds, head: self.open_head });
            self.plain_run = None;
        }
        (self.open_head, self.open_pieces) = (None, 0);
    }

    /// The number of bytes and descriptors in front of the part that is being written.
    fn part_start(&self) -> (usize, usize) {
        match self.open_parts.last() {
            Some(part) => (part.end_bytes, part.end_fds),
            None => (self.finished_bytes, self.finished_fds),
        }
    }

    /// Declares that a receiver which has the message's bytes up to here knows its length, and so has room for the rest
    /// whatever the size of the packets it comes in ([`Decoder::missing_bytes`](super::Decoder::missing_bytes)).
    /// Large messages then go in packets of more than 65,600 bytes, which a receiver without `missing_bytes` would lose.
    ///
    /// In a message of several [parts](Self::end_part), this is about the part that is being written. At its beginning, it
    /// declares that the parts before it tell its length.
    pub fn announce_length(&mut self) {
        let head = self.len() - self.part_start().0;
        self.plain_run = None;
        self.open_head = if head > 0 || !self.open_parts.is_empty() { NonZero::new(head + 1) } else { None };
    }

    #[cfg(test)]
    pub(crate) fn withdraw_announcement(&mut self) {
        self.open_head = None;
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
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits. Descriptors never wait without bytes.
    #[inline]
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
        self.bytes.iter().for_each(|piece| bytes.extend_from_slice(piece));
        (bytes, self.fds.into())
    }

    /// Takes the waiting descriptors out, and drops the bytes. If they are dropped one by one, sockets are closed on the spot.
    pub fn into_fds(self) -> Vec<F> {
        self.fds.into()
    }

    /// Appends one message. If the encoder fails or panics, nothing of the message is left here, and `discard` gets its
    /// descriptors.
    #[inline(always)]
    pub(crate) fn encode_with<E: Encoder<I, F>, I>(
        &mut self,
        encoder: &mut E,
        item: I,
        discard: fn(Vec<F>),
    ) -> Result<(), SendError<I, E::Error>> {
        let open = OpenMessage { buf: self, discard };
        encoder.encode(item, open.buf)?;
        open.buf.commit(encoder.grouping()).map_err(|error| SendError::from(E::Error::from(error)))?;
        mem::forget(open);
        Ok(())
    }

    /// Ends the message that was being written. A message of nothing at all vanishes.
    ///
    /// # Errors
    /// When no send can carry it. The message is still open then, for [`roll_back`](Self::roll_back).
    #[inline]
    pub(crate) fn commit(&mut self, grouping: Grouping) -> Result<(), Error> {
        if self.plain_run == Some(grouping) && self.run_takes_message() {
            self.finished_bytes = self.len();
            return Ok(());
        }
        self.commit_any(grouping)
    }

    /// Returns true if the open message may join the run, in case it has the same grouping.
    #[inline]
    fn run_takes_message(&self) -> bool {
        self.len() - self.message_bytes < RUN_BELOW && self.fds.len() == self.finished_fds
    }

    /// The same for any message.
    #[inline(never)] // so that `commit` is short
    fn commit_any(&mut self, grouping: Grouping) -> Result<(), Error> {
        if grouping == self.run_grouping && self.run_takes_message() {
            // Parts without descriptors may share a call, as messages do.
            self.finished_bytes = self.len();
            self.begin_message();
            return Ok(());
        }
        self.end_part();
        for index in 0..self.open_parts.len() {
            self.open_part(index, grouping).check(self.max_packet_bytes)?;
        }
        self.end_run();
        if grouping != Grouping::Alone {
            self.run_grouping = grouping;
        }
        for index in 0..self.open_parts.len() {
            self.messages.push_back(self.open_part(index, grouping));
        }
        if let Some(last) = self.open_parts.last() {
            self.message_bytes = last.end_bytes;
            (self.finished_bytes, self.finished_fds) = (last.end_bytes, last.end_fds);
        }
        self.begin_message();
        Ok(())
    }

    fn begin_message(&mut self) {
        self.open_parts.clear();
        (self.open_head, self.open_pieces) = (None, 0);
        self.plain_run = Some(self.run_grouping);
    }

    /// A part of the open message, which nothing has been finished of yet, as a message of its own.
    fn open_part(&self, index: usize, grouping: Grouping) -> Message {
        let OpenPart { end_bytes, end_fds, head } = self.open_parts[index];
        let (start_bytes, start_fds) = match index.checked_sub(1) {
            Some(before) => (self.open_parts[before].end_bytes, self.open_parts[before].end_fds),
            None => (self.finished_bytes, self.finished_fds),
        };
        let bytes = end_bytes - start_bytes;
        Message {
            unsent_bytes: bytes,
            unsent_fds: end_fds - start_fds,
            unsent_head: head.map_or(bytes, |head| head.get() - 1),
            grouping,
            ..Message::default()
        }
    }

    /// Number of bytes of the run if nothing else waits, and one call has pieces enough for it.
    #[inline]
    pub(super) fn only_run(&self) -> Option<usize> {
        (self.messages.is_empty() && self.bytes.fit_one_call()).then_some(self.finished_bytes)
    }

    /// Counts the run among `messages`: as a part of the last one if that is such a run too, short and
    /// not begun.
    pub(super) fn end_run(&mut self) {
        let (bytes, grouping) = (self.finished_bytes - self.message_bytes, self.run_grouping);
        if bytes == 0 {
            return;
        }
        match self.messages.back_mut() {
            Some(last) if last.takes_run(bytes, grouping) => {
                last.unsent_bytes += bytes;
                last.unsent_head = last.unsent_bytes;
            }
            _ => self.messages.push_back(Message {
                unsent_bytes: bytes,
                unsent_head: bytes,
                grouping,
                ..Message::default()
            }),
        }
        self.message_bytes = self.finished_bytes;
    }

    /// Takes out what was written since the last message ended, in all its parts. Returns its descriptors.
    pub(crate) fn roll_back(&mut self) -> Vec<F> {
        self.begin_message();
        self.bytes.remove_last(self.len() - self.finished_bytes); // shared bytes are of one message
        self.fds.split_off(self.finished_fds).into()
    }

    /// Moves all messages of `later` behind those of this buffer. Nothing of them may have been sent.
    pub(crate) fn append(&mut self, later: &mut Self) {
        debug_assert!(later.ahead == 0 && later.messages.front().is_none_or(|message| !message.begun));
        debug_assert!([&*self, &*later].iter().all(|buf| buf.has_no_open_message()));
        self.end_run();
        later.end_run();
        self.bytes.append(&mut later.bytes);
        self.fds.append(&mut later.fds);
        self.messages.append(&mut later.messages);
        self.message_bytes += mem::take(&mut later.message_bytes);
        self.finished_bytes += mem::take(&mut later.finished_bytes);
        self.finished_fds += mem::take(&mut later.finished_fds);
    }

    fn has_no_open_message(&self) -> bool {
        self.len() == self.finished_bytes && self.fds.len() == self.finished_fds && self.open_parts.is_empty()
    }

    /// The first `limit` bytes that wait, as far as `IOV_MAX` pieces reach.
    pub(crate) fn io_slices(&self, limit: usize) -> SmallVec<[IoSlice<'_>; 8]> {
        self.bytes.io_slices(limit)
    }

    /// Number of bytes that `IOV_MAX` pieces reach.
    pub(super) fn reachable_bytes(&self) -> usize {
        self.bytes.reachable_bytes()
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
            self.bytes.remove_first(bytes);
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
        self.bytes.remove_first(bytes);
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
}

/// A message that is being written. Takes out of the buffer on drop what was written of it.
struct OpenMessage<'a, F> {
    buf: &'a mut SendBuf<F>,
    discard: fn(Vec<F>),
}

impl<F> Drop for OpenMessage<'_, F> {
    #[cold]
    fn drop(&mut self) {
        (self.discard)(self.buf.roll_back());
    }
}

impl<F> Default for SendBuf<F> {
    fn default() -> Self {
        Self::new()
    }
}
