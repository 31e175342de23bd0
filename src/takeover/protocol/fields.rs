//! The fields of messages: numbers, and bytes after their length. Big-endian, without padding.

use crate::Error;

/// The part of a payload that was not read yet. Every method returns `None` if it is too short.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads bytes after a `u16` with their number.
    pub(super) fn short(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?.into();
        let (field, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(field)
    }

    /// Reads bytes after a `u16` with their number, which have to be UTF-8.
    pub(super) fn text(&mut self) -> Option<String> {
        Some(std::str::from_utf8(self.short()?).ok()?.to_owned())
    }

    /// Takes all that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Returns true if nothing is left.
    pub(super) fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends bytes after a `u16` with their number.
pub(super) fn put_short(dst: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Error> {
    let too_long = Error::FrameTooLong { bytes: bytes.len(), limit: u16::MAX.into() };
    dst.extend(u16::try_from(bytes.len()).map_err(|_| too_long)?.to_be_bytes());
    dst.extend(bytes);
    Ok(())
}
