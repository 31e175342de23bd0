use std::os::fd::OwnedFd;

use bytes::BytesMut;

use super::{Receiving, Senders, Sending};
use crate::{
    codec::{FdQueue, SendBuf},
    socket::Socket,
};

/// The parts of a [`Framed`](crate::Framed), made by
/// [`Framed::into_parts`](crate::Framed::into_parts). `S` is the type of its socket.
#[derive(Debug)]
#[non_exhaustive]
pub struct FramedParts<D, E = D, S = Socket> {
    /// The socket.
    pub socket: S,
    /// The codec of the receiving direction.
    pub decoder: D,
    /// The codec of the sending direction.
    pub encoder: E,
    /// The bytes that were received and not decoded.
    pub received: BytesMut,
    /// The descriptors that were received and that no message has claimed.
    pub received_fds: FdQueue<OwnedFd>,
    /// The bytes and descriptors that were accepted and not sent. Everything that you append
    /// becomes one more message when the parts are put together again, with the
    /// [grouping](crate::codec::Codec::grouping) of the encoder. If no call can carry that message,
    /// the sending direction has failed from then on.
    pub unsent: SendBuf,
    /// The state of each direction: an end or a failure is kept.
    pub(crate) receiving: Receiving,
    pub(crate) sending: Sending,
    /// The processes that sent the received bytes.
    pub(crate) senders: Senders,
}

impl<D, E, S> FramedParts<D, E, S> {
    /// Returns the parts of a connection that was not used yet.
    pub(crate) fn new(socket: S, decoder: D, encoder: E) -> Self {
        Self {
            socket,
            decoder,
            encoder,
            received: BytesMut::new(),
            received_fds: FdQueue::new(),
            unsent: SendBuf::new(),
            receiving: Receiving::default(),
            sending: Sending::default(),
            senders: Senders::default(),
        }
    }

    /// Replaces the codecs.
    pub(crate) fn map_codecs<D2, E2>(
        self,
        map: impl FnOnce(D, E) -> (D2, E2),
    ) -> FramedParts<D2, E2, S> {
        let Self {
            socket,
            decoder,
            encoder,
            received,
            received_fds,
            unsent,
            receiving,
            sending,
            senders,
        } = self;
        let (decoder, encoder) = map(decoder, encoder);
        FramedParts {
            socket,
            decoder,
            encoder,
            received,
            received_fds,
            unsent,
            receiving,
            sending,
            senders,
        }
    }
}
