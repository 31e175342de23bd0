//! The parts of a connection, for a change of its codecs or of its owner.

use std::os::fd::OwnedFd;

use bytes::BytesMut;

use super::{
    receive::{ReceiveParts, Receiving},
    send::{SendParts, Sending},
    senders::Senders,
};
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
    /// [grouping](crate::codec::Codec::grouping) of the encoder. If no system call can carry that
    /// message, the sending direction has failed from the start.
    pub unsent: SendBuf,
    /// The state of the receiving direction. An end or a failure is kept.
    pub(crate) receiving: Receiving,
    /// The state of the sending direction. An end or a failure is kept.
    pub(crate) sending: Sending,
    /// The processes that sent the received bytes.
    pub(crate) senders: Senders,
}

impl<D, E, S> FramedParts<D, E, S> {
    /// Returns the parts of a connection that was not used yet.
    pub(crate) fn new(socket: S, decoder: D, encoder: E) -> Self {
        Self::join(socket, (decoder, ReceiveParts::default()), (encoder, SendParts::default()))
    }

    /// Puts together the socket and the two directions, each with its codec.
    pub(crate) fn join(
        socket: S,
        (decoder, receive): (D, ReceiveParts),
        (encoder, send): (E, SendParts),
    ) -> Self {
        let ReceiveParts { bytes: received, fds: received_fds, state: receiving, senders } =
            receive;
        let SendParts { unsent, state: sending } = send;
        Self {
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

    /// Takes apart what [`join`](Self::join) puts together.
    pub(crate) fn split(self) -> (S, (D, ReceiveParts), (E, SendParts)) {
        let receive = ReceiveParts {
            bytes: self.received,
            fds: self.received_fds,
            state: self.receiving,
            senders: self.senders,
        };
        let send = SendParts { unsent: self.unsent, state: self.sending };
        (self.socket, (self.decoder, receive), (self.encoder, send))
    }

    /// Replaces the codecs.
    pub(crate) fn map_codecs<D2, E2>(
        self,
        map: impl FnOnce(D, E) -> (D2, E2),
    ) -> FramedParts<D2, E2, S> {
        let (socket, (decoder, receive), (encoder, send)) = self.split();
        let (decoder, encoder) = map(decoder, encoder);
        FramedParts::join(socket, (decoder, receive), (encoder, send))
    }
}
