//! The fields of messages: numbers, and bytes with their length before them. Big-endian, without padding.

use crate::Error;

/// What is left of a payload. Everything returns `None` where it is too short.
#[derive(Debug)]
pub(in crate::handoff) struct Fields<'a>(pub(in crate::handoff) &'a [u8]);

impl<'a> Fields<'a> {
    pub(in crate::handoff) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    pub(in crate::handoff) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(in crate::handoff) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(in crate::handoff) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(in crate::handoff) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Bytes after a `u16` with their number.
    pub(in crate::handoff) fn short(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?.into();
        self.bytes(length)
    }

    /// Bytes after a `u32` with their number.
    pub(in crate::handoff) fn long(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (field, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(field)
    }
}

pub(in crate::handoff) fn put_short(dst: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Error> {
    dst.extend(u16::try_from(bytes.len()).map_err(|_| too_long(bytes, u16::MAX.into()))?.to_be_bytes());
    dst.extend(bytes);
    Ok(())
}

pub(in crate::handoff) fn put_long(dst: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Error> {
    dst.extend(u32::try_from(bytes.len()).map_err(|_| too_long(bytes, u32::MAX as usize))?.to_be_bytes());
    dst.extend(bytes);
    Ok(())
}

fn too_long(bytes: &[u8], limit: usize) -> Error {
    Error::FrameTooLong { bytes: bytes.len(), limit }
}
