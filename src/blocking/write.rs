//! The sending half of a connection, for a program without a runtime.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use super::{
    Socket,
    wait::{self, Deadline},
};
use crate::{
    backoff::Backoff,
    codec::{Codec, Encoder, SendBuf},
    error::{Error, SendError},
    socket::Attempt,
    sys::Event,
    transport::{SendParts, SendSide, Unsent},
};

/// The sending direction of a [`Framed`](super::Framed).
///
/// Messages that were [fed](Self::feed) wait until they are flushed, or until the
/// [limits](crate::codec::Codec::limits) are reached. All waiting messages are sent together. A
/// descriptor is closed right after the `sendmsg` that carried it, in the way that
/// [`SendFd`](crate::SendFd) describes.
///
/// After a failure, each further item comes back in the [`SendError`], and each flush returns the
/// error. Items that were accepted before and not sent are in
/// [`into_parts`](super::Framed::into_parts). [`Error::TimedOut`] is not a failure: the next call
/// goes on.
///
/// When the half is dropped, the sending direction is shut down: the peer reads the end of the
/// stream. Everything that was not flushed is closed.
#[derive(Debug)]
pub struct WriteHalf<E> {
    encoder: E,
    outbound: Outbound,
}

impl<E> WriteHalf<E> {
    /// Sets the time for which one call waits until the socket accepts data. After that it returns
    /// [`Error::TimedOut`]. Items that were accepted and not sent stay in the queue for the next
    /// call. `None`, the default, waits without a limit. Zero does not wait: a call sends what the
    /// socket accepts at once.
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.outbound.timeout = timeout;
    }

    /// Returns the socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.outbound.socket
    }

    /// Returns the encoder.
    pub fn encoder_mut(&mut self) -> &mut E {
        &mut self.encoder
    }

    /// Returns the amount that was accepted and not sent.
    pub fn unsent(&self) -> Unsent {
        self.outbound.side.unsent()
    }

    pub(super) fn shut_down_on_drop(&mut self) {
        self.outbound.side.shut_down_on_drop(true);
    }

    /// Takes the half apart. The socket is one more reference to it.
    pub(super) fn into_parts(mut self) -> (Arc<Socket>, (E, SendParts)) {
        let parts = self.outbound.side.take();
        (Arc::clone(&self.outbound.socket), (self.encoder, parts))
    }

    /// Sends an item, and everything that was fed before.
    ///
    /// # Errors
    /// The errors of the encoder, and those of [`flush`](Self::flush). The item comes back in the
    /// [`SendError`] if it was not accepted. An [`Error::TimedOut`] without the item means that the
    /// item is in the queue, and the next call sends it.
    pub fn send<I>(&mut self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        // One time limit for both steps.
        let deadline = self.outbound.deadline();
        self.feed_until(item, deadline)?;
        self.outbound.flush(deadline).map_err(|error| SendError::from(E::Error::from(error)))
    }

    /// Waits until there is room for an item, and accepts it for sending. The next
    /// [`flush`](Self::flush) or [`send`](Self::send) sends all accepted items together.
    ///
    /// # Errors
    /// The errors of [`send`](Self::send). The item comes back with [`Error::TimedOut`].
    pub fn feed<I>(&mut self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.feed_until(item, self.outbound.deadline())
    }

    fn feed_until<I>(&mut self, item: I, deadline: Deadline) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        // Make room first: wait until messages of before are sent.
        let limits = self.encoder.limits();
        if !self.outbound.side.surely_has_room(&limits) {
            let has_room = |buf: &SendBuf| limits.leave_room_beside(buf.len(), buf.fd_count());
            // After any other error, `accept` returns that error together with the item.
            if let Err(Error::TimedOut) = self.outbound.send_until(deadline, has_room) {
                return Err(SendError::refused(item, Error::TimedOut));
            }
        }
        self.outbound.side.accept(&mut self.encoder, item)
    }

    /// Sends everything that was accepted.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if that takes longer than the [time](Self::set_write_timeout) allows.
    /// [`Error::Io`] with the error of `sendmsg`: `EPIPE` or `ECONNRESET` if the peer is gone,
    /// `EPERM` if the peer refuses descriptors, `EINVAL` for a descriptor that cannot be passed
    /// (io_uring). The receiving direction goes on.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.outbound.flush(self.outbound.deadline())
    }

    /// Flushes, then shuts down the sending direction, even if the flush has failed: the peer reads
    /// the end of the stream. The receiving direction goes on.
    ///
    /// # Errors
    /// The errors of [`flush`](Self::flush). After [`Error::TimedOut`] the direction is still open.
    pub fn close(&mut self) -> Result<(), Error> {
        match self.flush() {
            // The unsent messages can still be sent, so the direction stays open.
            Err(Error::TimedOut) => Err(Error::TimedOut),
            flushed => self.outbound.side.close(self.outbound.socket.endpoint(), flushed),
        }
    }
}

impl<E: Codec> WriteHalf<E> {
    /// Returns a half that goes on with `parts`.
    pub(super) fn new(socket: Arc<Socket>, (encoder, parts): (E, SendParts)) -> Self {
        let side = SendSide::new(socket.endpoint(), parts, encoder.grouping());
        Self { encoder, outbound: Outbound { socket, side, timeout: None } }
    }
}

/// The sending direction with its socket, for which it waits.
#[derive(Debug)]
struct Outbound {
    socket: Arc<Socket>,
    side: SendSide,
    /// The limit of one call, set by [`WriteHalf::set_write_timeout`].
    timeout: Option<Duration>,
}

impl Outbound {
    /// Returns the deadline of a call that begins now.
    fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout)
    }

    fn flush(&mut self, deadline: Deadline) -> Result<(), Error> {
        self.send_until(deadline, SendBuf::is_empty)
    }

    /// Sends until there is enough room in the queue.
    fn send_until(
        &mut self,
        deadline: Deadline,
        enough: impl Fn(&SendBuf) -> bool,
    ) -> Result<(), Error> {
        if let Some(error) = self.side.failure() {
            return Err(error);
        }
        let mut backoff = Backoff::default();
        while !enough(&self.side.buf) {
            match self.attempt(&mut backoff, deadline) {
                Ok(true) => {}
                Ok(false) => return Err(Error::TimedOut),
                Err(error) => return Err(self.side.fail(error)),
            }
        }
        Ok(())
    }

    /// Makes one attempt to send, and waits until the next attempt is worth making. Returns false
    /// if the deadline comes first.
    fn attempt(&mut self, backoff: &mut Backoff, deadline: Deadline) -> io::Result<bool> {
        match self.side.attempt(self.socket.endpoint())? {
            // The next shortage begins with a short pause again.
            Attempt::Sent => *backoff = Backoff::default(),
            Attempt::Again => {}
            // The kernel reports when the socket is writable.
            Attempt::Full => {
                return wait::until_ready(self.socket.as_fd(), Event::Writable, deadline);
            }
            // The kernel reports nothing, so try again after a growing pause.
            Attempt::Scarce => return Ok(wait::sleep(backoff.next(), deadline)),
        }
        Ok(true)
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.side.end(self.socket.endpoint());
    }
}
