//! The sending direction of a connection, without waiting.

use std::{io, mem, net::Shutdown, os::fd::AsFd};

use super::Unsent;
use crate::{
    closer::{close_sent, close_unsent},
    codec::{Carrier, Encoder, Grouping, Plan, SendBuf, largest_packet},
    error::{Error, SendError, copy_of},
    limits::Limits,
    send_fd::SendFd,
    socket::{Attempt, Endpoint, SendFailure, SocketKind},
};

/// The sending direction of a connection: the messages that wait, and the state of the direction.
///
/// It does not contain its socket. The caller passes the same socket in all calls.
#[derive(Debug)]
pub(crate) struct SendSide {
    pub(crate) buf: SendBuf,
    /// The present limits of one call. They are below `largest` while the kernel lacks memory.
    carrier: Carrier,
    /// The limits of one call that the socket permits.
    largest: Carrier,
    state: Sending,
    shut_down_on_drop: bool,
}

/// The state of a sending direction.
#[derive(Debug, Default)]
pub(crate) enum Sending {
    /// Messages are accepted and sent.
    #[default]
    Open,
    /// The direction was shut down after everything was sent.
    Closed,
    /// A send has failed with this error, which is repeated.
    Failed(io::Error),
}

impl Sending {
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// Returns the error for further messages. `None` if they are accepted.
    #[inline]
    pub(crate) fn error(&self) -> Option<Error> {
        match self {
            Self::Open => None,
            Self::Closed => Some(Error::Closed),
            Self::Failed(error) => Some(Error::Io(copy_of(error))),
        }
    }
}

impl Clone for Sending {
    fn clone(&self) -> Self {
        match self {
            Self::Open => Self::Open,
            Self::Closed => Self::Closed,
            Self::Failed(error) => Self::Failed(copy_of(error)),
        }
    }
}

/// The content of a sending direction, without its codec.
#[derive(Debug, Default)]
pub(crate) struct SendParts {
    /// The bytes and descriptors that were accepted and not sent.
    pub(super) unsent: SendBuf,
    pub(super) state: Sending,
}

impl SendSide {
    /// Returns a direction that goes on with `parts`. Bytes and descriptors that were appended to
    /// it become one message with this grouping.
    pub(crate) fn new(socket: Endpoint<'_>, parts: SendParts, grouping: Grouping) -> Self {
        let SendParts { mut unsent, state } = parts;
        let (largest, max_packet_bytes) = largest_call(socket);
        unsent.set_max_packet_bytes(max_packet_bytes);
        // The user may have appended several messages, which become one. So an announced length is
        // not the length of the whole message.
        unsent.withdraw_announcements();
        let state = match unsent.commit(grouping) {
            Ok(()) => state,
            Err(error) => Sending::Failed(error.into()),
        };
        Self { buf: unsent, carrier: largest, largest, state, shut_down_on_drop: false }
    }

    /// Chooses whether [`end`](Self::end) shuts down the direction.
    pub(crate) fn shut_down_on_drop(&mut self, yes: bool) {
        self.shut_down_on_drop = yes;
    }

    /// Returns the state of the direction.
    pub(crate) fn state(&self) -> &Sending {
        &self.state
    }

    /// Returns the amount that waits.
    pub(crate) fn unsent(&self) -> Unsent {
        Unsent { bytes: self.buf.len(), fds: self.buf.fd_count() }
    }

    /// Queues an item, even if the queue is at its limits.
    #[inline]
    pub(crate) fn accept<E: Encoder<I>, I>(
        &mut self,
        encoder: &mut E,
        item: I,
    ) -> Result<(), SendError<I, E::Error>> {
        if !self.state.is_open() {
            return Err(SendError::refused(item, self.refusal()));
        }
        encode(encoder, item, &mut self.buf)
    }

    /// Returns the error for an item that is not accepted.
    #[cold]
    fn refusal(&self) -> Error {
        self.state.error().unwrap_or(Error::Closed)
    }

    /// Returns true only if there is room for one more message. If it returns false, there may
    /// still be room: [`Limits::leave_room_beside`] is exact and takes longer.
    #[inline]
    pub(crate) fn surely_has_room(&self, limits: &Limits) -> bool {
        self.buf.len() < limits.max_queued_bytes && self.buf.fd_count() < limits.max_queued_fds
    }

    /// Returns the error with which sending has failed, if it has. It is final.
    pub(crate) fn failure(&self) -> Option<Error> {
        if let Sending::Failed(_) = self.state { self.state.error() } else { None }
    }

    /// Makes one `sendmsg`, with as much as it can carry. The queue must not be empty.
    ///
    /// # Errors
    /// The errors of sendmsg(2) that are final. The caller has to [fail](Self::fail) the direction
    /// then.
    pub(crate) fn attempt(&mut self, socket: Endpoint<'_>) -> io::Result<Attempt> {
        let plan = self.buf.plan(self.carrier);
        let fds = self.buf.first_fds(plan.fds).map(SendFd::as_fd);
        let sent = socket.send(&self.buf.io_slices(plan.bytes), fds);
        match sent {
            // Close the descriptors at once, and try larger packets again.
            Ok(sent) => {
                let fds = self.buf.sent(plan, sent);
                if plan.fds > 0 {
                    close_sent(fds);
                }
                self.carrier = self.carrier.larger(self.largest);
                Ok(Attempt::Sent)
            }
            Err(error) => self.recover(socket, plan, error),
        }
    }

    /// Decides what to do after a send has failed.
    #[cold]
    fn recover(
        &mut self,
        socket: Endpoint<'_>,
        failed: Plan,
        error: io::Error,
    ) -> io::Result<Attempt> {
        match SendFailure::of(&error) {
            SendFailure::Full => Ok(Attempt::Full),
            SendFailure::Scarce => Ok(Attempt::Scarce),
            // Somebody may have made the send buffer smaller. If not, the error is final.
            SendFailure::PacketTooLarge => {
                let (largest, max_packet_bytes) = largest_call(socket);
                if max_packet_bytes == self.buf.max_packet_bytes() {
                    return Err(error);
                }
                (self.carrier, self.largest) = (largest, largest);
                self.buf.set_max_packet_bytes(max_packet_bytes);
                Ok(Attempt::Again)
            }
            // Try smaller packets. If they can't be smaller, wait for memory.
            SendFailure::NoMemoryForPacket => {
                let smaller = self.carrier.smaller_than(failed.bytes);
                if self.buf.plan(smaller) == failed {
                    return Ok(Attempt::Scarce);
                }
                self.carrier = smaller;
                Ok(Attempt::Again)
            }
            SendFailure::Final => Err(error),
        }
    }

    /// Fails the direction: it accepts and sends nothing from now on. Returns the error for the
    /// caller.
    pub(crate) fn fail(&mut self, error: io::Error) -> Error {
        self.state = Sending::Failed(copy_of(&error));
        error.into()
    }

    /// Shuts down the direction after a flush, even if the flush has failed.
    ///
    /// # Errors
    /// The error of the flush, or of shutdown(2).
    pub(crate) fn close(
        &mut self,
        socket: Endpoint<'_>,
        flushed: Result<(), Error>,
    ) -> Result<(), Error> {
        if let Sending::Closed = self.state {
            return Ok(());
        }
        // Shut down even if the flush has failed. If both fail, return the error of the flush.
        let shut_down = socket.shutdown(Shutdown::Write);
        flushed?;
        self.state = Sending::Closed;
        match shut_down {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Shuts down the direction if that was chosen. Call it when the half with this direction is
    /// dropped.
    pub(crate) fn end(&mut self, socket: Endpoint<'_>) {
        if self.shut_down_on_drop {
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// Takes out everything that waits, for a direction that goes on elsewhere.
    pub(crate) fn take(&mut self) -> SendParts {
        self.shut_down_on_drop = false;
        SendParts { unsent: mem::take(&mut self.buf), state: mem::take(&mut self.state) }
    }
}

impl Drop for SendSide {
    fn drop(&mut self) {
        close_unsent(mem::take(&mut self.buf).into_fds());
    }
}

/// Returns the limits of a call, and the greatest number of bytes in a packet.
fn largest_call(socket: Endpoint<'_>) -> (Carrier, Option<usize>) {
    match socket.kind() {
        SocketKind::Stream => (Carrier::Stream, None),
        SocketKind::SeqPacket => {
            let send_buffer_bytes = socket.send_buffer_size().unwrap_or(0);
            (Carrier::packets(send_buffer_bytes), Some(largest_packet(send_buffer_bytes)))
        }
    }
}

/// Appends one message. If the encoder fails or panics, nothing of the message is left in `buf`.
#[inline(always)] // without it, copying the item takes a tenth of the time of a small message
pub(crate) fn encode<E: Encoder<I>, I>(
    encoder: &mut E,
    item: I,
    buf: &mut SendBuf,
) -> Result<(), SendError<I, E::Error>> {
    buf.encode_with(encoder, item, close_unsent)
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use nix::libc;

    use super::*;
    use crate::{codec::FrameCodec, frame::Frame, framed::Framed, socket::Socket};

    /// A test can't make the kernel run out of memory for a packet, so it passes the error itself.
    #[tokio::test]
    async fn a_packet_that_there_is_no_memory_for_is_sent_in_smaller_ones_or_later() {
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut side = SendSide::new(a.endpoint(), SendParts::default(), Grouping::Free);
            side.accept(&mut FrameCodec::default(), Frame::new(vec![7; 60_000])).unwrap();
            let mut sizes = Vec::new();
            loop {
                let plan = side.buf.plan(side.carrier);
                sizes.push(plan.bytes);
                match side
                    .recover(a.endpoint(), plan, io::Error::from_raw_os_error(libc::ENOBUFS))
                    .unwrap()
                {
                    Attempt::Again => {}
                    attempt => break assert_eq!(attempt, Attempt::Scarce),
                }
            }
            match kind {
                SocketKind::SeqPacket => {
                    assert_eq!((sizes[0], sizes.last()), (60_008, Some(&2048)))
                }
                SocketKind::Stream => assert_eq!(sizes, [60_008], "it has no packets"),
            }
            while !side.buf.is_empty() {
                assert_eq!(side.attempt(a.endpoint()).unwrap(), Attempt::Sent);
            }
            let frame = Framed::new(b, FrameCodec::default()).try_next().await.unwrap().unwrap();
            assert_eq!(frame.payload.len(), 60_000);
        }
    }
}
