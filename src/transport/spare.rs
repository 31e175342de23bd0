//! The unused read buffers of this thread.
//!
//! A connection that waits has no buffer. It [takes](take) one when there is something to receive,
//! and [returns](keep) it when everything is received and decoded. So the number of buffers depends
//! on the number of busy connections only.

use std::cell::RefCell;

use bytes::BytesMut;

/// The greatest number of buffers that a thread keeps. They take 2 MiB if they have the usual size,
/// and at most 4 MiB.
const MOST: usize = 8;

thread_local! {
    /// The buffers. The last one is taken first, because it is most likely in the processor's
    /// cache. Received messages may still occupy the beginning of a buffer. Then further messages,
    /// even those of another connection, are received behind them.
    static BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Takes a buffer. If the thread keeps none, returns one without memory.
pub(super) fn take() -> BytesMut {
    BUFFERS.try_with(|buffers| buffers.borrow_mut().pop()).ok().flatten().unwrap_or_default()
}

/// Keeps an empty buffer for the next connection that has something to receive.
pub(super) fn keep(buffer: BytesMut) {
    debug_assert!(buffer.is_empty());
    let _thread_ends = BUFFERS.try_with(|buffers| {
        let mut buffers = buffers.borrow_mut();
        if buffer.capacity() > 0 && buffers.len() < MOST {
            buffers.push(buffer);
        }
    });
}
