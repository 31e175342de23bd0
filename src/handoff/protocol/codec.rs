//! The protocol's codecs: each message is the payload of one frame.

use bytes::BytesMut;

use super::{FromWorker, MAX_MESSAGE_BYTES, MAX_OFFER_FDS, NewLink, Offer, ToWorker};
use crate::{
    Error, Frame, FrameCodec, Limits, SendError,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};

/// The worker's codec: [`ToWorker`] in, [`FromWorker`] out.
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

/// The dispatcher's codec: [`FromWorker`] in, [`ToWorker`] out. See [`WorkerCodec`].
#[derive(Debug, Clone, Copy, Default)]
pub struct DispatcherCodec(());

/// Decodes what a worker sends, as [`DispatcherCodec`] does, and goes on after a message that is
/// none of the protocol's: an item is a message, or what is wrong with one. Only broken frames end
/// it.
#[derive(Debug, Default)]
pub(in crate::handoff) struct TolerantCodec {
    /// Descriptors without a message were complained of.
    complained: bool,
}

fn limits() -> Limits {
    Limits::default().max_payload_bytes(MAX_MESSAGE_BYTES).max_fds_per_frame(MAX_OFFER_FDS)
}

pub(super) fn frames() -> FrameCodec {
    FrameCodec::new(limits())
}

pub(super) fn not_a_message() -> Error {
    Error::invalid("not a message of a hand-off's dispatcher")
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
    /// Takes as many descriptors as a frame can have, to complain of them.
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
                    fds.extend(unclaimed); // closed away from the runtime, as what is left there is
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
                fds.extend(frame.fds); // closed away from the runtime, as what is left there is
                return Ok(Some(Err(Error::UnclaimedFds { fds: count })));
            }
            match FromWorker::read(&frame.payload) {
                Ok(Some(message)) => return Ok(Some(Ok(message))),
                Ok(None) => {} // an extension that is not known here
                Err(error) => return Ok(Some(Err(error))),
            }
        }
        // No message of a worker has descriptors. They are looked at last: on a stream, those of a
        // later message come with the bytes of the messages before it.
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
    /// [`Error::FrameTooLong`] for an offer with more than [`MAX_MESSAGE_BYTES`],
    /// [`Error::TooManyFds`] for one with more than [`MAX_OFFER_FDS`]. It comes back.
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
