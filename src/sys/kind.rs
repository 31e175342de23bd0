//! The kind of an open file, without asking whoever provides it.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::socket::getsockopt,
};

use super::Domain;

/// Returns true if the descriptor is a socket, of whatever kind.
pub(crate) fn is_socket(fd: BorrowedFd<'_>) -> bool {
    // EBADF is the answer for an `O_PATH` descriptor, which has no open file.
    !matches!(getsockopt(&fd, Domain), Err(Errno::ENOTSOCK | Errno::EBADF))
}

/// The type of an open file and the device that it is on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileKind {
    /// `S_IFMT` bits: `S_IFREG`, `S_IFCHR` and so on; 0 for an eventfd, an epoll instance and their kin.
    pub(crate) file_type: u32,
    /// Major and minor number of the device that the file system is on.
    pub(crate) device: (u32, u32),
    /// Major number of the device that the file is, if it is one.
    pub(crate) own_major: u32,
}

/// Returns the kind of an open file. `fstat` would ask the daemon of a FUSE file system, which may never answer; this call
/// does not (`AT_STATX_DONT_SYNC`, statx(2)).
pub(crate) fn file_kind(fd: BorrowedFd<'_>) -> io::Result<FileKind> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, and the call writes one `statx` to where there is room for it.
    let outcome = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr()) };
    Errno::result(outcome)?;
    // SAFETY: all zero is a valid value, and the call has succeeded.
    let found = unsafe { found.assume_init() };
    Ok(FileKind {
        file_type: u32::from(found.stx_mode) & libc::S_IFMT,
        device: (found.stx_dev_major, found.stx_dev_minor),
        own_major: found.stx_rdev_major,
    })
}

/// Returns true for a memfd whose content and length cannot change any more. Only a memfd can have
/// these seals.
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    seals.contains(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK)
}
