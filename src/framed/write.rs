use std::{
    future::poll_fn,
    io, mem,
    net::Shutdown,
    os::fd::AsFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::Sink;

use super::{Driver, Sender, shared::Shared};
use crate::{
    Codec, Encoder, Error, Grouping, SendBuf, SendError, SendFd, Socket, SocketKind,
    closer::{close_sent, close_unsent},
    codec::{Carrier, Plan, largest_packet},
    limits::Limits,
    socket::{SendWait, TooLarge},
    sys,
};

/// The sending direction of a [`Framed`](crate::Framed): a [`Sink`] of messages.
///
/// Messages wait until they are flushed, or until as many wait as the [limits](Codec::limits) allow; all that wait go out
/// together. A descriptor is closed right after the `sendmsg` that carried it, in the way that [`SendFd`] describes.
///
/// Once it has failed, it hands every item back in the [`SendError`], and repeats the error at each flush. What was
/// accepted before and not sent is in [`into_parts`](crate::Framed::into_parts).
///
/// Dropping it shuts down the sending direction (the peer sees the end of the stream) and closes what was not flushed.
///
/// # Cancel safety
/// [`flush`](Self::flush), [`close`](Self::close) and [`reserve`](Self::reserve) can be dropped at any await and called
/// again: nothing is lost. `send(item)` and `feed(item)` of [`SinkExt`](futures::SinkExt) lose the item, and close its
/// descriptors, when they are dropped before they took it. Where that must not happen, `reserve` first.
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
        self.outbound.shut_down_on_drop(yes);
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
        let Outbound { socket, buf, state, shut_down_on_drop, .. } = &mut self.outbound;
        *shut_down_on_drop = false;
        (Arc::clone(socket), self.encoder, mem::take(buf), mem::take(state))
    }

    /// Sends everything that was accepted.
    ///
    /// # Errors
    /// [`Error::Io`] with what `sendmsg` said: `EPIPE` or `ECONNRESET` where the peer is gone, `EPERM` where it refuses
    /// descriptors, `EINVAL` for a descriptor that cannot be passed (io_uring). The receiving direction goes on.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to send the rest.
    pub async fn flush(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_flush(cx)).await
    }

    /// Flushes, then shuts down the sending direction, also where the flush has failed: the peer sees the end of the stream. The
    /// receiving direction goes on.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. Call it again to finish.
    pub async fn close(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.outbound.poll_close(cx)).await
    }

    /// For sending from many tasks: a [`Sender`] that can be cloned, and the [`Driver`] that sends what they accept, which is a
    /// future to be spawned. What was accepted before is sent first.
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

    /// Waits for room for one message. [`Permit::send`] then takes it at once, so a cancelled task still has its item.
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
        if outbound.surely_has_room(&encoder.limits()) {
            return Poll::Ready(Ok(()));
        }
        // Ready in spite of an error: `start_send` then gives it together with the item, which `SinkExt::send` would drop
        // here.
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

/// Appends one message. If the encoder fails or panics, nothing of the message is left in `buf`.
#[inline(always)] // what else its caller copies takes a tenth of the time of a small message
pub(super) fn encode<E: Encoder<I>, I>(
    encoder: &mut E,
    item: I,
    buf: &mut SendBuf,
) -> Result<(), SendError<I, E::Error>> {
    buf.encode_with(encoder, item, close_unsent)
}

/// What waits to be sent, and the socket that it goes to.
#[derive(Debug)]
pub(crate) struct Outbound {
    socket: Arc<Socket>,
    pub(super) buf: SendBuf,
    /// What one call carries at the moment, and what it does when the kernel has memory enough.
    carrier: Carrier,
    largest: Carrier,
    wait: SendWait,
    pub(super) state: Sending,
    shut_down_on_drop: bool,
}

#[derive(Debug, Default)]
pub(crate) enum Sending {
    #[default]
    Open,
    Closed,
    Failed(io::Error),
}

impl Sending {
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// Why nothing is accepted any more.
    #[inline]
    pub(super) fn error(&self) -> Option<Error> {
        match self {
            Self::Open => None,
            Self::Closed => Some(Error::Closed),
            Self::Failed(error) => Some(Error::Io(repeat(error))),
        }
    }
}

impl Clone for Sending {
    fn clone(&self) -> Self {
        match self {
            Self::Open => Self::Open,
            Self::Closed => Self::Closed,
            Self::Failed(error) => Self::Failed(repeat(error)),
        }
    }
}

fn repeat(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// What a call carries at most, and the most bytes of a packet.
fn largest_call(socket: &Socket) -> (Carrier, Option<usize>) {
    match socket.kind() {
        SocketKind::Stream => (Carrier::Stream, None),
        SocketKind::SeqPacket => {
            let send_buffer_bytes = socket.send_buffer_size().unwrap_or(0);
            (Carrier::packets(send_buffer_bytes), Some(largest_packet(send_buffer_bytes)))
        }
    }
}

impl Outbound {
    /// What is open in `unsent` is finished as one message.
    pub(super) fn new(socket: Arc<Socket>, mut unsent: SendBuf, grouping: Grouping, state: Sending) -> Self {
        let (largest, max_packet_bytes) = largest_call(&socket);
        unsent.set_max_packet_bytes(max_packet_bytes);
        let state = match unsent.commit(grouping) {
            Ok(()) => state,
            Err(error) => Sending::Failed(error.into()),
        };
        Self {
            socket,
            buf: unsent,
            carrier: largest,
            largest,
            wait: SendWait::default(),
            state,
            shut_down_on_drop: false,
        }
    }

    pub(super) fn shut_down_on_drop(&mut self, yes: bool) {
        self.shut_down_on_drop = yes;
    }

    /// Number of bytes and of descriptors that wait.
    pub(crate) fn unsent(&self) -> (usize, usize) {
        (self.buf.len(), self.buf.fd_count())
    }

    /// Whether what waits does so for want of kernel memory, or of descriptors in flight, and through no fault of the receiver: it
    /// has received all that was sent.
    pub(crate) fn waits_for_the_kernel(&self) -> bool {
        self.wait.is_for_a_while() && sys::unreceived(self.socket.as_fd()).is_ok_and(|bytes| bytes == 0)
    }

    /// Queues an item, however much waits.
    #[inline]
    pub(crate) fn accept<E: Encoder<I>, I>(&mut self, encoder: &mut E, item: I) -> Result<(), SendError<I, E::Error>> {
        if !self.state.is_open() {
            return Err(SendError::refused(item, self.refusal()));
        }
        encode(encoder, item, &mut self.buf)
    }

    #[cold]
    fn refusal(&self) -> Error {
        self.state.error().unwrap_or(Error::Closed)
    }

    /// Returns true only if there is room for one more message. [`poll_ready`](Self::poll_ready) finds
    /// out what this does not know: it takes longer.
    #[inline]
    fn surely_has_room(&self, limits: &Limits) -> bool {
        self.buf.len() < limits.max_queued_bytes && self.buf.fd_count() < limits.max_queued_fds
    }

    /// Sends until there is room for one more message.
    #[inline(never)] // so that `Sink::poll_ready` is short
    fn poll_ready(&mut self, cx: &mut Context<'_>, limits: &Limits) -> Poll<Result<(), Error>> {
        let has_room = |buf: &SendBuf| limits.leave_room_beside(buf.len(), buf.fd_count());
        match self.state {
            Sending::Closed => Poll::Ready(Err(Error::Closed)),
            _ => self.poll_send_until(cx, has_room),
        }
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_send_until(cx, SendBuf::is_empty)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let flushed = ready!(self.poll_flush(cx));
        if let Sending::Closed = self.state {
            return Poll::Ready(Ok(()));
        }
        let shut_down = self.socket.shutdown(Shutdown::Write);
        flushed?;
        self.state = Sending::Closed;
        match shut_down {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(error.into())),
            _ => Poll::Ready(Ok(())),
        }
    }

    #[inline]
    pub(super) fn poll_send_until(
        &mut self,
        cx: &mut Context<'_>,
        enough: impl Fn(&SendBuf) -> bool,
    ) -> Poll<Result<(), Error>> {
        if let Sending::Failed(error) = &self.state {
            return Poll::Ready(Err(repeat(error).into()));
        }
        while !enough(&self.buf) {
            if let Err(error) = ready!(self.poll_send(cx)) {
                self.state = Sending::Failed(repeat(&error));
                return Poll::Ready(Err(error.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// One `sendmsg` of as much as it takes, if it takes any.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { socket, buf, carrier, largest, wait, .. } = self;
        let plan = buf.plan(*carrier);
        let fds = buf.first_fds(plan.fds).map(SendFd::as_fd);
        let sent = ready!(socket.poll_send(cx, wait, &buf.io_slices(plan.bytes), fds));
        match sent {
            Ok(sent) => {
                let fds = buf.sent(plan, sent);
                if plan.fds > 0 {
                    close_sent(fds);
                }
                *carrier = carrier.larger(*largest);
            }
            Err(error) => self.recover(plan, error)?,
        }
        Poll::Ready(Ok(()))
    }

    /// Prepares another attempt after a send has failed.
    ///
    /// # Errors
    /// The error, if it is final.
    fn recover(&mut self, failed: Plan, error: io::Error) -> io::Result<()> {
        let Self { socket, buf, carrier, largest, wait, .. } = self;
        match TooLarge::from_error(&error) {
            // The buffer has been made smaller, or else it is final.
            Some(TooLarge::ForBuffer) if largest_call(socket).1 != buf.max_packet_bytes() => {
                let max_packet_bytes;
                (*largest, max_packet_bytes) = largest_call(socket);
                *carrier = *largest;
                buf.set_max_packet_bytes(max_packet_bytes);
            }
            Some(TooLarge::ForMemory) => match carrier.smaller_than(failed.bytes) {
                smaller if buf.plan(smaller) != failed => *carrier = smaller,
                _ => wait.a_while(socket),
            },
            _ => return Err(error),
        }
        Ok(())
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        if self.shut_down_on_drop {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        close_unsent(mem::take(&mut self.buf).into_fds());
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use nix::libc;

    use super::*;
    use crate::{Frame, FrameCodec, Framed};

    /// A test cannot make the kernel run out of memory for a packet, so it brings the error itself.
    #[tokio::test]
    async fn a_packet_that_there_is_no_memory_for_is_sent_in_smaller_ones_or_later() {
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut outbound = Outbound::new(Arc::new(a), SendBuf::new(), Grouping::Free, Sending::default());
            outbound.accept(&mut FrameCodec::default(), Frame::new(vec![7; 60_000])).unwrap();
            let mut sizes = Vec::new();
            while !outbound.wait.is_for_a_while() {
                let plan = outbound.buf.plan(outbound.carrier);
                sizes.push(plan.bytes);
                outbound.recover(plan, io::Error::from_raw_os_error(libc::ENOBUFS)).unwrap();
            }
            match kind {
                SocketKind::SeqPacket => assert_eq!((sizes[0], sizes.last()), (60_008, Some(&2048))),
                SocketKind::Stream => assert_eq!(sizes, [60_008], "it has no packets"),
            }
            let mut rx = Framed::new(b, FrameCodec::default());
            let (sent, received) = tokio::join!(poll_fn(|cx| outbound.poll_flush(cx)), rx.try_next());
            sent.unwrap();
            assert_eq!(received.unwrap().unwrap().payload.len(), 60_000);
        }
    }
}
