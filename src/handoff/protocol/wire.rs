//! The encoding of the messages.

use std::time::Duration;

use bytes::Bytes;

use super::{
    Address, FromWorker, MAX_MESSAGE_BYTES, MAX_OFFER_FDS, NewLink, Offer, RejectReason, ToWorker,
    Transport,
};
use crate::{
    Error, Fds,
    fields::{Fields, put_long},
};

/// The bytes that a worker's HELLO begins with.
const MAGIC: [u8; 4] = *b"FDHO";

/// The type of MOVE, the only message with a descriptor besides OFFER.
const MOVE: u8 = 0x87;

/// The milliseconds of a DRAIN without a limit.
pub(super) const NO_LIMIT: u32 = u32::MAX;

impl FromWorker {
    /// Encodes the message as the payload of a frame.
    pub(super) fn to_payload(self) -> Vec<u8> {
        // Each message begins with the byte of its type. Numbers are big-endian.
        let mut dst = Vec::with_capacity(16);
        match self {
            Self::Hello { lowest, highest, max_fds, open } => {
                dst.push(0x01);
                dst.extend(MAGIC);
                dst.extend([lowest, highest, max_fds]);
                dst.extend(open.iter().flat_map(|open| open.to_be_bytes()));
            }
            Self::Demand { total } => {
                dst.push(0x02);
                dst.extend(total.to_be_bytes());
            }
            Self::Adopted { first, count } => {
                dst.push(0x03);
                dst.extend(first.to_be_bytes());
                dst.extend(count.to_be_bytes());
            }
            Self::Rejected { first, count, reason } => {
                dst.push(0x04);
                dst.extend(first.to_be_bytes());
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

    /// Returns `None` for an extension that is not known here.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not a message.
    pub(super) fn read(payload: &[u8]) -> Result<Option<Self>, Error> {
        match Self::read_known(payload) {
            None if !is_extension(payload) => {
                Err(Error::invalid("not a message of a worker of the hand-off protocol"))
            }
            message => Ok(message),
        }
    }

    /// Decodes a message. Bytes behind its fields are of a later revision, and are ignored.
    fn read_known(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        Some(match fields.u8()? {
            0x01 if fields.array()? == MAGIC => {
                let (lowest, highest, max_fds) = (fields.u8()?, fields.u8()?, fields.u8()?);
                Self::Hello { lowest, highest, max_fds, open: fields.u64() }
            }
            0x02 => Self::Demand { total: fields.u64()? },
            0x03 => Self::Adopted { first: fields.u64()?, count: fields.u32()? },
            0x04 => Self::Rejected {
                first: fields.u64()?,
                count: fields.u32()?,
                reason: RejectReason::from_number(fields.u8()?),
            },
            0x05 => Self::Load { finished: fields.u64()? },
            0x06 => Self::Pong { nonce: fields.u64()? },
            0x07 => Self::Draining,
            0x08 => Self::Goodbye,
            _ => return None,
        })
    }
}

/// Returns true if the message is of an optional type, which a peer skips if it does not know it.
fn is_extension(payload: &[u8]) -> bool {
    payload.first().is_some_and(|kind| kind & 0x40 != 0)
}

impl RejectReason {
    /// Returns true if the rejection cancels the demand that the dispatcher has not met yet.
    pub(in crate::handoff) fn is_refusal(self) -> bool {
        self != Self::Unusable
    }

    pub(super) const KNOWN: [Self; 4] =
        [Self::Full, Self::Draining, Self::Recalled, Self::Unusable];

    fn number(self) -> u8 {
        match self {
            Self::Full => 1,
            Self::Draining => 2,
            Self::Recalled => 3,
            Self::Unusable => 4,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        Self::KNOWN
            .into_iter()
            .find(|reason| reason.number() == number)
            .unwrap_or(Self::Other(number))
    }
}

impl<F> ToWorker<Offer<F>, NewLink<F>> {
    /// Encodes the message, without its descriptors, as the payload of a frame.
    ///
    /// # Errors
    /// [`Error::FrameTooLong`] or [`Error::TooManyFds`] if the message exceeds a limit.
    pub(super) fn to_payload(&self) -> Result<Vec<u8>, Error> {
        let mut dst = Vec::with_capacity(64);
        match self {
            Self::Welcome { version } => dst.extend([0x81, *version]),
            Self::Offer { number, offer } => {
                let fds = 1 + offer.bundle.len();
                if fds > MAX_OFFER_FDS {
                    return Err(Error::TooManyFds { fds, limit: MAX_OFFER_FDS });
                }
                dst.push(0x82);
                dst.extend(number.to_be_bytes());
                dst.extend(offer.cookie.to_be_bytes());
                offer.transport.put(&mut dst);
                offer.peer.put(&mut dst)?;
                offer.local.put(&mut dst)?;
                put_long(&mut dst, &offer.prefix)?;
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
                // A time too long for the field is sent as the longest one, not as `NO_LIMIT`.
                let millis = within.map_or(NO_LIMIT, |within| {
                    u32::try_from(within.as_millis()).unwrap_or(NO_LIMIT).min(NO_LIMIT - 1)
                });
                dst.push(0x85);
                dst.extend(millis.to_be_bytes());
            }
            Self::Fenced => dst.push(0x86),
            Self::Move(NewLink { cookie, .. }) => {
                dst.push(MOVE);
                dst.extend(cookie.to_be_bytes());
            }
        }
        match dst.len() {
            0..=MAX_MESSAGE_BYTES => Ok(dst),
            bytes => Err(Error::FrameTooLong { bytes, limit: MAX_MESSAGE_BYTES }),
        }
    }

    /// Returns `None` for an extension that is not known here.
    ///
    /// # Errors
    /// Returns the descriptors if it is not a message.
    pub(super) fn read(payload: &[u8], fds: Fds<F>) -> Result<Option<Self>, Fds<F>> {
        if fds.is_empty() {
            return match Self::read_without_fds(payload) {
                None if !is_extension(payload) => Err(fds),
                message => Ok(message),
            };
        }
        if payload.first() == Some(&MOVE) {
            return Self::read_move(payload, fds).map(Some);
        }
        // The number of descriptors is not among the fields: all beyond the first are the bundle.
        let Some((number, offer)) = Offer::read(payload) else { return Err(fds) };
        let Offer { cookie, transport, peer, local, prefix, metadata, .. } = offer;
        let mut fds = fds.into_iter();
        let Some(fd) = fds.next() else { return Ok(None) }; // never, as `fds` is not empty
        let bundle = fds.collect();
        Ok(Some(Self::Offer {
            number,
            offer: Offer { cookie, transport, peer, local, prefix, metadata, fd, bundle },
        }))
    }

    fn read_move(payload: &[u8], fds: Fds<F>) -> Result<Self, Fds<F>> {
        let Some(cookie) = Fields(&payload[1..]).u64() else { return Err(fds) };
        let [socket] = fds.into_array()?;
        Ok(Self::Move(NewLink { cookie, socket }))
    }

    fn read_without_fds(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        Some(match fields.u8()? {
            0x81 => Self::Welcome { version: fields.u8()? },
            0x83 => Self::Recall { before: fields.u64()? },
            0x84 => Self::Ping { nonce: fields.u64()? },
            0x85 => {
                let millis = Some(fields.u32()?).filter(|&millis| millis != NO_LIMIT);
                Self::Drain { within: millis.map(|millis| Duration::from_millis(millis.into())) }
            }
            0x86 => Self::Fenced,
            _ => return None,
        })
    }
}

impl Offer<()> {
    /// Reads the number of an offer, and the offer without its descriptors.
    fn read(payload: &[u8]) -> Option<(u64, Self)> {
        let mut fields = Fields(payload);
        if fields.u8()? != 0x82 {
            return None;
        }
        let number = fields.u64()?;
        let offer = Self {
            cookie: fields.u64()?,
            transport: Transport::read(&mut fields)?,
            peer: Address::read(&mut fields)?,
            local: Address::read(&mut fields)?,
            // Copy, because a slice would keep a whole read buffer in memory for as long as the
            // connection lives.
            prefix: Bytes::copy_from_slice(fields.long()?),
            metadata: Bytes::copy_from_slice(fields.long()?),
            fd: (),
            bundle: Vec::new(),
        };
        Some((number, offer))
    }
}
