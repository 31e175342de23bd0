use std::os::fd::OwnedFd;

use bytes::BytesMut;

use super::{Receiving, Senders, Sending};
use crate::{FdQueue, SendBuf, Socket};

/// What a [`Framed`](crate::Framed) consists of, from
/// [`Framed::into_parts`](crate::Framed::into_parts). `S` is the type of its socket.
#[derive(Debug)]
#[non_exhaustive]
pub struct Parts<D, E = D, S = Socket> {
    /// The socket.
    pub socket: S,
    /// Decodes what arrives.
    pub decoder: D,
    /// Encodes what is sent.
    pub encoder: E,
    /// Bytes received and not decoded.
    pub received: BytesMut,
    /// Descriptors received that no message has claimed.
    pub received_fds: FdQueue<OwnedFd>,
    /// Bytes and descriptors accepted and not sent. What you append is sent as one more message,
    /// with the [grouping](crate::Codec::grouping) that the encoder asks for when everything is put
    /// together again. If no call can carry it, the sending direction has failed then.
    pub unsent: SendBuf,
    /// How far each direction has come: what has ended stays so.
    pub(crate) receiving: Receiving,
    pub(crate) sending: Sending,
    /// The processes that sent what was received.
    pub(crate) senders: Senders,
}

impl<D, E, S> Parts<D, E, S> {
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
    pub(crate) fn map_codecs<D2, E2>(self, map: impl FnOnce(D, E) -> (D2, E2)) -> Parts<D2, E2, S> {
        let Self { socket, decoder, encoder, received, received_fds, unsent, receiving, sending, senders } = self;
        let (decoder, encoder) = map(decoder, encoder);
        Parts { socket, decoder, encoder, received, received_fds, unsent, receiving, sending, senders }
    }
}
