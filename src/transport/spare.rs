//! The read buffers of this thread that no connection uses at the moment.
//!
//! A connection that waits has no buffer. It [takes](take) one when there is something to receive,
//! and [gives](keep) it back when everything is received and decoded. So the number of buffers
//! follows the number of busy connections.

use std::cell::RefCell;

use bytes::BytesMut;

/// The most buffers that a thread keeps. They take 2 MiB if they have the usual size, and at most 4
/// MiB.
const MOST: usize = 8;

thread_local! {
    /// The buffers. The last one is taken first, because it is most likely in the processor's
    /// cache. Messages may still live in a buffer. The next messages then go behind them, even
    /// those of another connection.
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
