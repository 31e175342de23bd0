use std::{
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use futures::Stream;
use tokio::task::coop;

use crate::{
    Decoder, Error, FdQueue, Socket, SocketKind,
    codec::{Inbound, Step},
    socket::{Received, close_unwanted},
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
        fds: FdQueue<OwnedFd>,
        state: Receiving,
    ) -> Self {
        let mut inbound = Inbound::new(socket.kind() == SocketKind::SeqPacket, bytes, fds);
        if state == Receiving::Over {
            inbound.end();
        }
        Self { decoder, receiver: Receiver { socket, inbound, state, uncharged: 0 } }
    }

    /// The socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        &self.receiver.socket
    }

    pub(super) fn shared_socket(&self) -> &Arc<Socket> {
        &self.receiver.socket
    }

    /// The decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        &mut self.decoder
    }

    pub(super) fn into_parts(mut self) -> (Arc<Socket>, D, BytesMut, FdQueue<OwnedFd>, Receiving) {
        let Inbound { bytes, fds, .. } = &mut self.receiver.inbound;
        let (bytes, fds) = (std::mem::take(bytes), std::mem::take(fds));
        (Arc::clone(&self.receiver.socket), self.decoder, bytes, fds, self.receiver.state)
    }
}

impl<D: Decoder> Stream for ReadHalf<D> {
    type Item = Result<D::Item, D::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { decoder, receiver } = self.get_mut();
        loop {
            // Messages out of the buffer take no system call that would count, and a buffer holds thousands.
            if receiver.uncharged == UNCHARGED_MESSAGES {
                ready!(coop::poll_proceed(cx)).made_progress();
                receiver.uncharged = 0;
            }
            match receiver.inbound.next(decoder) {
                Ok(Step::Item(item)) => {
                    receiver.uncharged += 1;
                    return Poll::Ready(Some(Ok(item)));
                }
                Ok(Step::Receive) => {}
                Ok(Step::End) => {
                    return Poll::Ready(receiver.last_word().map(|error| Err(error.into())));
                }
                Err(error) => {
                    receiver.end();
                    return Poll::Ready(Some(Err(error)));
                }
            }
            if let Err(error) = ready!(receiver.poll_receive(cx, decoder.max_receive_bytes().max(1))) {
                receiver.end();
                return Poll::Ready(Some(Err(error.into())));
            }
        }
    }
}

// Nothing in it is pinned: the decoder is only ever used through `&mut`.
impl<D> Unpin for ReadHalf<D> {}

/// A unit of the cooperative budget is charged for so many messages out of the buffer; a receive takes one of its own.
const UNCHARGED_MESSAGES: u8 = 8;

#[derive(Debug)]
struct Receiver {
    socket: Arc<Socket>,
    inbound: Inbound,
    state: Receiving,
    /// Messages yielded since the budget was charged.
    uncharged: u8,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    #[default]
    Open,
    /// The last error, or the end, was yielded.
    Over,
}

impl Receiver {
    /// Receives something, or the end.
    fn poll_receive(&mut self, cx: &mut Context<'_>, max_bytes: usize) -> Poll<Result<(), Error>> {
        let Self { socket, inbound, .. } = self;
        let received = ready!(socket.poll_recv(cx, &mut inbound.bytes, max_bytes, &mut inbound.fds))?;
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
        self.close_fds();
    }

    fn close_fds(&mut self) {
        close_unwanted(Vec::from(std::mem::take(&mut self.inbound.fds)));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.close_fds();
    }
}
