//! The sending direction together with its socket: waiting until there is room.

use std::{
    os::fd::AsFd,
    sync::Arc,
    task::{Context, Poll, ready},
};

use crate::{
    codec::{Encoder, Grouping, SendBuf},
    error::{Error, SendError},
    limits::Limits,
    socket::{SendWait, Socket},
    sys,
    transport::{SendParts, SendSide, Sending, Unsent},
};

/// The sending direction of a connection, and its socket.
#[derive(Debug)]
pub(crate) struct Outbound {
    socket: Arc<Socket>,
    pub(super) side: SendSide,
    /// The event to wait for before the next attempt to send.
    wait: SendWait,
}

impl Outbound {
    /// Returns a direction that goes on with `parts`.
    pub(super) fn new(socket: Arc<Socket>, parts: SendParts, grouping: Grouping) -> Self {
        let side = SendSide::new(socket.endpoint(), parts, grouping);
        Self { socket, side, wait: SendWait::default() }
    }

    pub(super) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Returns the number of bytes and descriptors that wait to be sent.
    pub(crate) fn unsent(&self) -> Unsent {
        self.side.unsent()
    }

    /// Returns true if sending waits for the kernel ([`is_short`](Self::is_short)), although the
    /// receiver has received everything. So the receiver is not the cause.
    pub(crate) fn waits_for_the_kernel(&self) -> bool {
        self.is_short() && self.is_all_received()
    }

    /// Returns true if sending waits because the kernel lacks memory, or because too many
    /// descriptors are in flight.
    pub(crate) fn is_short(&self) -> bool {
        self.wait.is_for_a_while()
    }

    /// Returns true if the receiver has received everything that was sent.
    pub(crate) fn is_all_received(&self) -> bool {
        sys::unreceived(self.socket.as_fd()).is_ok_and(|bytes| bytes == 0)
    }

    /// Queues an item, even if the queue is at its limits.
    #[inline]
    pub(crate) fn accept<E: Encoder<I>, I>(
        &mut self,
        encoder: &mut E,
        item: I,
    ) -> Result<(), SendError<I, E::Error>> {
        self.side.accept(encoder, item)
    }

    /// Sends until there is room for one more message.
    #[inline(never)] // so that `Sink::poll_ready` is short
    pub(super) fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        limits: &Limits,
    ) -> Poll<Result<(), Error>> {
        if let Sending::Closed = self.side.state() {
            return Poll::Ready(Err(Error::Closed));
        }
        self.poll_send_until(cx, |buf| limits.leave_room_beside(buf.len(), buf.fd_count()))
    }

    /// Sends everything that was accepted.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_send_until(cx, SendBuf::is_empty)
    }

    /// Flushes, then shuts down the direction, even if the flush has failed.
    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let flushed = ready!(self.poll_flush(cx));
        Poll::Ready(self.side.close(self.socket.endpoint(), flushed))
    }

    /// Sends until there is enough room in the queue.
    #[inline]
    pub(super) fn poll_send_until(
        &mut self,
        cx: &mut Context<'_>,
        enough: impl Fn(&SendBuf) -> bool,
    ) -> Poll<Result<(), Error>> {
        if let Some(error) = self.side.failure() {
            return Poll::Ready(Err(error));
        }
        let Self { socket, side, wait } = self;
        while !enough(&side.buf) {
            if let Err(error) = ready!(socket.poll_send(cx, wait, |socket| side.attempt(socket))) {
                return Poll::Ready(Err(side.fail(error)));
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.side.end(self.socket.endpoint());
    }
}
