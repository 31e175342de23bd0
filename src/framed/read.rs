use std::{
    future::Future,
    os::fd::{BorrowedFd, OwnedFd},
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

use super::{senders::Senders, spare};
use crate::{
    Credentials, Decoder, Error, FdQueue, Socket, SocketKind,
    closer::Account,
    codec::{Inbound, Step, Unfinished},
    socket::Received,
    sys,
};

/// The receiving direction of a [`Framed`](crate::Framed): a [`Stream`] of messages.
///
/// Yields what is complete before it receives again. After an error it ends; what had been received by then is closed.
/// Where the peer closed without reading everything, the last item is [`Error::Reset`], after all that the peer had sent;
/// unless a send on another thread is being told so at that moment.
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
        mut fds: FdQueue<OwnedFd>,
        state: Receiving,
        senders: Senders,
    ) -> Self {
        fds.set_home(Arc::<Account>::clone(socket.account()));
        let mut inbound = Inbound::new(socket.kind() == SocketKind::SeqPacket, bytes, fds);
        if state == Receiving::Over {
            inbound.end();
        }
        Self {
            decoder,
            receiver: Receiver { socket, inbound, state, senders, uncharged: 0, rest: RestTimer::default() },
        }
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
        let Receiver { senders, inbound, .. } = &self.receiver;
        senders.of_message(inbound.decoded()).map(|credentials| &**credentials)
    }

    /// The decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        &mut self.decoder
    }

    pub(super) fn into_parts(mut self) -> (Arc<Socket>, D, BytesMut, FdQueue<OwnedFd>, Receiving, Senders) {
        spare::keep(self.receiver.inbound.release());
        let Inbound { bytes, fds, .. } = &mut self.receiver.inbound;
        let (bytes, fds) = (std::mem::take(bytes), std::mem::take(fds));
        let senders = std::mem::take(&mut self.receiver.senders).carried_over(self.receiver.inbound.decoded());
        (Arc::clone(&self.receiver.socket), self.decoder, bytes, fds, self.receiver.state, senders)
    }
}

impl<D: Decoder> Stream for ReadHalf<D> {
    type Item = Result<D::Item, D::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { decoder, receiver } = self.get_mut();
        loop {
            // Messages out of the buffer take no system call that would count, and a buffer holds thousands.
            while receiver.uncharged >= UNIT {
                ready!(coop::poll_proceed(cx)).made_progress();
                receiver.uncharged -= UNIT;
            }
            match receiver.inbound.next(decoder) {
                Ok(Step::Item(item)) => {
                    receiver.uncharged += MESSAGE;
                    return Poll::Ready(Some(Ok(item)));
                }
                Ok(Step::Receive) => {}
                Ok(Step::End) => {
                    spare::keep(receiver.inbound.release());
                    return Poll::Ready(receiver.last_word().map(|error| Err(error.into())));
                }
                Err(error) => {
                    receiver.end();
                    return Poll::Ready(Some(Err(error)));
                }
            }
            if let Err(error) = ready!(receiver.poll_receive(cx, decoder)) {
                receiver.end();
                return Poll::Ready(Some(Err(error.into())));
            }
        }
    }
}

// Nothing in it is pinned: the decoder is only ever used through `&mut`.
impl<D> Unpin for ReadHalf<D> {}

/// What a unit of the cooperative budget pays for. A unit is about the time of a receive, which takes one of its own.
const UNIT: u32 = 8;
/// What a message out of the buffer costs.
const MESSAGE: u32 = 1;
/// What a descriptor costs that was received: the kernel installs it, and somebody closes it.
const DESCRIPTOR: u32 = 4;

#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    inbound: Inbound,
    state: Receiving,
    senders: Senders,
    /// What was done since the cooperative budget was charged.
    uncharged: u32,
    rest: RestTimer,
}

/// Limits the time for which the rest of a message is waited for.
#[derive(Debug, Default)]
struct RestTimer {
    unfinished: Unfinished,
    deadline: Option<Instant>,
    /// Set for the deadline, or for an earlier one. Made when it is needed first.
    timer: Option<Pin<Box<Sleep>>>,
}

impl RestTimer {
    /// Called when nothing more is there to receive. Ready when the time for what is unfinished is over.
    fn poll(&mut self, cx: &mut Context<'_>, now_unfinished: Unfinished, socket: &Socket, limit: Duration) -> Poll<()> {
        let (unfinished, begins) = self.unfinished.update(now_unfinished);
        self.unfinished = unfinished;
        if unfinished.is_nothing() {
            self.deadline = None;
            return Poll::Pending;
        }
        if begins {
            self.deadline = Instant::now().checked_add(limit);
        }
        // Without a deadline, the limit is longer than the clock reaches.
        let Some(deadline) = self.deadline else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(socket.sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        ready!(timer.as_mut().poll(cx));
        // Nobody has polled for a while: the peer may have waited for us.
        let now = Instant::now();
        if now > deadline + LATE {
            self.deadline = now.checked_add(limit);
            let Some(deadline) = self.deadline else { return Poll::Pending };
            timer.as_mut().reset(deadline);
            return timer.as_mut().poll(cx);
        }
        Poll::Ready(())
    }
}

/// A timer that is noticed this much later was not waited for.
const LATE: Duration = Duration::from_secs(1);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    #[default]
    Open,
    /// The last error, or the end, was yielded.
    Over,
}

impl Receiver {
    /// Receives something, or the end.
    fn poll_receive<D: Decoder>(&mut self, cx: &mut Context<'_>, decoder: &D) -> Poll<Result<(), Error>> {
        let limits = decoder.limits();
        let Self { socket, inbound, uncharged, rest, senders, .. } = self;
        let is_rest = !inbound.bytes.is_empty() || inbound.fds.count() > 0;
        // Nothing complete is left, so all of it is a part of unfinished messages.
        socket.hold(inbound.bytes.len(), inbound.fds.count())?;
        // A peer that sends descriptors in vain gets no further than they can be closed.
        ready!(socket.poll_closed(cx, limits.max_queued_fds));
        // There is room only while there is something to receive.
        let receive = |socket: BorrowedFd<'_>| {
            let most = inbound.make_room(decoder, spare::take).min(decoder.max_receive_bytes());
            // A receive of nothing would look like the end.
            sys::recvmsg(socket, &mut inbound.bytes, most.max(1), &mut inbound.fds)
        };
        let mut received = match socket.poll_recv(cx, receive) {
            Poll::Ready(received) => received?,
            Poll::Pending => {
                spare::keep(inbound.release());
                ready!(rest.poll(cx, inbound.unfinished(), socket, limits.max_unfinished_time));
                let (bytes, fds) = (inbound.bytes.len(), inbound.fds.count());
                return Poll::Ready(Err(Error::Unfinished { bytes, fds }));
            }
        };
        *uncharged += received.fds as u32 * DESCRIPTOR;
        let credentials = received.credentials.take().filter(|_| socket.wants_credentials());
        if received.bytes > 0 && (credentials.is_some() || senders.know_any()) {
            senders.received(credentials, inbound.decoded(), is_rest)?;
        }
        match received {
            Received { packet_truncated: true, .. } => return Poll::Ready(Err(Error::TruncatedPacket)),
            Received { control_truncated: true, .. } => inbound.received_truncated(),
            Received { bytes: 0, .. } => inbound.end_of_stream(),
            _ => inbound.received(),
        }
        Poll::Ready(Ok(()))
    }

    /// What is to be said at the end of the stream, once.
    fn last_word(&mut self) -> Option<Error> {
        let before = std::mem::replace(&mut self.state, Receiving::Over);
        (before == Receiving::Open && self.socket.was_reset()).then_some(Error::Reset)
    }

    /// Nothing is yielded any more.
    fn end(&mut self) {
        self.state = Receiving::Over;
        self.inbound.end();
        self.inbound.bytes.clear();
        spare::keep(self.inbound.release());
        self.inbound.close_fds();
        self.hold_nothing();
    }

    fn hold_nothing(&self) {
        let _ = self.socket.hold(0, 0); // never too much
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.hold_nothing();
    }
}
