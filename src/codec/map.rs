//! A codec with another type of message.

use bytes::BytesMut;

use super::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf};
use crate::{error::SendError, limits::Limits};

/// A codec with your own type of message over another codec, made by [`Codec::map`].
#[derive(Debug, Clone, Copy)]
pub struct Map<C, D, E> {
    pub(super) codec: C,
    pub(super) decoded: D,
    pub(super) encoded: E,
}

impl<C: Codec, D, E> Codec for Map<C, D, E> {
    fn limits(&self) -> Limits {
        self.codec.limits()
    }

    fn grouping(&self) -> Grouping {
        self.codec.grouping()
    }
}

impl<C, D, E, T, F> Decoder<F> for Map<C, D, E>
where
    C: Decoder<F>,
    D: FnMut(C::Item) -> Result<T, C::Error>,
{
    type Item = T;
    type Error = C::Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<T>, C::Error> {
        self.codec.decode(src, fds)?.map(&mut self.decoded).transpose()
    }

    fn decode_eof(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<T>, C::Error> {
        self.codec.decode_eof(src, fds)?.map(&mut self.decoded).transpose()
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        self.codec.missing_bytes(src)
    }

    fn max_receive_bytes(&self) -> usize {
        self.codec.max_receive_bytes()
    }
}

impl<C, D, E, I, M, F> Encoder<I, F> for Map<C, D, E>
where
    C: Encoder<M, F>,
    E: FnMut(I) -> Result<M, SendError<I, C::Error>>,
{
    type Error = C::Error;

    fn encode(&mut self, item: I, dst: &mut SendBuf<F>) -> Result<(), SendError<I, C::Error>> {
        let message = (self.encoded)(item)?;
        self.codec.encode(message, dst).map_err(|refused| SendError::from(refused.error))
    }
}
