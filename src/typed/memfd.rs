//! Memory that is passed as a descriptor.

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    ops::Deref,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::sys;

/// Memory that is passed as a descriptor and not copied: a memfd, sealed so that nobody can change
/// its content or shorten it (memfd_create(2)).
///
/// Use it for large contents: a field [`Passed<SealedMemfd>`](super::Passed) takes a few bytes of
/// the message, for memory of any length. A message with a memfd that is not sealed is refused.
/// Otherwise the peer could change the content after it was checked, or shorten the file, which
/// kills the receiver with `SIGBUS`.
///
/// ```
/// use fdwire::typed::SealedMemfd;
///
/// let memory = SealedMemfd::new(&[7; 100_000])?;
/// assert_eq!(memory.map()?[99_999], 7);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct SealedMemfd(OwnedFd);

impl SealedMemfd {
    /// Copies `content` into new memory, and seals it.
    ///
    /// # Errors
    /// The errors of memfd_create(2) and write(2), for example if there is no free descriptor.
    pub fn new(content: &[u8]) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create("fdwire", flags)?);
        file.write_all(content)?;
        let seals = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self(file.into()))
    }

    /// Maps the memory for reading.
    ///
    /// # Errors
    /// [`InvalidData`](io::ErrorKind::InvalidData) if the memory is not sealed, which is possible
    /// only after a conversion from an `OwnedFd`. The errors of mmap(2).
    pub fn map(&self) -> io::Result<SealedBytes> {
        sys::map_sealed(self.0.as_fd()).map(SealedBytes)
    }
}

impl From<OwnedFd> for SealedMemfd {
    /// Takes any descriptor. [`map`](Self::map) checks that it is sealed.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<SealedMemfd> for OwnedFd {
    fn from(memory: SealedMemfd) -> Self {
        memory.0
    }
}

impl AsFd for SealedMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The mapped memory of a [`SealedMemfd`]. It stays mapped when the `SealedMemfd` is dropped.
/// `bytes::Bytes::from_owner` makes `Bytes` of it without a copy.
pub struct SealedBytes(memmap2::Mmap);

impl Deref for SealedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for SealedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBytes").field("len", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_length_is_mapped_as_it_was_sealed() {
        for content in [&b""[..], b"short", &[7; 1 << 20]] {
            assert_eq!(&SealedMemfd::new(content).unwrap().map().unwrap()[..], content);
        }
    }

    #[test]
    fn sealed_memory_can_be_neither_written_nor_shortened() {
        let memory = SealedMemfd::new(b"content").unwrap();
        let file = File::from(memory.0.try_clone().unwrap());
        assert!((&file).write(b"x").is_err() && file.set_len(0).is_err());
    }

    #[test]
    fn memory_that_is_not_sealed_is_not_mapped() {
        let unsealed = memfd_create("unsealed", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        File::from(unsealed.try_clone().unwrap()).write_all(b"content").unwrap();
        assert_eq!(
            SealedMemfd::from(unsealed).map().unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(SealedMemfd(file.into()).map().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
