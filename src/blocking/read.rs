//! The receiving half of a connection, as an [`Iterator`].

use std::{
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Socket,
    wait::{self, Deadline},
};
use crate::{
    codec::{Decoder, Step},
    credentials::Credentials,
    error::Error,
    sys::Event,
    transport::{ReceiveParts, ReceiveSide, Rest},
};

/// The receiving direction of a [`Framed`](super::Framed): an [`Iterator`] of messages, which waits
/// for the next one.
///
/// The iterator yields all complete messages before it receives again. After an error it ends, and
/// everything that was received is closed. [`Error::TimedOut`] is the exception: the iterator goes
/// on. If the peer closed without reading everything, the last item is [`Error::Reset`], after
/// everything that the peer had sent.
#[derive(Debug)]
#[must_use = "an iterator receives nothing unless it is called"]
pub struct ReadHalf<D> {
    decoder: D,
    receiver: Receiver,
}

impl<D> ReadHalf<D> {
    /// Returns a half that goes on with `parts`.
    pub(super) fn new(socket: Arc<Socket>, (decoder, parts): (D, ReceiveParts)) -> Self {
        let side = ReceiveSide::new(socket.endpoint(), parts);
        Self { decoder, receiver: Receiver { socket, side, timeout: None } }
    }

    /// Sets the time for which one call of `next` waits for a message. After that it yields
    /// [`Error::TimedOut`]. If part of a message has arrived, it is kept for the next call. `None`,
    /// the default, waits without a limit. Zero does not wait: a call yields only what has already
    /// arrived.
    ///
    /// [`Limits::max_unfinished_time`](crate::Limits#structfield.max_unfinished_time) is counted
    /// separately.
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.receiver.timeout = timeout;
    }

    /// Returns the socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.receiver.socket
    }

    /// Returns the process that sent the last message that was yielded, if the socket is set to
    /// [report it](Socket::set_pass_credentials), as
    /// [`fdwire::framed::ReadHalf::credentials`](crate::framed::ReadHalf::credentials) does.
    pub fn credentials(&self) -> Option<&Credentials> {
        self.receiver.side.credentials()
    }

    /// Returns the decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        &mut self.decoder
    }

    /// Takes the half apart. The socket is one more reference to it.
    pub(super) fn into_parts(mut self) -> (Arc<Socket>, (D, ReceiveParts)) {
        let parts = self.receiver.side.take();
        (Arc::clone(&self.receiver.socket), (self.decoder, parts))
    }
}

impl<D: Decoder> Iterator for ReadHalf<D> {
    type Item = Result<D::Item, D::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { decoder, receiver } = self;
        let deadline = Deadline::after(receiver.timeout);
        let mut receives = 0_u32;
        loop {
            // Yield a complete message if there is one. Otherwise receive, unless the time is over.
            let received = match receiver.side.next(decoder) {
                Ok(Step::Item(item)) => return Some(Ok(item)),
                Ok(Step::Receive) if receives >= MOST_WHEN_OVER && deadline.is_over() => {
                    Err(Error::TimedOut)
                }
                Ok(Step::Receive) => receiver.receive(decoder, deadline),
                // At the end, one more item is an error if the peer has not read everything.
                Ok(Step::End) => {
                    let last = receiver.side.last_error(receiver.socket.endpoint());
                    return last.map(|error| Err(error.into()));
                }
                Err(error) => {
                    receiver.side.fail(receiver.socket.endpoint());
                    return Some(Err(error));
                }
            };
            // Every error is final except that of the time limit.
            match received {
                Ok(()) => receives = receives.saturating_add(1),
                Err(Error::TimedOut) => return Some(Err(Error::TimedOut.into())),
                Err(error) => {
                    receiver.side.fail(receiver.socket.endpoint());
                    return Some(Err(error.into()));
                }
            }
        }
    }
}

/// The number of receives that one call of `next` makes even if its time is over. So a call with
/// little time still yields a message that has arrived in several parts. Without this number, a
/// peer that sends single bytes all the time could make the call last without end.
const MOST_WHEN_OVER: u32 = 256;

/// The receiving direction with its socket, for which it waits.
#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    side: ReceiveSide,
    /// The limit of one call, set by [`ReadHalf::set_read_timeout`].
    timeout: Option<Duration>,
}

impl Receiver {
    /// Receives bytes and descriptors, or the end of the stream.
    ///
    /// # Errors
    /// [`Error::TimedOut`], or an error that is final.
    fn receive<D: Decoder>(&mut self, decoder: &D, deadline: Deadline) -> Result<(), Error> {
        let limits = decoder.limits();
        let Self { socket, side, .. } = self;
        let endpoint = socket.endpoint();
        // No complete message is left. Charge the peer's uid for what has arrived.
        let is_rest = side.has_part();
        side.hold(endpoint)?;
        // Receive nothing while too many descriptors of this peer wait to be closed.
        if !wait::until_woken(deadline, |cx| endpoint.poll_closed(cx, limits.max_queued_fds)) {
            return Err(Error::TimedOut);
        }
        loop {
            if let Some(received) = endpoint.receive(|fd| side.receive(fd, decoder))? {
                return side.received(endpoint, received, is_rest);
            }
            // There is nothing to receive. Give the buffer up, and wait until the earlier one of
            // both time limits: that of this call, and that of an unfinished message.
            side.release();
            let until = match side.rest(limits.max_unfinished_time, Instant::now) {
                Rest::Unlimited => deadline,
                Rest::Until(rest) => deadline.or(rest),
                Rest::Over => return Err(side.unfinished()),
            };
            if !wait::until_ready(socket.as_fd(), Event::Readable, until)? && deadline.is_over() {
                return Err(Error::TimedOut);
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.side.end(self.socket.endpoint());
    }
}
