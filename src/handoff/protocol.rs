#![doc = include_str!("protocol.md")]

use std::{os::fd::OwnedFd, time::Duration};

use bytes::{Bytes, BytesMut};

pub use super::address::{Address, Transport};
use crate::{Codec, Decoder, Encoder, Error, FdQueue, Frame, FrameCodec, Grouping, Limits, SendBuf, SendError};

pub(super) mod fields;
#[cfg(test)]
mod tests;

use fields::{Fields, put_long};

/// The version of the protocol that is spoken here.
pub const VERSION: u8 = 1;

/// Longest payload of a frame in bytes: what bounds the already-read bytes and the metadata of an offer, together with
/// their addresses.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// What a worker's HELLO begins with.
const MAGIC: [u8; 4] = *b"FDHO";

/// The milliseconds of a DRAIN without a limit.
const NO_LIMIT: u32 = u32::MAX;

/// What a worker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FromWorker {
    /// Its first message: the versions that it speaks.
    Hello {
        /// Lowest version.
        lowest: u8,
        /// Highest version.
        highest: u8,
    },
    /// It takes this many offers in all, counted from the beginning. Initially none; falls only after a
    /// [refusal](self#messages).
    Demand {
        /// Number of offers.
        total: u64,
    },
    /// The next unanswered offers, in the order in which they were made, are its own from here on.
    Adopted {
        /// How many of them.
        count: u32,
    },
    /// The next unanswered offers, in the order in which they were made, are not.
    Rejected {
        /// How many of them.
        count: u32,
        /// Why.
        reason: RejectReason,
    },
    /// So many adopted connections have ended, in all. Never falls.
    Load {
        /// Number of connections.
        finished: u64,
    },
    /// Answer to a [`ToWorker::Ping`].
    Pong {
        /// The ping's number.
        nonce: u64,
    },
    /// It takes no more offers.
    Draining,
    /// Its adopted connections have ended. Nothing follows.
    Goodbye,
}

/// Why a worker does not take an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectReason {
    /// It has no room, for want of descriptors mostly.
    Full,
    /// It takes no more connections.
    Draining,
    /// The dispatcher has asked for it back.
    Recalled,
    /// The descriptor is not a connection of the transport that the offer names.
    Unusable,
}

/// What a dispatcher says. `F` is the type of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToWorker<F = OwnedFd> {
    /// Its first message, once it has the worker's [`FromWorker::Hello`].
    Welcome {
        /// The version that is spoken from here on.
        version: u8,
    },
    /// A connection.
    Offer(Offer<F>),
    /// Those of the first offers that are unanswered are to be rejected at once.
    Recall {
        /// How many were made before the first that may stay: offers are numbered from 0.
        before: u64,
    },
    /// To be answered at once.
    Ping {
        /// A number to repeat.
        nonce: u64,
    },
    /// Take no more, finish what was adopted, then say [`FromWorker::Goodbye`].
    Drain {
        /// How long that may take; `None` without a limit. Goes out in whole milliseconds, at most `u32::MAX - 1` of them.
        within: Option<Duration>,
    },
}

/// A connection that is offered to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer<F = OwnedFd> {
    /// `SO_COOKIE` of the socket, which is the same for every copy of it.
    pub cookie: u64,
    /// The kind of socket.
    pub transport: Transport,
    /// Address of the client.
    pub peer: Address,
    /// Address that it has connected to.
    pub local: Address,
    /// What was already read from it. Comes before what the socket still has.
    pub read: Bytes,
    /// What the dispatcher's application says about it.
    pub metadata: Bytes,
    /// The socket.
    pub fd: F,
}

/// The worker's codec: [`ToWorker`] in, [`FromWorker`] out.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Framed, Socket, SocketKind, handoff::protocol::*};
/// use futures::{SinkExt, StreamExt};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut worker = Framed::new(a, WorkerCodec::default());
/// let mut dispatcher = Framed::new(b, DispatcherCodec::default());
///
/// worker.send(FromWorker::Hello { lowest: VERSION, highest: VERSION }).await?;
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

fn limits() -> Limits {
    Limits::default().max_payload_bytes(MAX_MESSAGE_BYTES).max_fds_per_frame(1)
}

fn frames() -> FrameCodec {
    FrameCodec::new(limits())
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

impl<F> Decoder<F> for WorkerCodec {
    type Item = ToWorker<F>;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<ToWorker<F>>, Error> {
        let Some(mut frame) = frames().decode(src, fds)? else { return Ok(None) };
        let fd = frame.fds.pop();
        ToWorker::read(&frame.payload, fd).map(Some).map_err(|fd| {
            fds.extend(fd); // closed away from the runtime, as what is left there is
            Error::invalid("not a message of a hand-off's dispatcher")
        })
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<FromWorker, F> for WorkerCodec {
    type Error = Error;

    fn encode(&mut self, message: FromWorker, dst: &mut SendBuf<F>) -> Result<(), SendError<FromWorker>> {
        let frame = Frame { payload: message.to_payload().into(), fds: Default::default() };
        frames().encode(frame, dst).map_err(|refused| SendError::refused(message, refused.error))
    }
}

impl<F> Decoder<F> for DispatcherCodec {
    type Item = FromWorker;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<FromWorker>, Error> {
        // No message of a worker has one, so it need not wait for a message to claim it.
        if fds.count() > 0 {
            return Err(Error::UnclaimedFds { fds: fds.count() });
        }
        let Some(frame) = frames().decode(src, fds)? else { return Ok(None) };
        FromWorker::read(&frame.payload).map(Some).ok_or_else(|| Error::invalid("not a message of a hand-off's worker"))
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<ToWorker<F>, F> for DispatcherCodec {
    type Error = Error;

    /// # Errors
    /// [`Error::FrameTooLong`] for an offer with more than [`MAX_MESSAGE_BYTES`]. It comes back.
    fn encode(&mut self, message: ToWorker<F>, dst: &mut SendBuf<F>) -> Result<(), SendError<ToWorker<F>>> {
        let payload = match message.to_payload() {
            Ok(payload) => payload,
            Err(error) => return Err(SendError::refused(message, error)),
        };
        let fds = match message {
            ToWorker::Offer(offer) => [offer.fd].into_iter().collect(),
            _ => Default::default(),
        };
        let frame = Frame { payload: payload.into(), fds };
        frames().encode(frame, dst).map_err(|refused| SendError::from(refused.error))
    }
}

impl FromWorker {
    fn to_payload(self) -> Vec<u8> {
        let mut dst = Vec::with_capacity(16);
        match self {
            Self::Hello { lowest, highest } => {
                dst.push(0x01);
                dst.extend(MAGIC);
                dst.extend([lowest, highest]);
            }
            Self::Demand { total } => {
                dst.push(0x02);
                dst.extend(total.to_be_bytes());
            }
            Self::Adopted { count } => {
                dst.push(0x03);
                dst.extend(count.to_be_bytes());
            }
            Self::Rejected { count, reason } => {
                dst.push(0x04);
                dst.extend(count.to_be_bytes());
                dst.push(reason.number());
            }
            Self::Load { finished } => {
                dst.push(0x05);
                dst.extend(finished.to_be_bytes());
            }
            Self::Pong { nonce } => {
                dst.push(0x06);
                dst.extend(nonce.to_be_bytes());
            }
            Self::Draining => dst.push(0x07),
            Self::Goodbye => dst.push(0x08),
        }
        dst
    }

    fn read(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let message = match fields.u8()? {
            0x01 if fields.array()? == MAGIC => Self::Hello { lowest: fields.u8()?, highest: fields.u8()? },
            0x02 => Self::Demand { total: fields.u64()? },
            0x03 => Self::Adopted { count: fields.u32()? },
            0x04 => Self::Rejected { count: fields.u32()?, reason: RejectReason::from_number(fields.u8()?)? },
            0x05 => Self::Load { finished: fields.u64()? },
            0x06 => Self::Pong { nonce: fields.u64()? },
            0x07 => Self::Draining,
            0x08 => Self::Goodbye,
            _ => return None,
        };
        fields.end().then_some(message)
    }
}

impl RejectReason {
    /// For want of room or time: makes void what was asked for and not offered.
    pub(super) fn is_refusal(self) -> bool {
        matches!(self, Self::Full | Self::Recalled)
    }

    const ALL: [Self; 4] = [Self::Full, Self::Draining, Self::Recalled, Self::Unusable];

    fn number(self) -> u8 {
        match self {
            Self::Full => 1,
            Self::Draining => 2,
            Self::Recalled => 3,
            Self::Unusable => 4,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.number() == number)
    }
}

impl<F> ToWorker<F> {
    fn to_payload(&self) -> Result<Vec<u8>, Error> {
        let mut dst = Vec::with_capacity(64);
        match self {
            Self::Welcome { version } => dst.extend([0x81, *version]),
            Self::Offer(offer) => {
                dst.push(0x82);
                dst.extend(offer.cookie.to_be_bytes());
                offer.transport.put(&mut dst);
                offer.peer.put(&mut dst)?;
                offer.local.put(&mut dst)?;
                put_long(&mut dst, &offer.read)?;
                put_long(&mut dst, &offer.metadata)?;
            }
            Self::Recall { before } => {
                dst.push(0x83);
                dst.extend(before.to_be_bytes());
            }
            Self::Ping { nonce } => {
                dst.push(0x84);
                dst.extend(nonce.to_be_bytes());
            }
            Self::Drain { within } => {
                let millis = within
                    .map_or(NO_LIMIT, |within| u32::try_from(within.as_millis()).unwrap_or(NO_LIMIT).min(NO_LIMIT - 1));
                dst.push(0x85);
                dst.extend(millis.to_be_bytes());
            }
        }
        match dst.len() {
            0..=MAX_MESSAGE_BYTES => Ok(dst),
            bytes => Err(Error::FrameTooLong { bytes, limit: MAX_MESSAGE_BYTES }),
        }
    }

    /// Gives the descriptor back where it is not a message.
    fn read(payload: &[u8], fd: Option<F>) -> Result<Self, Option<F>> {
        match fd {
            Some(fd) => match Offer::read(payload) {
                Some(offer) => Ok(Self::Offer(offer.with_fd(fd))),
                None => Err(Some(fd)),
            },
            None => Self::read_without_fd(payload).ok_or(None),
        }
    }

    fn read_without_fd(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let message = match fields.u8()? {
            0x81 => Self::Welcome { version: fields.u8()? },
            0x83 => Self::Recall { before: fields.u64()? },
            0x84 => Self::Ping { nonce: fields.u64()? },
            0x85 => {
                let millis = Some(fields.u32()?).filter(|&millis| millis != NO_LIMIT);
                Self::Drain { within: millis.map(|millis| Duration::from_millis(millis.into())) }
            }
            _ => return None,
        };
        fields.end().then_some(message)
    }
}

impl Offer<()> {
    fn read(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        if fields.u8()? != 0x82 {
            return None;
        }
        let offer = Self {
            cookie: fields.u64()?,
            transport: Transport::read(&mut fields)?,
            peer: Address::read(&mut fields)?,
            local: Address::read(&mut fields)?,
            // Copies: a slice would keep a whole read buffer for as long as the connection lives.
            read: Bytes::copy_from_slice(fields.long()?),
            metadata: Bytes::copy_from_slice(fields.long()?),
            fd: (),
        };
        fields.end().then_some(offer)
    }
}

impl<F> Offer<F> {
    fn with_fd<G>(self, fd: G) -> Offer<G> {
        let Self { cookie, transport, peer, local, read, metadata, fd: _ } = self;
        Offer { cookie, transport, peer, local, read, metadata, fd }
    }
}
