//! The codecs of the protocol. Each message is the payload of one frame.

use bytes::BytesMut;

use super::{FromWorker, MAX_MESSAGE_BYTES, MAX_OFFER_FDS, NewLink, Offer, ToWorker};
use crate::{
    Error, Frame, FrameCodec, Limits, SendError,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};

/// The worker's codec, which decodes [`ToWorker`] and encodes [`FromWorker`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Framed, Socket, SocketKind, handoff::protocol::*};
/// use futures::{SinkExt, StreamExt};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut worker = Framed::new(a, WorkerCodec::default());
/// let mut dispatcher = Framed::new(b, DispatcherCodec::default());
///
/// let hello = FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 1, open: None };
/// worker.send(hello).await?;
/// assert!(matches!(dispatcher.next().await, Some(Ok(FromWorker::Hello { lowest: 1, .. }))));
/// dispatcher.send(ToWorker::Welcome { version: VERSION }).await?;
/// assert!(matches!(worker.next().await, Some(Ok(ToWorker::Welcome { version: 1 }))));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct WorkerCodec(());

/// The dispatcher's codec, which decodes [`FromWorker`] and encodes [`ToWorker`]. See
/// [`WorkerCodec`].
#[derive(Debug, Clone, Copy, Default)]
pub struct DispatcherCodec(());

/// A decoder of a worker's messages that goes on after an invalid message, unlike
/// [`DispatcherCodec`]. An item is a message, or the error of an invalid one. Only a broken frame
/// ends the stream.
#[derive(Debug, Default)]
pub(in crate::handoff) struct TolerantCodec {
    /// An error was returned for descriptors without a message. It is returned only once.
    complained: bool,
}

fn limits() -> Limits {
    Limits::default().max_payload_bytes(MAX_MESSAGE_BYTES).max_fds_per_frame(MAX_OFFER_FDS)
}

/// Returns the codec of the frames, with the limits of the protocol.
pub(super) fn frames() -> FrameCodec {
    FrameCodec::new(limits())
}

pub(super) fn not_a_message() -> Error {
    Error::invalid("not a message of a dispatcher of the hand-off protocol")
}

impl Codec for WorkerCodec {
    fn limits(&self) -> Limits {
        limits()
    }

    fn grouping(&self) -> Grouping {
        frames().grouping()
    }
}

impl Codec for DispatcherCodec {
    fn limits(&self) -> Limits {
        limits()
    }

    fn grouping(&self) -> Grouping {
        frames().grouping()
    }
}

impl Codec for TolerantCodec {
    /// Accepts as many descriptors as a frame can have, so that they are reported as an error of
    /// their message instead of a broken frame.
    fn limits(&self) -> Limits {
        Limits::default().max_payload_bytes(MAX_MESSAGE_BYTES)
    }
}

impl<F> Decoder<F> for WorkerCodec {
    type Item = ToWorker<Offer<F>, NewLink<F>>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Error> {
        while let Some(frame) = frames().decode(src, fds)? {
            match ToWorker::read(&frame.payload, frame.fds) {
                Ok(Some(message)) => return Ok(Some(message)),
                Ok(None) => {} // an extension that is not known here
                Err(unclaimed) => {
                    // Descriptors that are left in the queue are closed in the background.
                    fds.extend(unclaimed);
                    return Err(not_a_message());
                }
            }
        }
        Ok(None)
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<FromWorker, F> for WorkerCodec {
    type Error = Error;

    fn encode(
        &mut self,
        message: FromWorker,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<FromWorker>> {
        let frame = Frame { payload: message.to_payload().into(), fds: Default::default() };
        frames().encode(frame, dst).map_err(|refused| SendError::refused(message, refused.error))
    }
}

impl<F> Decoder<F> for TolerantCodec {
    type Item = Result<FromWorker, Error>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Error> {
        while let Some(frame) = FrameCodec::new(self.limits()).decode(src, fds)? {
            if !frame.fds.is_empty() {
                let count = frame.fds.len();
                // Descriptors that are left in the queue are closed in the background.
                fds.extend(frame.fds);
                return Ok(Some(Err(Error::UnclaimedFds { fds: count })));
            }
            match FromWorker::read(&frame.payload) {
                Ok(Some(message)) => return Ok(Some(Ok(message))),
                Ok(None) => {} // an extension that is not known here
                Err(error) => return Ok(Some(Err(error))),
            }
        }
        // No message of a worker has descriptors. Report those without a message only after all
        // messages: on a stream, descriptors can arrive before the frame that they belong to.
        let surplus = fds.count() > 0 && !std::mem::replace(&mut self.complained, fds.count() > 0);
        Ok(surplus.then(|| Err(Error::UnclaimedFds { fds: fds.count() })))
    }

    fn decode_eof(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Error> {
        match self.decode(src, fds)? {
            None if !src.is_empty() => Err(Error::UnexpectedEnd { bytes: src.len() }),
            item => Ok(item),
        }
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Decoder<F> for DispatcherCodec {
    type Item = FromWorker;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<FromWorker>, Error> {
        TolerantCodec::default().decode(src, fds)?.transpose()
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<ToWorker<Offer<F>, NewLink<F>>, F> for DispatcherCodec {
    type Error = Error;

    /// # Errors
    /// [`Error::FrameTooLong`] for an offer of more than [`MAX_MESSAGE_BYTES`], and
    /// [`Error::TooManyFds`] for one with more than [`MAX_OFFER_FDS`]. The error returns the offer.
    fn encode(
        &mut self,
        message: ToWorker<Offer<F>, NewLink<F>>,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<ToWorker<Offer<F>, NewLink<F>>>> {
        let payload = match message.to_payload() {
            Ok(payload) => payload,
            Err(error) => return Err(SendError::refused(message, error)),
        };
        let fds = match message {
            ToWorker::Offer { offer, .. } => [offer.fd].into_iter().chain(offer.bundle).collect(),
            ToWorker::Move(link) => [link.socket].into_iter().collect(),
            _ => Default::default(),
        };
        let frame = Frame { payload: payload.into(), fds };
        frames().encode(frame, dst).map_err(|refused| SendError::from(refused.error))
    }
}
