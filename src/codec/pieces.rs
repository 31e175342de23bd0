//! A queue of bytes, copied or shared.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};
use smallvec::SmallVec;

/// The greatest number of pieces in one `sendmsg`. One more makes it fail with `EMSGSIZE`.
pub(super) const IOV_MAX: usize = 1024;

/// A queue of bytes. Short pieces are copied into it, long ones are shared without a copy.
///
/// ```text
///  copied   [xxxx|aaaaaa|bbb|cccc]     x was sent; a, b and c wait
///  shared          S1     S2           the order is a, S1, b, S2, c; c is the tail
/// ```
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// The copied bytes. Those before `copied_start` were sent, and the others wait.
    copied: Vec<u8>,
    copied_start: usize,
    /// The shared pieces that wait. Each piece follows `copied_before` copied bytes. The copied
    /// bytes from `tail_start` on follow the last piece.
    shared: VecDeque<Shared>,
    tail_start: usize,
    /// The number of shared bytes that wait, minus `copied_start`, modulo 2^64. The sum of this and
    /// the length of `copied` is the number of waiting bytes. It is computed several times for each
    /// message, so one addition has to be enough.
    beside_copied: usize,
}

/// A piece that is not copied.
#[derive(Debug)]
struct Shared {
    /// The number of copied bytes between the piece before and this one.
    copied_before: usize,
    bytes: Bytes,
}

impl Pieces {
    /// Returns the number of bytes that wait.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.copied.len().wrapping_add(self.beside_copied)
    }

    /// Returns the end of the queue, for appending copies. The caller may only append.
    #[inline]
    pub(super) fn tail(&mut self) -> &mut Vec<u8> {
        &mut self.copied
    }

    /// Appends bytes without copying them.
    pub(super) fn push_shared(&mut self, bytes: Bytes) {
        self.beside_copied = self.beside_copied.wrapping_add(bytes.len());
        self.shared.push_back(Shared { copied_before: self.copied.len() - self.tail_start, bytes });
        self.tail_start = self.copied.len();
    }

    /// Appends everything that waits in `later`.
    pub(super) fn append(&mut self, later: &mut Self) {
        // The tail of this queue is now followed by the copies before the first shared piece.
        if let Some(first) = later.shared.front_mut() {
            first.copied_before += self.copied.len() - self.tail_start;
            self.tail_start = self.copied.len() + later.tail_start - later.copied_start;
        }
        self.copied.extend_from_slice(&later.copied[later.copied_start..]);
        let shared_bytes = later.beside_copied.wrapping_add(later.copied_start);
        self.beside_copied = self.beside_copied.wrapping_add(shared_bytes);
        self.shared.append(&mut later.shared);
        later.copied.clear();
        (later.copied_start, later.tail_start, later.beside_copied) = (0, 0, 0);
    }

    /// Removes bytes from the end. A shared piece is removed as a whole or not at all.
    pub(super) fn remove_last(&mut self, mut count: usize) {
        loop {
            // First remove from the tail, then the last shared piece. What is before it is the next
            // tail.
            let in_tail = count.min(self.copied.len() - self.tail_start);
            self.copied.truncate(self.copied.len() - in_tail);
            count -= in_tail;
            if count == 0 {
                break;
            }
            let last = self.shared.pop_back().expect("no other bytes are left");
            self.tail_start -= last.copied_before;
            self.beside_copied = self.beside_copied.wrapping_sub(last.bytes.len());
            count -= last.bytes.len();
        }
    }

    /// Removes bytes from the front.
    pub(super) fn remove_first(&mut self, mut count: usize) {
        self.beside_copied = self.beside_copied.wrapping_sub(count);
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
        // The bytes that are left to remove are at the start of the tail.
        self.copied_start += count;
        self.tail_start = self.tail_start.max(self.copied_start);
        self.drop_removed_copies();
    }

    /// Moves the copied bytes that wait to the front, unless they are more than the sent bytes
    /// before them. So on average each byte is moved at most once.
    fn drop_removed_copies(&mut self) {
        let removed = self.copied_start;
        if removed >= self.copied.len() - removed {
            self.copied.drain(..removed);
            self.copied_start = 0;
            self.beside_copied = self.beside_copied.wrapping_add(removed);
            self.tail_start -= removed;
        }
    }

    /// Returns the first `limit` bytes that wait, or fewer if they are more than `IOV_MAX` pieces.
    pub(super) fn io_slices(&self, mut limit: usize) -> SmallVec<[IoSlice<'_>; 8]> {
        let mut slices = SmallVec::new();
        if self.shared.is_empty() {
            let waiting = &self.copied[self.copied_start..];
            slices.push(IoSlice::new(&waiting[..limit.min(waiting.len())]));
            return slices;
        }
        for piece in self.iter().take(IOV_MAX) {
            if limit == 0 {
                break;
            }
            let piece = &piece[..limit.min(piece.len())];
            limit -= piece.len();
            slices.push(IoSlice::new(piece));
        }
        slices
    }

    /// Returns all pieces that wait.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut end = self.copied_start;
        let before_tail = self.shared.iter().flat_map(move |shared| {
            let start = end;
            end += shared.copied_before;
            [&self.copied[start..end], &shared.bytes]
        });
        before_tail.chain([&self.copied[self.tail_start..]]).filter(|piece| !piece.is_empty())
    }

    /// Returns true if one call certainly has enough pieces for all bytes.
    #[inline]
    pub(super) fn fit_one_call(&self) -> bool {
        self.shared.len() < IOV_MAX / 2
    }

    /// Returns the number of bytes in the first `IOV_MAX` pieces.
    pub(super) fn reachable_bytes(&self) -> usize {
        if self.fit_one_call() {
            self.len()
        } else {
            self.iter().take(IOV_MAX).map(<[u8]>::len).sum()
        }
    }
}
