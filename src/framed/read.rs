use std::{
    future::Future,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use futures::Stream;
use tokio::{
    task::coop,
    time::{Instant, Sleep},
};

use crate::{
    Credentials, Decoder, Error, FdQueue, Socket,
    codec::Step,
    transport::{ReceiveSide, Receiving, Rest, Senders},
};

/// The receiving direction of a [`Framed`](crate::Framed): a [`Stream`] of messages.
///
/// Yields what is complete before it receives again. After an error it ends; what had been received
/// by then is closed. Where the peer closed without reading everything, the last item is
/// [`Error::Reset`], after all that the peer had sent; unless a send on another thread is being
/// told so at that moment.
///
/// # Cancel safety
/// `next()` can be dropped at any await and called again: nothing is lost.
#[derive(Debug)]
pub struct ReadHalf<D> {
    decoder: D,
    receiver: Receiver,
}

impl<D> ReadHalf<D> {
    pub(super) fn new(
        socket: Arc<Socket>,
        decoder: D,
        bytes: BytesMut,
        fds: FdQueue<OwnedFd>,
        state: Receiving,
        senders: Senders,
    ) -> Self {
        let side = ReceiveSide::new(socket.endpoint(), bytes, fds, state, senders);
        Self { decoder, receiver: Receiver { socket, side, uncharged: 0, rest_timer: None } }
    }

    /// The socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.receiver.socket
    }

    pub(super) fn shared_socket(&self) -> &Arc<Socket> {
        &self.receiver.socket
    }

    /// Returns the process that sent the message that was yielded last, if the socket is set to
    /// [report it](Socket::set_pass_credentials).
    ///
    /// The sender of a message is the process that wrote all of it. If processes that share one end
    /// of the connection write to it in the middle of a message of another, the stream ends with
    /// [`Error::MixedSenders`]. The sender is `None` if a part of the message was sent before the
    /// socket was set to report it, or if the kernel does not know the sender.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::{Frame, FrameCodec, Framed, PassCredentials, Socket, SocketKind};
    /// use futures::{SinkExt, StreamExt};
    ///
    /// let (a, b) = Socket::pair(SocketKind::Stream)?;
    /// b.set_pass_credentials(PassCredentials::Ids)?;
    /// let (mut a, mut b) = (Framed::new(a, FrameCodec::default()), Framed::new(b, FrameCodec::default()));
    /// a.send(Frame::new("hello")).await?;
    /// b.next().await.ok_or("the peer is gone")??;
    /// assert_eq!(b.credentials().and_then(|sender| sender.pid), Some(std::process::id() as i32));
    /// # Ok(()) }
    /// ```
    pub fn credentials(&self) -> Option<&Credentials> {
        self.receiver.side.credentials()
    }

    /// The decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        &mut self.decoder
    }

    pub(super) fn into_parts(mut self) -> (Arc<Socket>, D, BytesMut, FdQueue<OwnedFd>, Receiving, Senders) {
        let (bytes, fds, state, senders) = self.receiver.side.take();
        (Arc::clone(&self.receiver.socket), self.decoder, bytes, fds, state, senders)
    }
}

impl<D: Decoder> Stream for ReadHalf<D> {
    type Item = Result<D::Item, D::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { decoder, receiver } = self.get_mut();
        loop {
            // Messages out of the buffer take no system call that would count, and a buffer holds
            // thousands.
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

// Nothing in it is pinned: the decoder is only ever used through `&mut`.
impl<D> Unpin for ReadHalf<D> {}

/// What a unit of the cooperative budget pays for. A unit is about the time of a receive, which
/// takes one of its own.
const UNIT: u32 = 8;
/// What a message out of the buffer costs.
const MESSAGE: u32 = 1;
/// What a descriptor costs that was received: the kernel installs it, and somebody closes it.
const DESCRIPTOR: u32 = 4;

#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    side: ReceiveSide,
    /// The part of what was done that the cooperative budget was not charged for.
    uncharged: u32,
    /// Set for the time until which the rest of a message is waited for, or for an earlier one.
    /// Made when it is needed first.
    rest_timer: Option<Pin<Box<Sleep>>>,
}

impl Receiver {
    /// Receives something, or the end.
    fn poll_receive<D: Decoder>(&mut self, cx: &mut Context<'_>, decoder: &D) -> Poll<Result<(), Error>> {
        let Self { socket, side, uncharged, .. } = self;
        let is_rest = side.has_part();
        side.hold(socket.endpoint())?;
        // A peer that sends descriptors in vain gets no further than they can be closed.
        ready!(socket.endpoint().poll_closed(cx, decoder.limits().max_queued_fds));
        // There is room only while there is something to receive.
        match socket.poll_recv(cx, |fd| side.receive(fd, decoder)) {
            Poll::Ready(received) => {
                let received = received?;
                *uncharged += received.fds as u32 * DESCRIPTOR;
                Poll::Ready(side.received(socket.endpoint(), received, is_rest))
            }
            Poll::Pending => {
                side.release();
                ready!(self.poll_rest(cx, decoder.limits().max_unfinished_time));
                Poll::Ready(Err(self.side.unfinished()))
            }
        }
    }

    /// Called when nothing more is there to receive. Ready when the time for what is unfinished is
    /// over.
    fn poll_rest(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let Self { socket, side, rest_timer, .. } = self;
        loop {
            let deadline = match side.rest(limit, || Instant::now().into_std()) {
                Rest::Unlimited => return Poll::Pending,
                Rest::Until(deadline) => Instant::from_std(deadline),
                Rest::Over => return Poll::Ready(()),
            };
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
