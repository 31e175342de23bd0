use std::os::fd::OwnedFd;

use bytes::{Buf, BufMut, BytesMut};

use super::{Decoder, FdQueue};
use crate::Error;

/// What arrived and is not decoded yet, and how far the receiving direction has come.
///
/// ```text
///                 decode: message          decode_eof: message
///                   ┌────┐                      ┌────┐
///                   │    ▼                      │    ▼
///            ┌────► Decoding              ┌───► Draining ────► Ended ◄──── any error
///   received │         │ decode: none     │        decode_eof: none
///            │         ▼                  │
///            └────  Receiving ────────────┘
///                                end of stream
/// ```
#[derive(Debug)]
pub(crate) struct Inbound<F = OwnedFd> {
    pub(crate) bytes: BytesMut,
    pub(crate) fds: FdQueue<F>,
    /// What a packet may hold at least, whatever the decoder says; 1 on a stream.
    least_room: usize,
    phase: Phase,
    /// Number of messages decoded.
    decoded: u64,
}

/// What has arrived in part. Both numbers stay the same until it is complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// The number of the message of which some bytes have arrived.
    message: Option<u64>,
    /// The number of the descriptor that has waited longest for its message.
    fd: Option<u64>,
}

impl Unfinished {
    /// The part of this that is the same in `now`.
    fn still_in(self, now: Self) -> Self {
        Self {
            message: self.message.filter(|_| self.message == now.message),
            fd: self.fd.filter(|_| self.fd == now.fd),
        }
    }

    /// Returns what to wait for from now on, and whether the time for it begins now.
    pub(crate) fn update(self, now: Self) -> (Self, bool) {
        match self.still_in(now) {
            Self { message: None, fd: None } => (now, true),
            rest => (rest, false),
        }
    }

    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Decoding,
    Receiving,
    Draining,
    Ended,
}

/// What comes next in the receiving direction.
#[derive(Debug)]
pub(crate) enum Step<T> {
    /// A message.
    Item(T),
    /// Nothing complete: receive into the spare room of `bytes` and into `fds`, then say `received` or
    /// `end_of_stream`.
    Receive,
    /// Nothing will come any more.
    End,
}

/// What a packet holds at most unless it is the rest of a message whose length is known. Also a good size for reads. Above
/// 64 KiB, so that a message of that many bytes and its header are one packet.
pub(crate) const SMALL_PACKET: usize = (64 << 10) + 64;

/// Usual size of a page. Where it is another, some receives are slower and nothing else.
pub(super) const PAGE: usize = 4096;

/// The first bytes of a page, where no buffer is to begin. The kernel keeps data from the start of a page on, and on AMD
/// processors a copy takes up to ten times as long if it goes up to 31 bytes further into a page than it comes from (`rep
/// movsb`, <https://sourceware.org/bugzilla/show_bug.cgi?id=30994>). Large blocks of malloc begin 16 bytes into a page.
pub(super) const PAGE_START: usize = 64;

fn is_page_start(buffer: &BytesMut) -> bool {
    buffer.as_ptr().addr() % PAGE < PAGE_START
}

impl<F> Inbound<F> {
    pub(crate) fn new(packets: bool, bytes: BytesMut, fds: FdQueue<F>) -> Self {
        let least_room = if packets { SMALL_PACKET } else { 1 };
        Self { bytes, fds, least_room, phase: Phase::Decoding, decoded: 0 }
    }

    /// The next message, or what it takes to get one. After an error: the end.
    #[inline(always)]
    pub(crate) fn next<D: Decoder<F>>(&mut self, decoder: &mut D) -> Result<Step<D::Item>, D::Error> {
        loop {
            match self.phase {
                Phase::Decoding => match decoder.decode(&mut self.bytes, &mut self.fds) {
                    Ok(Some(item)) if !self.fds.fell_short() => {
                        self.decoded += 1;
                        return Ok(Step::Item(item));
                    }
                    Ok(None) if !self.fds.is_lost() => {
                        let fds = self.fds.count();
                        if fds > decoder.limits().max_queued_fds {
                            return Err(self.fail(Error::UnclaimedFds { fds }.into()));
                        }
                        self.phase = Phase::Receiving;
                    }
                    Ok(_) => return Err(self.fail(Error::TruncatedControl.into())),
                    Err(error) => return Err(self.fail(error)),
                },
                Phase::Receiving => {
                    let limit = decoder.limits().max_payload_bytes;
                    let missing = decoder.missing_bytes(&self.bytes);
                    match missing {
                        Some(missing) => self.reserve(missing.min(limit), 0),
                        // A new buffer is twice as large, or a long message would be moved for every packet of it.
                        None => self.reserve(SMALL_PACKET, self.bytes.len()),
                    }
                    return Ok(Step::Receive);
                }
                Phase::Draining => match decoder.decode_eof(&mut self.bytes, &mut self.fds) {
                    Ok(Some(item)) => return Ok(Step::Item(item)),
                    Ok(None) => self.phase = Phase::Ended,
                    Err(error) => return Err(self.fail(error)),
                },
                Phase::Ended => return Ok(Step::End),
            }
        }
    }

    /// Bytes or descriptors were added.
    pub(crate) fn received(&mut self) {
        self.phase = Phase::Decoding;
    }

    /// Bytes and descriptors were added, and more descriptors were lost. The kernel loses the last ones, so messages that
    /// need none of them are still good.
    pub(crate) fn received_truncated(&mut self) {
        self.fds.set_lost();
        self.received();
    }

    pub(crate) fn end_of_stream(&mut self) {
        self.phase = Phase::Draining;
    }

    /// What has arrived of messages that are not complete.
    pub(crate) fn unfinished(&self) -> Unfinished {
        Unfinished { message: (!self.bytes.is_empty()).then_some(self.decoded), fd: self.fds.first() }
    }

    /// Gives up the descriptors that no message has claimed.
    pub(crate) fn close_fds(&mut self) {
        self.fds.clear();
    }

    /// Nothing more can be received or decoded.
    pub(crate) fn end(&mut self) {
        self.phase = Phase::Ended;
    }

    /// Makes room for at least `room` more bytes, and in a new buffer for `extra` beside. Messages are sliced off the buffer
    /// and may live on, so a used-up one is left to them; for the rest of a large message the new one is just large enough.
    fn reserve(&mut self, room: usize, extra: usize) {
        const BUFFER: usize = 4 * SMALL_PACKET;
        if self.bytes.capacity() - self.bytes.len() >= room.max(self.least_room) {
            return;
        }
        // Enough for `least_room` to stay when `room` is filled, or the end of a large message would be moved once more.
        let additional = room.saturating_add(PAGE_START + extra + self.least_room);
        if !self.bytes.try_reclaim(additional) {
            let mut fresh = BytesMut::with_capacity(BUFFER.max(self.bytes.len().saturating_add(additional)));
            fresh.extend_from_slice(&self.bytes);
            self.bytes = fresh;
        }
        if is_page_start(&self.bytes) {
            let held = self.bytes.len();
            self.bytes.put_bytes(0, PAGE_START);
            self.bytes.copy_within(..held, PAGE_START);
            self.bytes.advance(PAGE_START);
        }
    }

    /// Ends it with an error, or with the loss of descriptors that may have brought it about.
    fn fail<E: From<Error>>(&mut self, error: E) -> E {
        self.phase = Phase::Ended;
        if self.fds.is_lost() { Error::TruncatedControl.into() } else { error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_buffer_begins_at_the_start_of_a_page() {
        let mut inbound = Inbound::<u32>::new(true, BytesMut::new(), FdQueue::new());
        for room in [SMALL_PACKET, 1 << 20, SMALL_PACKET, 3 << 20, 1, SMALL_PACKET, 1 << 20] {
            inbound.reserve(room, 0);
            assert!(inbound.bytes.capacity() - inbound.bytes.len() >= room);
            assert!(!is_page_start(&inbound.bytes), "{:?} for {room}", inbound.bytes.as_ptr());

            // What is held stays, and a used-up buffer is used again, moved to its beginning.
            inbound.bytes.put_bytes(7, room);
            inbound.bytes.advance(room - 1);
            inbound.reserve(4 * SMALL_PACKET, 0);
            assert_eq!(inbound.bytes, [7][..]);
            inbound.bytes.clear();
        }
    }

    #[test]
    fn large_messages_that_are_not_kept_share_one_buffer() {
        let mut inbound = Inbound::<u32>::new(true, BytesMut::new(), FdQueue::new());
        let mut buffers = std::collections::HashSet::new();
        for _ in 0..10 {
            inbound.reserve(SMALL_PACKET, 0);
            inbound.bytes.put_bytes(1, 8);
            inbound.reserve(1 << 20, 0);
            buffers.insert(inbound.bytes.as_ptr());
            inbound.bytes.put_bytes(2, 1 << 20);
            drop(inbound.bytes.split());
        }
        assert_eq!(buffers.len(), 1);
    }
}
