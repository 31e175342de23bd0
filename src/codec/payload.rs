//! Frames whose payload is in a format of `tokio_util`.

use bytes::BytesMut;
use tokio_util::codec;

use super::{Codec, Decoder, Encoder, FdQueue, FrameCodec, Grouping, SendBuf};
use crate::{
    error::{Error, SendError},
    frame::{Fds, Frame},
    limits::Limits,
};

/// The codec of frames whose payload is encoded by a codec of `tokio_util`: typed messages with
/// descriptors.
///
/// An item is a message of the inner codec and the descriptors of the frame. Each frame contains
/// exactly one message, so the inner codec must not have empty messages.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Fds, FrameCodec, Framed, SendFd, Socket, SocketKind, codec::PayloadCodec};
/// use futures::{SinkExt, StreamExt};
/// use tokio_util::codec::LinesCodec;
///
/// let codec = || PayloadCodec::new(FrameCodec::default(), LinesCodec::new());
/// let (a, b) = Socket::pair(SocketKind::Stream)?;
/// let (mut a, mut b) = (Framed::new(a, codec()), Framed::new(b, codec()));
///
/// let fds = Fds::from_iter([SendFd::from(std::fs::File::open("/dev/null")?)]);
/// a.send(("a line", fds)).await?;
/// let (line, fds) = b.next().await.ok_or("gone")??;
/// assert_eq!((&line[..], fds.len()), ("a line", 1));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct PayloadCodec<C> {
    frames: FrameCodec,
    payload: C,
}

impl<C> PayloadCodec<C> {
    /// Returns a codec for frames of `frames`, whose payload is encoded by `payload`.
    pub const fn new(frames: FrameCodec, payload: C) -> Self {
        Self { frames, payload }
    }
}

/// An error of a frame or of its payload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError<E> {
    /// The error of the frame, or of the connection.
    #[error(transparent)]
    Frame(#[from] Error),

    /// The error of the inner codec.
    #[error("payload: {0}")]
    Payload(E),

    /// The payload is not exactly one message of the inner codec.
    #[error("payload is not exactly one message")]
    NotOneMessage,
}

impl<C> Codec for PayloadCodec<C> {
    fn limits(&self) -> Limits {
        self.frames.limits()
    }

    fn grouping(&self) -> Grouping {
        self.frames.grouping()
    }
}

impl<C: codec::Decoder, F> Decoder<F> for PayloadCodec<C> {
    type Item = (C::Item, Fds<F>);
    type Error = PayloadError<C::Error>;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Self::Error> {
        let Some(frame) = self.frames.decode(src, fds)? else { return Ok(None) };
        // This makes no copy if nothing else is in the buffer.
        let mut payload = BytesMut::from(frame.payload);
        let error = match self.payload.decode_eof(&mut payload) {
            Ok(Some(message)) if payload.is_empty() => return Ok(Some((message, frame.fds))),
            Ok(_) => PayloadError::NotOneMessage,
            Err(error) => PayloadError::Payload(error),
        };
        // Descriptors that are left in the queue are closed in the background.
        fds.extend(frame.fds);
        Err(error)
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&self.frames, src)
    }
}

impl<C: codec::Encoder<I>, I, F, G: From<F>> Encoder<(I, Fds<F>), G> for PayloadCodec<C> {
    type Error = PayloadError<C::Error>;

    /// # Errors
    /// An item that is refused does not come back, because the inner codec takes messages by value.
    fn encode(
        &mut self,
        (message, fds): (I, Fds<F>),
        dst: &mut SendBuf<G>,
    ) -> Result<(), SendError<(I, Fds<F>), Self::Error>> {
        let mut payload = BytesMut::new();
        self.payload.encode(message, &mut payload).map_err(PayloadError::Payload)?;
        let frame = Frame { payload: payload.freeze(), fds };
        self.frames
            .encode(frame, dst)
            .map_err(|error| SendError::from(PayloadError::Frame(error.error)))
    }
}
