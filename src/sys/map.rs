//! Memory that is mapped from a descriptor.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use memmap2::{Mmap, MmapOptions};

use super::is_sealed;

/// Maps a memfd for reading that nobody can write to or shorten.
pub(crate) fn map_sealed(fd: BorrowedFd<'_>) -> io::Result<Mmap> {
    if !is_sealed(fd) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "memory is not sealed against changes",
        ));
    }
    // It is private, because kernels before 6.7 refuse a shared mapping of a write-sealed file.
    // SAFETY: seals cannot be taken off. So nobody writes to the file, and it does not get shorter
    // than it is when its length is asked for: the mapped bytes stay there and stay the same.
    unsafe { MmapOptions::new().map_copy_read_only(fd.as_raw_fd()) }
}
