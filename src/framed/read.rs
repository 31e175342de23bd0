//! The receiving half of a connection, as a [`Stream`].

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use tokio::{
    task::coop,
    time::{Instant, Sleep},
};

use crate::{
    codec::{Decoder, Step},
    credentials::Credentials,
    error::Error,
    socket::Socket,
    transport::{ReceiveParts, ReceiveSide, Rest},
};

/// The receiving direction of a [`Framed`](crate::Framed): a [`Stream`] of messages.
///
/// The stream yields all complete messages before it receives again. After an error it ends, and
/// everything that was received is closed. If the peer closed without reading everything, the last
/// item is [`Error::Reset`], after everything that the peer had sent. The kernel reports that only
/// once, so this item can be missing if a send on another thread gets the report at that moment.
///
/// # Cancel safety
/// `next()` can be dropped at any await and called again: nothing is lost.
#[derive(Debug)]
#[must_use = "a stream receives nothing unless it is polled"]
pub struct ReadHalf<D> {
    decoder: D,
    receiver: Receiver,
}

impl<D> ReadHalf<D> {
    /// Returns a half that goes on with `parts`.
    pub(super) fn new(socket: Arc<Socket>, (decoder, parts): (D, ReceiveParts)) -> Self {
        let side = ReceiveSide::new(socket.endpoint(), parts);
        Self { decoder, receiver: Receiver { socket, side, uncharged: 0, rest_timer: None } }
    }

    /// Returns the socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.receiver.socket
    }

    pub(super) fn shared_socket(&self) -> &Arc<Socket> {
        &self.receiver.socket
    }

    /// Returns the process that sent the last message that was yielded, if the socket is set to
    /// [report it](Socket::set_pass_credentials).
    ///
    /// The sender of a message is the process that wrote all of it. Several processes may share one
    /// end of the connection. If one of them writes in the middle of another one's message, the
    /// stream ends with [`Error::MixedSenders`]. The sender is `None` if a part of the message was
    /// sent before the socket was set to report it, or if the kernel does not know the sender.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind, socket::PassCredentials};
    /// use futures::{SinkExt, StreamExt};
    ///
    /// let (a, b) = Socket::pair(SocketKind::Stream)?;
    /// b.set_pass_credentials(PassCredentials::Ids)?;
    /// let mut a = Framed::new(a, FrameCodec::default());
    /// let mut b = Framed::new(b, FrameCodec::default());
    /// a.send(Frame::new("hello")).await?;
    /// b.next().await.ok_or("the peer is gone")??;
    /// assert_eq!(b.credentials().and_then(|sender| sender.pid), Some(std::process::id() as i32));
    /// # Ok(()) }
    /// ```
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

impl<D: Decoder> Stream for ReadHalf<D> {
    type Item = Result<D::Item, D::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { decoder, receiver } = self.get_mut();
        loop {
            // First pay tokio's cooperative budget for the messages and descriptors of the calls
            // before. One buffer holds thousands of messages. Taking one out makes no system call,
            // so tokio would not charge for it, and other tasks would wait.
            while receiver.uncharged >= UNIT {
                ready!(coop::poll_proceed(cx)).made_progress();
                receiver.uncharged -= UNIT;
            }
            match receiver.side.next(decoder) {
                Ok(Step::Item(item)) => {
                    receiver.uncharged += MESSAGE;
                    return Poll::Ready(Some(Ok(item)));
                }
                Ok(Step::Receive) => {}
                // At the end, one more item is an error if the peer has not read everything.
                Ok(Step::End) => {
                    let last = receiver.side.last_error(receiver.socket.endpoint());
                    return Poll::Ready(last.map(|error| Err(error.into())));
                }
                Err(error) => {
                    receiver.side.fail(receiver.socket.endpoint());
                    return Poll::Ready(Some(Err(error)));
                }
            }
            if let Err(error) = ready!(receiver.poll_receive(cx, decoder)) {
                receiver.side.fail(receiver.socket.endpoint());
                return Poll::Ready(Some(Err(error.into())));
            }
        }
    }
}

// No field is pinned: the decoder is only used through `&mut`.
impl<D> Unpin for ReadHalf<D> {}

/// The cost that one unit of the cooperative budget pays for. For example, eight messages cost one
/// unit, and eight messages with one descriptor each cost five. One unit is about the time of a
/// receive, for which tokio charges one unit too.
const UNIT: u32 = 8;
/// The cost of taking a message out of the buffer.
const MESSAGE: u32 = 1;
/// The cost of a received descriptor: the kernel installs it, and it has to be closed.
const DESCRIPTOR: u32 = 4;

/// The receiving direction with its socket, for which it waits.
#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    side: ReceiveSide,
    /// The cost for which the cooperative budget was not charged yet.
    uncharged: u32,
    /// The timer for the rest of a message. It may still be set for the deadline of an earlier one.
    /// `None` until it is first needed.
    rest_timer: Option<Pin<Box<Sleep>>>,
}

impl Receiver {
    /// Receives bytes and descriptors, or the end of the stream.
    fn poll_receive<D: Decoder>(
        &mut self,
        cx: &mut Context<'_>,
        decoder: &D,
    ) -> Poll<Result<(), Error>> {
        let Self { socket, side, uncharged, .. } = self;
        // No complete message is left. Charge the peer's uid for what has arrived.
        let is_rest = side.has_part();
        side.hold(socket.endpoint())?;
        // Receive nothing while too many descriptors of this peer wait to be closed.
        ready!(socket.endpoint().poll_closed(cx, decoder.limits().max_queued_fds));
        // The buffer exists only while there is something to receive.
        match socket.poll_recv(cx, |fd| side.receive(fd, decoder)) {
            Poll::Ready(received) => {
                let received = received?;
                *uncharged += received.fds as u32 * DESCRIPTOR;
                Poll::Ready(side.received(socket.endpoint(), received, is_rest))
            }
            // There is nothing to receive. Give the buffer up, and limit the time for the rest of
            // an unfinished message.
            Poll::Pending => {
                side.release();
                ready!(self.poll_rest(cx, decoder.limits().max_unfinished_time));
                Poll::Ready(Err(self.side.unfinished()))
            }
        }
    }

    /// Waits until the time for an unfinished message is over. Call it when there is nothing to
    /// receive.
    fn poll_rest(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let Self { socket, side, rest_timer, .. } = self;
        loop {
            let deadline = match side.rest(limit, || Instant::now().into_std()) {
                Rest::Unlimited => return Poll::Pending,
                Rest::Until(deadline) => Instant::from_std(deadline),
                Rest::Over => return Poll::Ready(()),
            };
            // The timer is kept from one message to the next, and reset if the deadline is another.
            let timer = rest_timer.get_or_insert_with(|| Box::pin(socket.sleep_until(deadline)));
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            ready!(timer.as_mut().poll(cx));
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.side.end(self.socket.endpoint());
    }
}
