//! The buffers for received bytes.

use std::mem;

use bytes::{Buf, BufMut, BytesMut};

/// The greatest length of a packet, unless it is the rest of a message whose length is known. It is
/// a little above 64 KiB, so that 64 KiB and a header fit in one packet. It is also a good size for
/// reads.
pub(crate) const SMALL_PACKET: usize = (64 << 10) + 64;

/// The size of a usual buffer, unless a message of middle size needs more.
const USUAL: usize = 4 * SMALL_PACKET;

/// A buffer above this size is for large messages only, because a small message that the user keeps
/// would keep the whole buffer.
const LARGEST_USUAL: usize = 512 << 10;

/// The usual size of a page. If the real size differs, some receives are slower, but everything
/// still works.
pub(super) const PAGE: usize = 4096;

/// The number of bytes at the start of a page in which no buffer may begin. The kernel stores data
/// from the start of a page. On AMD processors a copy takes up to ten times as long if its
/// destination begins up to 31 bytes further into a page than its source (`rep movsb`,
/// <https://sourceware.org/bugzilla/show_bug.cgi?id=30994>). Large blocks of malloc begin 16 bytes
/// into a page, which is such a place.
pub(super) const PAGE_START: usize = 64;

/// Chooses the buffer for received bytes: a usual one, or a large one for a message that does not
/// fit.
///
/// The caller has the received bytes, as `bytes`. Messages are slices of them, and may be kept by
/// the application. When a buffer has no room left, it is used again from its beginning if none of
/// its messages is kept. Otherwise it is left to its messages, and a new one is used.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The smallest room for a receive: a whole packet, or 1 byte on a stream. It holds even if the
    /// decoder needs less.
    least_room: usize,
    /// True if `bytes` is in a large buffer, or in a buffer of unknown size from the application.
    in_large: bool,
    /// The buffer of the other size that was used before. It is empty.
    other: BytesMut,
    /// True if the last message received was a large one.
    after_large: bool,
}

impl Buffers {
    pub(super) fn new(packets: bool, bytes: &BytesMut) -> Self {
        let least_room = if packets { SMALL_PACKET } else { 1 };
        Self {
            least_room,
            in_large: bytes.capacity() > 0,
            other: BytesMut::new(),
            after_large: false,
        }
    }

    /// Makes room for `missing` bytes, which complete a message. Returns the greatest number of
    /// bytes to receive.
    pub(super) fn make_room_for(
        &mut self,
        bytes: &mut BytesMut,
        missing: usize,
        spare: impl FnOnce() -> BytesMut,
    ) -> usize {
        self.reserve(bytes, missing, 0, spare);
        // The messages after a large one should not go into its buffer.
        if self.in_large { missing.saturating_add(self.least_room) } else { usize::MAX }
    }

    /// Makes room for a part of a message of unknown length. Returns the greatest number of bytes
    /// to receive.
    pub(super) fn make_room(
        &mut self,
        bytes: &mut BytesMut,
        spare: impl FnOnce() -> BytesMut,
    ) -> usize {
        // A new buffer is twice as large as what has arrived. Otherwise each packet of a long
        // message would move the whole message to a new buffer.
        self.reserve(bytes, SMALL_PACKET, bytes.len(), spare);
        // After a large message, another one may follow. The part of it that is received before its
        // length is known has to be moved to a large buffer. So receive little of it at first. On
        // SEQPACKET this is not necessary, because the header of a large frame comes alone.
        let is_stream = self.least_room == 1;
        if self.after_large && is_stream { PAGE } else { usize::MAX }
    }

    /// Handles that something was received.
    pub(super) fn received(&mut self) {
        self.after_large = false;
    }

    /// Gives up all empty buffers. Returns the usual one if there is one.
    pub(super) fn release(&mut self, bytes: &mut BytesMut) -> BytesMut {
        let other = mem::take(&mut self.other);
        if !self.in_large {
            return if bytes.is_empty() { mem::take(bytes) } else { BytesMut::new() };
        }
        if bytes.is_empty() {
            *bytes = BytesMut::new();
            (self.in_large, self.after_large) = (false, true);
        }
        other
    }

    /// Makes room for at least `room` more bytes. A new buffer has room for `extra` bytes more. For
    /// the rest of a large message, a new buffer is just large enough.
    fn reserve(
        &mut self,
        bytes: &mut BytesMut,
        room: usize,
        extra: usize,
        spare: impl FnOnce() -> BytesMut,
    ) {
        // A decoder may have made the buffer larger than a usual one.
        self.in_large |= bytes.capacity() > LARGEST_USUAL;
        // Leave `least_room` free even when `room` is filled. Otherwise the end of a large message
        // would be moved once more.
        let additional = room.saturating_add(PAGE_START + extra + self.least_room);
        let size = bytes.len().saturating_add(additional);
        let needs_large = size > LARGEST_USUAL;
        let has_room = bytes.capacity() - bytes.len() >= room.max(self.least_room);
        if has_room && (needs_large || !self.in_large) {
            return;
        }
        // Change to a buffer of the other size, and keep this one for later.
        if needs_large != self.in_large {
            let mut next = mem::take(&mut self.other);
            if !next.try_reclaim(size) {
                next = new_buffer(size, spare);
            }
            next.extend_from_slice(bytes);
            bytes.clear();
            self.other = mem::replace(bytes, next);
            (self.in_large, self.after_large) = (needs_large, self.in_large);
        // Use this buffer again from its beginning, or leave it to its messages.
        } else if !bytes.try_reclaim(additional) {
            let mut next = new_buffer(size, spare);
            next.extend_from_slice(bytes);
            *bytes = next;
        }
        // Move away from the start of a page.
        if is_page_start(bytes) {
            let held = bytes.len();
            bytes.put_bytes(0, PAGE_START);
            bytes.copy_within(..held, PAGE_START);
            bytes.advance(PAGE_START);
        }
    }
}

fn is_page_start(buffer: &BytesMut) -> bool {
    buffer.as_ptr().addr() % PAGE < PAGE_START
}

/// Returns an empty buffer with room for `size` bytes: the spare one, if it has the room and is of
/// the right kind.
fn new_buffer(size: usize, spare: impl FnOnce() -> BytesMut) -> BytesMut {
    if size <= LARGEST_USUAL {
        let mut spare = spare();
        if spare.try_reclaim(size) {
            return spare;
        }
    }
    BytesMut::with_capacity(size.max(USUAL))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const LARGE: usize = 1 << 20;

    /// The buffers of a connection of packets, and the received bytes.
    fn buffers() -> (Buffers, BytesMut) {
        let bytes = BytesMut::new();
        (Buffers::new(true, &bytes), bytes)
    }

    #[test]
    fn no_buffer_begins_at_the_start_of_a_page() {
        let (mut buffers, mut bytes) = buffers();
        for room in [SMALL_PACKET, LARGE, SMALL_PACKET, 3 << 20, 1, SMALL_PACKET, LARGE] {
            buffers.make_room_for(&mut bytes, room, BytesMut::new);
            assert!(bytes.capacity() - bytes.len() >= room);
            assert!(!is_page_start(&bytes), "{:?} for {room}", bytes.as_ptr());

            // Bytes that a message holds stay, and a full buffer is used again from its beginning.
            bytes.put_bytes(7, room);
            bytes.advance(room - 1);
            buffers.make_room_for(&mut bytes, 4 * SMALL_PACKET, BytesMut::new);
            assert_eq!(bytes, [7][..]);
            bytes.clear();
        }
    }

    #[test]
    fn large_messages_that_are_not_kept_share_one_buffer() {
        let (mut buffers, mut bytes) = buffers();
        let mut places = HashSet::new();
        for _ in 0..10 {
            buffers.make_room(&mut bytes, BytesMut::new);
            bytes.put_bytes(1, 8);
            buffers.make_room_for(&mut bytes, LARGE, BytesMut::new);
            places.insert(bytes.as_ptr());
            bytes.put_bytes(2, LARGE);
            drop(bytes.split());
        }
        assert_eq!(places.len(), 1);
    }

    #[test]
    fn small_messages_never_go_into_a_large_buffer() {
        let (mut buffers, mut bytes) = buffers();
        buffers.make_room_for(&mut bytes, LARGE, BytesMut::new);
        let place = bytes.as_ptr().addr();
        let large = place..place + bytes.capacity();
        bytes.put_bytes(1, LARGE + 1); // the message, and the beginning of the next one
        drop(bytes.split_to(LARGE));
        for _ in 0..10 {
            buffers.make_room(&mut bytes, BytesMut::new);
            assert!(!large.contains(&bytes.as_ptr().addr()));
            bytes.put_bytes(2, 100);
            drop(bytes.split());
        }
    }

    #[test]
    fn a_buffer_that_a_decoder_has_made_large_is_not_kept() {
        let (mut buffers, mut bytes) = buffers();
        buffers.make_room(&mut bytes, BytesMut::new);
        bytes.put_bytes(1, 8);
        bytes.reserve(LARGE);
        buffers.make_room(&mut bytes, BytesMut::new);
        bytes.clear();
        assert!(buffers.release(&mut bytes).capacity() <= LARGEST_USUAL);
        assert_eq!(bytes.capacity(), 0);
    }

    #[test]
    fn what_is_unused_is_released() {
        let (mut buffers, mut bytes) = buffers();
        buffers.make_room(&mut bytes, BytesMut::new);
        bytes.put_bytes(1, 8);
        assert_eq!(buffers.release(&mut bytes).capacity(), 0, "something is in it");

        // A large message that is not complete needs no other buffer.
        buffers.make_room_for(&mut bytes, LARGE, BytesMut::new);
        assert!(buffers.release(&mut bytes).capacity() >= SMALL_PACKET);
        assert_eq!(bytes.len(), 8);
        assert!(bytes.capacity() > LARGE);

        // Other connections get no large buffer.
        bytes.clear();
        assert_eq!(buffers.release(&mut bytes).capacity(), 0);
        assert_eq!(bytes.capacity(), 0);

        // Nor one of unknown size, which the user has brought.
        let mut brought = BytesMut::with_capacity(USUAL);
        let mut buffers = Buffers::new(true, &brought);
        assert_eq!(buffers.release(&mut brought).capacity(), 0);

        // They get a usual one.
        let spare = BytesMut::with_capacity(USUAL);
        let place = spare.as_ptr().addr();
        buffers.make_room(&mut bytes, || spare);
        assert!((place..place + USUAL).contains(&bytes.as_ptr().addr()));
    }
}
