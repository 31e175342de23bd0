//! Memory that is mapped from a descriptor.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use memmap2::{Mmap, MmapOptions};

use super::is_sealed;

/// Maps a sealed memfd for reading: nobody can write to it or shorten it.
///
/// # Errors
/// `InvalidData` if it is not sealed, and the errors of mmap(2).
pub(crate) fn map_sealed(fd: BorrowedFd<'_>) -> io::Result<Mmap> {
    if !is_sealed(fd) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "memory is not sealed against changes",
        ));
    }
    // The mapping is private, because kernels before 6.7 refuse a shared one of a write-sealed
    // file. SAFETY: seals can't be removed. So nobody writes to the file, and it does not get
    // shorter than it is when its length is read. The mapped bytes stay valid and do not change.
    unsafe { MmapOptions::new().map_copy_read_only(fd.as_raw_fd()) }
}
