//! The fields of the messages of a hand-off and of a takeover: numbers, and bytes that follow their
//! length. Everything is big-endian, without padding.

use crate::error::Error;

/// The part of a payload that was not read yet. Every method returns `None` if too little is left.
#[derive(Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    /// Reads a field of `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads a byte that is 0 or 1.
    pub(crate) fn bool(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// Reads bytes after a `u16` with their number.
    pub(crate) fn short(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?.into();
        self.bytes(length)
    }

    /// Reads bytes after a `u32` with their number.
    pub(crate) fn long(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    /// Reads bytes after a `u16` with their number, which have to be UTF-8.
    pub(crate) fn text(&mut self) -> Option<String> {
        Some(std::str::from_utf8(self.short()?).ok()?.to_owned())
    }

    /// Takes everything that was not read yet.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Returns true if nothing is left.
    pub(crate) fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (field, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(field)
    }
}

/// Appends bytes after a `u16` with their number.
pub(crate) fn put_short(dst: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Error> {
    dst.extend(
        u16::try_from(bytes.len()).map_err(|_| too_long(bytes, u16::MAX.into()))?.to_be_bytes(),
    );
    dst.extend(bytes);
    Ok(())
}

/// Appends bytes after a `u32` with their number.
pub(crate) fn put_long(dst: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Error> {
    dst.extend(
        u32::try_from(bytes.len()).map_err(|_| too_long(bytes, u32::MAX as usize))?.to_be_bytes(),
    );
    dst.extend(bytes);
    Ok(())
}

/// Returns the error for a field that is longer than its length can express.
fn too_long(bytes: &[u8], limit: usize) -> Error {
    Error::FrameTooLong { bytes: bytes.len(), limit }
}
