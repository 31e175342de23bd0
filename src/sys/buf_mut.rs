//! The `BufMut` of [`SendBuf`]. It is here and not beside the type because the trait is unsafe: its
//! callers write to memory that is not initialized yet. Every method calls the `BufMut` of `Vec`.

use bytes::{BufMut, buf::UninitSlice};

use crate::codec::SendBuf;

/// Appends numbers, and everything else that can be written to a [`BufMut`], to the message.
///
/// ```
/// use bytes::BufMut;
///
/// let mut dst = fdwire::SendBuf::<i32>::new();
/// dst.put_u16(7);
/// dst.put_u32_le(1);
/// assert_eq!(&dst.into_parts().0[..], [0, 7, 1, 0, 0, 0]);
/// ```
// SAFETY: `chunk_mut` and `advance_mut` are those of one and the same `Vec`, which keeps the
// contract.
unsafe impl<F> BufMut for SendBuf<F> {
    fn remaining_mut(&self) -> usize {
        (isize::MAX as usize).saturating_sub(self.len())
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has initialized that many bytes of what `chunk_mut` returned, which is
        // the vector's.
        unsafe { self.tail().advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.tail().chunk_mut()
    }

    #[inline]
    fn put_slice(&mut self, bytes: &[u8]) {
        self.tail().extend_from_slice(bytes);
    }

    fn put_bytes(&mut self, byte: u8, count: usize) {
        self.tail().put_bytes(byte, count);
    }
}
