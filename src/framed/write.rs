//! The sending half of a connection, as a [`Sink`].

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_sink::Sink;

use super::outbound::Outbound;
use crate::{
    codec::{Codec, Encoder},
    error::{Error, SendError},
    socket::Socket,
    transport::{SendParts, Unsent},
};

/// The sending direction of a [`Framed`](crate::Framed): a [`Sink`] of messages.
///
/// Messages wait until they are flushed, or until the [limits](Codec::limits) are reached. All
/// waiting messages are sent together. A descriptor is closed right after the `sendmsg` that
/// carried it, in the way that [`SendFd`](crate::SendFd) describes.
///
/// After a failure, each further item comes back in the [`SendError`], and each flush returns the
/// error. Items that were accepted before and not sent are in
/// [`into_parts`](crate::Framed::into_parts).
///
/// When the half is dropped, the sending direction is shut down: the peer reads the end of the
/// stream. Everything that was not flushed is closed.
///
/// # Cancel safety
/// [`flush`](Self::flush), [`close`](Self::close) and [`reserve`](Self::reserve) can be dropped at
/// any await and called again: nothing is lost. `send(item)` and `feed(item)` of
/// [`SinkExt`](futures::SinkExt) lose the item and close its descriptors if they are dropped before
/// the item is in the queue. If an item must not be lost, call `reserve` first.
#[derive(Debug)]
pub struct WriteHalf<E> {
    pub(super) encoder: E,
    pub(super) outbound: Outbound,
}

impl<E> WriteHalf<E> {
    /// Returns the socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        self.outbound.socket()
    }

    pub(super) fn shared_socket(&self) -> &Arc<Socket> {
        self.outbound.socket()
    }

    pub(super) fn shut_down_on_drop(&mut self, yes: bool) {
        self.outbound.side.shut_down_on_drop(yes);
    }

    /// Returns the encoder.
    pub fn encoder_mut(&mut self) -> &mut E {
        &mut self.encoder
    }

    /// Returns the amount that was accepted and not sent.
    pub fn unsent(&self) -> Unsent {
        self.outbound.unsent()
    }

    /// Takes the half apart. The socket is one more reference to it.
    pub(super) fn into_parts(mut self) -> (Arc<Socket>, (E, SendParts)) {
        let parts = self.outbound.side.take();
        (Arc::clone(self.outbound.socket()), (self.encoder, parts))
    }

    /// Sends everything that was accepted.
    ///
    /// # Errors
    /// [`Error::Io`] with the error of `sendmsg`: `EPIPE` or `ECONNRESET` if the peer is gone,
    /// `EPERM` if the peer refuses descriptors, `EINVAL` for a descriptor that cannot be passed
    /// (io_uring). The receiving direction goes on.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to send the rest.
    pub async fn flush(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_flush(cx)).await
    }

    /// Flushes, then shuts down the sending direction, even if the flush has failed: the peer reads
    /// the end of the stream. The receiving direction goes on.
    ///
    /// # Errors
    /// The errors of [`flush`](Self::flush).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to finish.
    pub async fn close(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_close(cx)).await
    }
}

impl<E: Codec> WriteHalf<E> {
    /// Returns a half that goes on with `parts`.
    pub(super) fn new(socket: Arc<Socket>, (encoder, parts): (E, SendParts)) -> Self {
        let outbound = Outbound::new(socket, parts, encoder.grouping());
        Self { encoder, outbound }
    }

    /// Waits for room for one message. [`Permit::send`] then accepts the message without waiting.
    /// So a task that is cancelled while it waits still has its item.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
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
    /// The errors of [`flush`](Self::flush), and [`Error::Closed`].
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn reserve(&mut self) -> Result<Permit<'_, E>, Error> {
        let limits = self.encoder.limits();
        poll_fn(|cx| self.outbound.poll_ready(cx, &limits)).await?;
        Ok(Permit { half: self })
    }
}

/// A permit to send one message, made by [`WriteHalf::reserve`].
#[derive(Debug)]
#[must_use = "a permit that is dropped sends nothing"]
pub struct Permit<'a, E> {
    half: &'a mut WriteHalf<E>,
}

impl<E> Permit<'_, E> {
    /// Accepts the item for sending with the next flush.
    ///
    /// # Errors
    /// The errors of the encoder.
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
        // In the usual case there is room, and this check takes few instructions.
        if outbound.side.surely_has_room(&encoder.limits()) {
            return Poll::Ready(Ok(()));
        }
        // After an error this returns ready, and `start_send` returns the error together with the
        // item. If this returned the error, `SinkExt::send` would drop the item.
        outbound.poll_ready(cx, &encoder.limits()).map(|_| Ok(()))
    }

    #[inline]
    fn start_send(self: Pin<&mut Self>, item: I) -> Result<(), Self::Error> {
        let Self { encoder, outbound } = self.get_mut();
        outbound.accept(encoder, item)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.get_mut()
            .outbound
            .poll_flush(cx)
            .map_err(|error| SendError::from(E::Error::from(error)))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.get_mut()
            .outbound
            .poll_close(cx)
            .map_err(|error| SendError::from(E::Error::from(error)))
    }
}

// No field is pinned: the encoder is only used through `&mut`.
impl<E> Unpin for WriteHalf<E> {}
