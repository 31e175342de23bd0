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
/// Yields complete messages before it receives again. After an error it ends, and everything
/// received is closed. There is one exception: after [`Error::TimedOut`] it goes on. If the peer
/// closed without reading everything, the last item is [`Error::Reset`], after all that the peer
/// had sent.
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
    /// [`Error::TimedOut`]. The part of a message that has arrived stays, so the next call can go
    /// on with it. `None`, the default, waits without a limit. Zero takes what is there and does
    /// not wait.
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

    /// Returns the process that sent the message that was yielded last, if the socket is set to
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
            // Yield what is complete. Otherwise receive, unless the time is over.
            let received = match receiver.side.next(decoder) {
                Ok(Step::Item(item)) => return Some(Ok(item)),
                Ok(Step::Receive) if receives >= MOST_WHEN_OVER && deadline.is_over() => {
                    Err(Error::TimedOut)
                }
                Ok(Step::Receive) => receiver.receive(decoder, deadline),
                Ok(Step::End) => {
                    let last = receiver.side.last_error(receiver.socket.endpoint());
                    return last.map(|error| Err(error.into()));
                }
                Err(error) => {
                    receiver.side.fail(receiver.socket.endpoint());
                    return Some(Err(error));
                }
            };
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

/// The number of receives after which a call ends when its time is over. Until then it takes what
/// is there even if the time is over. Without the limit, a peer that sends one byte after the other
/// could make the call last.
const MOST_WHEN_OVER: u32 = 256;

#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    side: ReceiveSide,
    timeout: Option<Duration>,
}

impl Receiver {
    /// Receives something, or the end.
    ///
    /// # Errors
    /// [`Error::TimedOut`], or an error that is final.
    fn receive<D: Decoder>(&mut self, decoder: &D, deadline: Deadline) -> Result<(), Error> {
        let limits = decoder.limits();
        let Self { socket, side, .. } = self;
        let endpoint = socket.endpoint();
        // Nothing complete is left, so everything that has arrived counts for the peer's uid.
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
            // Nothing is there: give the buffer up, and wait until the first of both limits.
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
