use bytes::BytesMut;
use tokio_util::codec;

use super::{Codec, Decoder, Encoder, FdQueue, FrameCodec, Grouping, SendBuf};
use crate::{Error, Fds, Frame, Limits, SendError};

/// Our frames, with the payload coded by a codec of `tokio_util`: typed messages with descriptors
/// beside them.
///
/// An item is the inner codec's message and the frame's descriptors. Each frame holds exactly one
/// message, so a codec whose messages can be empty does not fit.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Fds, Framed, FrameCodec, Payload, SendFd, Socket, SocketKind};
/// use futures::{SinkExt, StreamExt};
/// use tokio_util::codec::LinesCodec;
///
/// let codec = || Payload::new(FrameCodec::default(), LinesCodec::new());
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
pub struct Payload<C> {
    frames: FrameCodec,
    payload: C,
}

impl<C> Payload<C> {
    /// Frames of `frames` with the payload coded by `payload`.
    pub const fn new(frames: FrameCodec, payload: C) -> Self {
        Self { frames, payload }
    }
}

/// What is wrong with a frame or with its payload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError<E> {
    /// The frame, or the connection.
    #[error(transparent)]
    Frame(#[from] Error),

    /// The inner codec's error.
    #[error("payload: {0}")]
    Payload(E),

    /// The payload is not exactly one message of the inner codec.
    #[error("payload is not exactly one message")]
    NotOneMessage,
}

impl<C> Codec for Payload<C> {
    fn limits(&self) -> Limits {
        self.frames.limits()
    }

    fn grouping(&self) -> Grouping {
        self.frames.grouping()
    }
}

impl<C: codec::Decoder, F> Decoder<F> for Payload<C> {
    type Item = (C::Item, Fds<F>);
    type Error = PayloadError<C::Error>;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<Self::Item>, Self::Error> {
        let Some(frame) = self.frames.decode(src, fds)? else { return Ok(None) };
        let mut payload = BytesMut::from(frame.payload); // without a copy where nothing else is in the buffer
        let error = match self.payload.decode_eof(&mut payload) {
            Ok(Some(message)) if payload.is_empty() => return Ok(Some((message, frame.fds))),
            Ok(_) => PayloadError::NotOneMessage,
            Err(error) => PayloadError::Payload(error),
        };
        fds.extend(frame.fds); // closed away from the runtime, as what is left there is
        Err(error)
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&self.frames, src)
    }
}

impl<C: codec::Encoder<I>, I, F, G: From<F>> Encoder<(I, Fds<F>), G> for Payload<C> {
    type Error = PayloadError<C::Error>;

    /// # Errors
    /// The item does not come back: the inner codec takes messages by value.
    fn encode(
        &mut self,
        (message, fds): (I, Fds<F>),
        dst: &mut SendBuf<G>,
    ) -> Result<(), SendError<(I, Fds<F>), Self::Error>> {
        let mut payload = BytesMut::new();
        self.payload.encode(message, &mut payload).map_err(PayloadError::Payload)?;
        let frame = Frame { payload: payload.freeze(), fds };
        self.frames.encode(frame, dst).map_err(|error| SendError::from(PayloadError::Frame(error.error)))
    }
}
