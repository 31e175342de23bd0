//! The wire format of this crate.

use bytes::{Buf, BytesMut};

use super::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf, send_buf::SHARE_FROM};
use crate::{
    error::{Error, SendError},
    frame::Frame,
    limits::{Limits, SCM_MAX_FD},
};

/// The wire format of this crate, version 1: a header of 8 bytes, then the payload.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 1 | magic `0xFD` |
/// | 1 | 1 | version in the high four bits (1), flags in the low four (0; others are refused) |
/// | 2 | 2, big-endian | number of descriptors of this frame |
/// | 4 | 4, big-endian | length of the payload in bytes |
///
/// The descriptors of a frame are the next ones in the order of arrival. A receiver that has all
/// bytes of a frame has all its descriptors. A sender attaches them to the frame's first byte. If
/// they are more than one call takes, it attaches the others to later bytes of the frame.
/// Descriptors may come before their frame: at most 253 arrive before the first byte of their
/// frame.
///
/// The format is the same on both kinds of socket, and packet boundaries have no meaning. A
/// receiver in another language needs room for 65,600 bytes on SEQPACKET. If the whole header of an
/// unfinished frame has come, and more than 65,600 bytes of the frame are missing, it needs room
/// for everything that is missing.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrameCodec {
    limits: Limits,
}

impl FrameCodec {
    /// Returns a codec for frames within these limits, in both directions.
    pub const fn new(limits: Limits) -> Self {
        Self { limits }
    }

    /// Checks a header against the limits, and that its frame can be sent.
    #[inline]
    fn check(&self, header: Header) -> Result<(), Error> {
        let Header { fds, payload_bytes } = header;
        if payload_bytes > self.limits.max_payload_bytes {
            return Err(Error::FrameTooLong {
                bytes: payload_bytes,
                limit: self.limits.max_payload_bytes,
            });
        }
        if fds > self.limits.max_fds_per_frame {
            return Err(Error::TooManyFds { fds, limit: self.limits.max_fds_per_frame });
        }
        if fds > SCM_MAX_FD.saturating_mul(header.frame_bytes()) {
            return Err(Error::TooManyFdsForLength { fds, bytes: header.frame_bytes() });
        }
        Ok(())
    }
}

impl Codec for FrameCodec {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns `Free`, because the receiver takes the number of descriptors from the header.
    fn grouping(&self) -> Grouping {
        Grouping::Free
    }
}

impl<F> Decoder<F> for FrameCodec {
    type Item = Frame<F>;
    type Error = Error;

    #[inline(always)]
    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Frame<F>>, Error> {
        let Some(header) = Header::read(src)? else { return Ok(None) };
        self.check(header)?;
        if src.len() < header.frame_bytes() {
            return Ok(None);
        }
        let Some(fds) = fds.take(header.fds) else { return Err(fds.missing(header.fds)) };
        let mut payload = src.split_to(header.frame_bytes()).freeze();
        payload.advance(Header::LEN);
        Ok(Some(Frame { payload, fds }))
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        let header = Header::read(src).ok()??;
        Some(header.frame_bytes().saturating_sub(src.len()))
    }
}

impl<F, G: From<F>> Encoder<Frame<F>, G> for FrameCodec {
    type Error = Error;

    #[inline]
    fn encode(&mut self, frame: Frame<F>, dst: &mut SendBuf<G>) -> Result<(), SendError<Frame<F>>> {
        let payload_bytes = frame.payload.len();
        let is_short = payload_bytes < SHARE_FROM && payload_bytes <= self.limits.max_payload_bytes;
        if !is_short || !frame.fds.is_empty() {
            return self.encode_long(frame, dst);
        }
        // A short message is sent in one packet, so its length need not be announced.
        dst.put_header_and_payload(Header::bytes(0, payload_bytes as u32), &frame.payload);
        Ok(())
    }
}

impl FrameCodec {
    /// Encodes a frame of any length, with or without descriptors.
    #[inline(never)] // so that `encode` is short
    fn encode_long<F, G: From<F>>(
        &self,
        frame: Frame<F>,
        dst: &mut SendBuf<G>,
    ) -> Result<(), SendError<Frame<F>>> {
        let header = Header { fds: frame.fds.len(), payload_bytes: frame.payload.len() };
        let encoded = match self.check(header).and_then(|()| header.to_bytes()) {
            Ok(encoded) => encoded,
            Err(error) => return Err(SendError::refused(frame, error)),
        };
        dst.put_slice(&encoded);
        dst.announce_length();
        dst.put_shared(frame.payload);
        if !frame.fds.is_empty() {
            dst.put_fds(frame.fds);
        }
        Ok(())
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy)]
struct Header {
    fds: usize,
    payload_bytes: usize,
}

impl Header {
    const LEN: usize = 8;
    const MAGIC: u8 = 0xFD;
    const VERSION: u8 = 1;

    /// Returns the length of the whole frame. It cannot overflow on 64 bits: the payload's length
    /// comes from 32 bits or from memory.
    fn frame_bytes(self) -> usize {
        Self::LEN.saturating_add(self.payload_bytes)
    }

    /// Reads the header at the start of `src`. Returns `None` if it is not complete. Each byte is
    /// checked as soon as it has come, because a foreign peer may wait for an answer and never send
    /// eight bytes.
    #[inline]
    fn read(src: &[u8]) -> Result<Option<Self>, Error> {
        if let Some(&found) = src.first()
            && found != Self::MAGIC
        {
            return Err(Error::BadMagic { found });
        }
        if let Some(&byte) = src.get(1) {
            let (version, flags) = (byte >> 4, byte & 0x0F);
            if version != Self::VERSION {
                return Err(Error::UnsupportedVersion { found: version });
            }
            if flags != 0 {
                return Err(Error::UnsupportedFlags { found: flags });
            }
        }
        let Some(&[_, _, f0, f1, p0, p1, p2, p3]) = src.first_chunk::<{ Self::LEN }>() else {
            return Ok(None);
        };
        Ok(Some(Self {
            fds: u16::from_be_bytes([f0, f1]).into(),
            payload_bytes: u32::from_be_bytes([p0, p1, p2, p3]) as usize,
        }))
    }

    #[inline]
    fn to_bytes(self) -> Result<[u8; Self::LEN], Error> {
        let fds = u16::try_from(self.fds)
            .map_err(|_| Error::TooManyFds { fds: self.fds, limit: u16::MAX.into() })?;
        let payload_bytes = u32::try_from(self.payload_bytes).map_err(|_| Error::FrameTooLong {
            bytes: self.payload_bytes,
            limit: u32::MAX as usize,
        })?;
        Ok(Self::bytes(fds, payload_bytes))
    }

    #[inline]
    fn bytes(fds: u16, payload_bytes: u32) -> [u8; Self::LEN] {
        let start = u64::from(Self::MAGIC) << 56 | u64::from(Self::VERSION) << 52;
        (start | u64::from(fds) << 32 | u64::from(payload_bytes)).to_be_bytes()
    }
}
