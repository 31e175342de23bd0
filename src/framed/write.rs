use std::{
    future::poll_fn,
    os::fd::AsFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::Sink;

use super::{Driver, Sender, shared::Shared};
use crate::{
    Codec, Encoder, Error, Grouping, SendBuf, SendError, Socket,
    limits::Limits,
    socket::SendWait,
    sys,
    transport::{SendSide, Sending},
};

/// The sending direction of a [`Framed`](crate::Framed): a [`Sink`] of messages.
///
/// Messages wait until they are flushed, or until as many wait as the [limits](Codec::limits)
/// allow; all that wait go out together. A descriptor is closed right after the `sendmsg` that
/// carried it, in the way that [`SendFd`](crate::SendFd) describes.
///
/// Once it has failed, it hands every item back in the [`SendError`], and repeats the error at each
/// flush. What was accepted before and not sent is in [`into_parts`](crate::Framed::into_parts).
///
/// Dropping it shuts down the sending direction (the peer sees the end of the stream) and closes
/// what was not flushed.
///
/// # Cancel safety
/// [`flush`](Self::flush), [`close`](Self::close) and [`reserve`](Self::reserve) can be dropped at
/// any await and called again: nothing is lost. `send(item)` and `feed(item)` of
/// [`SinkExt`](futures::SinkExt) lose the item, and close its descriptors, when they are dropped
/// before they took it. Where that must not happen, `reserve` first.
#[derive(Debug)]
pub struct WriteHalf<E> {
    pub(super) encoder: E,
    pub(super) outbound: Outbound,
}

impl<E> WriteHalf<E> {
    /// The socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.outbound.socket
    }

    pub(super) fn shared_socket(&self) -> &Arc<Socket> {
        &self.outbound.socket
    }

    pub(super) fn shut_down_on_drop(&mut self, yes: bool) {
        self.outbound.side.shut_down_on_drop(yes);
    }

    /// The encoder.
    pub fn encoder_mut(&mut self) -> &mut E {
        &mut self.encoder
    }

    /// Number of bytes and of descriptors that were accepted and are not sent.
    pub fn unsent(&self) -> (usize, usize) {
        self.outbound.unsent()
    }

    pub(super) fn into_parts(mut self) -> (Arc<Socket>, E, SendBuf, Sending) {
        let (unsent, state) = self.outbound.side.take();
        (Arc::clone(&self.outbound.socket), self.encoder, unsent, state)
    }

    /// Sends everything that was accepted.
    ///
    /// # Errors
    /// [`Error::Io`] with what `sendmsg` said: `EPIPE` or `ECONNRESET` where the peer is gone,
    /// `EPERM` where it refuses descriptors, `EINVAL` for a descriptor that cannot be passed
    /// (io_uring). The receiving direction goes on.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to send the rest.
    pub async fn flush(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_flush(cx)).await
    }

    /// Flushes, then shuts down the sending direction, also where the flush has failed: the peer
    /// sees the end of the stream. The receiving direction goes on.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to finish.
    pub async fn close(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_close(cx)).await
    }

    /// For sending from many tasks: a [`Sender`] that can be cloned, and the [`Driver`] that sends
    /// what they accept, which is a future to be spawned. What was accepted before is sent first.
    pub fn into_sender(self) -> (Sender<E>, Driver<E>) {
        let shared = Arc::new(Shared::new(self.encoder, &self.outbound));
        (Sender::new(Arc::clone(&shared)), Driver::new(shared, self.outbound))
    }
}

impl<E: Codec> WriteHalf<E> {
    /// What a user has put into `unsent` becomes a message of this encoder.
    pub(super) fn new(socket: Arc<Socket>, encoder: E, unsent: SendBuf, state: Sending) -> Self {
        let outbound = Outbound::new(socket, unsent, encoder.grouping(), state);
        Self { encoder, outbound }
    }

    /// Waits for room for one message. [`Permit::send`] then takes it at once, so a cancelled task
    /// still has its item.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
    /// # let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
    /// # let mut framed = Framed::new(a, FrameCodec::default());
    /// # let connection = std::fs::File::open("/dev/null")?;
    /// let permit = framed.reserve().await?; // dropped here: `connection` is still ours
    /// permit.send(Frame::new("").with_fd(connection))?;
    /// framed.flush().await?; // dropped here: it is in the queue, and the next flush sends it
    /// # drop(b); Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As for [`flush`](Self::flush), and [`Error::Closed`].
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn reserve(&mut self) -> Result<Permit<'_, E>, Error> {
        let limits = self.encoder.limits();
        poll_fn(|cx| self.outbound.poll_ready(cx, &limits)).await?;
        Ok(Permit { half: self })
    }
}

/// Room for one message, from [`WriteHalf::reserve`].
#[derive(Debug)]
#[must_use = "nothing is sent with a permit that is dropped"]
pub struct Permit<'a, E> {
    half: &'a mut WriteHalf<E>,
}

impl<E> Permit<'_, E> {
    /// Accepts the item for sending with the next flush.
    ///
    /// # Errors
    /// What the encoder refuses.
    pub fn send<I>(self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        Pin::new(self.half).start_send(item)
    }
}

impl<I, E: Encoder<I>> Sink<I> for WriteHalf<E> {
    type Error = SendError<I, E::Error>;

    #[inline]
    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let Self { encoder, outbound } = self.get_mut();
        if outbound.side.surely_has_room(&encoder.limits()) {
            return Poll::Ready(Ok(()));
        }
        // Ready in spite of an error: `start_send` then gives it together with the item, which
        // `SinkExt::send` would drop here.
        outbound.poll_ready(cx, &encoder.limits()).map(|_| Ok(()))
    }

    #[inline]
    fn start_send(self: Pin<&mut Self>, item: I) -> Result<(), Self::Error> {
        let Self { encoder, outbound } = self.get_mut();
        outbound.accept(encoder, item)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.get_mut().outbound.poll_flush(cx).map_err(|error| SendError::from(E::Error::from(error)))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.get_mut().outbound.poll_close(cx).map_err(|error| SendError::from(E::Error::from(error)))
    }
}

// Nothing in it is pinned: the encoder is only ever used through `&mut`.
impl<E> Unpin for WriteHalf<E> {}

/// The sending direction, and the socket that it goes to.
#[derive(Debug)]
pub(crate) struct Outbound {
    socket: Arc<Socket>,
    pub(super) side: SendSide,
    wait: SendWait,
}

impl Outbound {
    /// What is open in `unsent` is finished as one message.
    pub(super) fn new(socket: Arc<Socket>, unsent: SendBuf, grouping: Grouping, state: Sending) -> Self {
        let side = SendSide::new(socket.endpoint(), unsent, grouping, state);
        Self { socket, side, wait: SendWait::default() }
    }

    /// Returns the number of bytes and of descriptors that wait.
    pub(crate) fn unsent(&self) -> (usize, usize) {
        self.side.unsent()
    }

    /// Whether what waits does so for want of kernel memory, or of descriptors in flight, and
    /// through no fault of the receiver: it has received all that was sent.
    pub(crate) fn waits_for_the_kernel(&self) -> bool {
        self.is_short() && self.is_all_received()
    }

    /// Returns true if what waits does so for want of kernel memory, or of descriptors in flight.
    pub(crate) fn is_short(&self) -> bool {
        self.wait.is_for_a_while()
    }

    /// Returns true if the receiver has received all that was sent.
    pub(crate) fn is_all_received(&self) -> bool {
        sys::unreceived(self.socket.as_fd()).is_ok_and(|bytes| bytes == 0)
    }

    /// Queues an item, however much waits.
    #[inline]
    pub(crate) fn accept<E: Encoder<I>, I>(&mut self, encoder: &mut E, item: I) -> Result<(), SendError<I, E::Error>> {
        self.side.accept(encoder, item)
    }

    /// Sends until there is room for one more message.
    #[inline(never)] // so that `Sink::poll_ready` is short
    fn poll_ready(&mut self, cx: &mut Context<'_>, limits: &Limits) -> Poll<Result<(), Error>> {
        if let Sending::Closed = self.side.state() {
            return Poll::Ready(Err(Error::Closed));
        }
        self.poll_send_until(cx, |buf| limits.leave_room_beside(buf.len(), buf.fd_count()))
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_send_until(cx, SendBuf::is_empty)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let flushed = ready!(self.poll_flush(cx));
        Poll::Ready(self.side.close(self.socket.endpoint(), flushed))
    }

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
