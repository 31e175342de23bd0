//! The buffer of messages that wait to be sent.

use std::{collections::VecDeque, num::NonZero};

use bytes::{Bytes, BytesMut};

use super::{
    Grouping,
    message::{Message, OpenPart},
    pieces::{IOV_MAX, Pieces},
};
use crate::send_fd::SendFd;

/// Shared bytes of at least this length are sent without a copy. Shorter ones are cheaper to copy
/// than to pass as a piece of their own.
pub(super) const SHARE_FROM: usize = 2048;

/// A buffer of messages that wait to be sent: their bytes and their descriptors.
///
/// An [`Encoder`](super::Encoder) appends to it. Each call of [`encode`](super::Encoder::encode)
/// appends one message, which may have several [parts](Self::end_part).
#[derive(Debug)]
pub struct SendBuf<F = SendFd> {
    /// The bytes that wait.
    pub(super) bytes: Pieces,
    /// The descriptors that wait, in the order of the messages to which they belong.
    pub(super) fds: VecDeque<F>,
    /// The parts of the finished messages, without the run. Consecutive small ones without
    /// descriptors count as one.
    ///
    /// Invariant: `unsent_fds <= SCM_MAX_FD * unsent_bytes` for each. So there is always a byte for
    /// the descriptors that are left.
    pub(super) messages: VecDeque<Message>,
    /// The number of bytes of `messages`.
    pub(super) message_bytes: usize,
    /// The number of bytes of all finished messages. The bytes above `message_bytes` are the run:
    /// small messages without descriptors, which `plan` counts as one message. Finishing one more
    /// of them only changes this number.
    pub(super) finished_bytes: usize,
    /// The number of descriptors of all finished messages. The bytes and descriptors above these
    /// two numbers are the open message, which an encoder is writing.
    pub(super) finished_fds: usize,
    /// The grouping of all messages of the run. Never `Alone`.
    pub(super) run_grouping: Grouping,
    /// `Some(run_grouping)` if the three fields below have the values of a new message, otherwise
    /// `None`. So `commit` has to check only this field for a small message.
    pub(super) plain_run: Option<Grouping>,
    /// The parts of the open message that have ended.
    pub(super) open_parts: Vec<OpenPart>,
    /// One more than the number of bytes after which the receiver knows the length of the open
    /// part. `None` if the length was not announced.
    pub(super) open_head: Option<NonZero<usize>>,
    /// An upper bound of the pieces of the open part, without the tail.
    pub(super) open_pieces: usize,
    /// The number of sent descriptors of messages whose first byte is not sent. At most
    /// `SCM_MAX_FD`.
    pub(super) ahead: usize,
    /// The greatest length of a packet. `None` on a stream.
    pub(super) max_packet_bytes: Option<usize>,
}

impl<F> SendBuf<F> {
    /// Returns an empty buffer.
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

    /// Appends a copy of `bytes`. With [`BufMut`](bytes::BufMut) in scope, numbers can be appended
    /// too.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        self.bytes.tail().extend_from_slice(bytes);
    }

    /// Returns the end of the buffer, for appending copies. The caller may only append.
    #[inline]
    pub(crate) fn tail(&mut self) -> &mut Vec<u8> {
        self.bytes.tail()
    }

    /// Appends copies of both with one check for room, for short messages.
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

    /// Attaches a descriptor to the message, or to the [part](Self::end_part) of it that is being
    /// written. The place of this call among those that append bytes makes no difference: the
    /// [`Grouping`] decides to which byte the descriptor is attached.
    pub fn put_fd(&mut self, fd: impl Into<F>) {
        self.put_fds([fd]);
    }

    /// Attaches descriptors to the message, or to the part of it, in their order.
    pub fn put_fds(&mut self, fds: impl IntoIterator<Item = impl Into<F>>) {
        // Usually there is one descriptor, for which `VecDeque::extend` would take longer.
        fds.into_iter().for_each(|fd| self.fds.push_back(fd.into()));
    }

    /// Ends a part of the message. Descriptors that were attached before this call belong to the
    /// bytes that were written before it. Those that are attached later belong to the bytes that
    /// are written later. The end of the message ends its last part. A part without bytes and
    /// descriptors is ignored.
    ///
    /// Use it for protocols in which one message has descriptors at several places, for example a
    /// request that is followed by a byte for each descriptor. The parts of a message stay
    /// together: no other message comes between them, and if the encoder fails, no part is sent.
    ///
    /// For a receiver, each part is like a message:
    ///
    /// - The [grouping](super::Codec::grouping) applies to parts as it does to messages. With
    ///   [`FdsFirst`](Grouping::FdsFirst) the descriptors of each part come with that part's first
    ///   byte and in a separate `sendmsg`. With [`Alone`](Grouping::Alone) each part has its own
    ///   call, and on SEQPACKET its own packet. With [`Free`](Grouping::Free), a receiver should
    ///   not rely on parts.
    /// - A part needs a byte for each 253 of its descriptors. Otherwise the whole message is
    ///   refused with [`Error::TooManyFdsForLength`](crate::Error::TooManyFdsForLength).
    /// - [`announce_length`](Self::announce_length) applies to the part that is being written.
    ///
    /// ```
    /// use fdwire::codec::SendBuf;
    ///
    /// /// A request, followed by a byte for each of its descriptors, as OpenSSH expects them.
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

    /// Returns the number of bytes and descriptors before the part that is being written.
    pub(super) fn part_start(&self) -> (usize, usize) {
        match self.open_parts.last() {
            Some(part) => (part.end_bytes, part.end_fds),
            None => (self.finished_bytes, self.finished_fds),
        }
    }

    /// Declares that a receiver knows the length of the message when it has the bytes that were
    /// written so far. Then the receiver has room for the rest, because it implements
    /// [`Decoder::missing_bytes`](super::Decoder::missing_bytes). So large messages are sent in
    /// packets of more than 65,600 bytes. A receiver without `missing_bytes` would lose their ends.
    ///
    /// In a message of several [parts](Self::end_part), this applies to the part that is being
    /// written. A call at the beginning of a part declares that the receiver knows the length of
    /// the part from the parts before it.
    pub fn announce_length(&mut self) {
        let head = self.len() - self.part_start().0;
        self.plain_run = None;
        self.open_head =
            if head > 0 || !self.open_parts.is_empty() { NonZero::new(head + 1) } else { None };
    }

    /// Cancels all calls of [`announce_length`](Self::announce_length) for the open message.
    pub(crate) fn withdraw_announcements(&mut self) {
        self.open_head = None;
        self.open_parts.iter_mut().for_each(|part| part.head = None);
    }

    /// Returns the greatest length of a packet on the socket. `None` on a stream. Messages with
    /// [`Grouping::Alone`], or their [parts](Self::end_part), can't be longer.
    pub fn max_packet_bytes(&self) -> Option<usize> {
        self.max_packet_bytes
    }

    pub(crate) fn set_max_packet_bytes(&mut self, bytes: Option<usize>) {
        self.max_packet_bytes = bytes;
    }

    /// Returns the number of bytes that wait.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns true if no bytes wait. Descriptors of finished messages never wait without bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of descriptors that wait.
    pub fn fd_count(&self) -> usize {
        self.fds.len()
    }

    /// Takes the waiting bytes and descriptors out.
    pub fn into_parts(self) -> (BytesMut, Vec<F>) {
        let mut bytes = BytesMut::with_capacity(self.len());
        self.bytes.iter().for_each(|piece| bytes.extend_from_slice(piece));
        (bytes, self.fds.into())
    }

    /// Takes the waiting descriptors out and drops the bytes. Sockets that you then drop are closed
    /// in the calling thread.
    pub fn into_fds(self) -> Vec<F> {
        self.fds.into()
    }
}

impl<F> Default for SendBuf<F> {
    fn default() -> Self {
        Self::new()
    }
}
