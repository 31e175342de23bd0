//! The kind of an open file, without asking the process or host that provides the file.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::{errno::Errno, libc, sys::socket::getsockopt};

use super::Domain;

/// Returns true if the descriptor is a socket of any kind.
pub(crate) fn is_socket(fd: BorrowedFd<'_>) -> bool {
    // EBADF is the answer for an `O_PATH` descriptor, which has no open file.
    !matches!(getsockopt(&fd, Domain), Err(Errno::ENOTSOCK | Errno::EBADF))
}

/// The type of an open file and the device that it is on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileKind {
    /// The `S_IFMT` bits: `S_IFREG`, `S_IFCHR` and so on. They are 0 for an eventfd, an epoll
    /// instance and the like.
    pub(crate) file_type: u32,
    /// The major and minor number of the device that the file system is on.
    pub(crate) device: (u32, u32),
    /// The major number of the file itself, if it is a device.
    pub(crate) own_major: u32,
}

/// Returns the kind of an open file. Unlike `fstat`, the call does not ask the daemon of a FUSE
/// file system, which may never answer (`AT_STATX_DONT_SYNC`, statx(2)).
pub(crate) fn file_kind(fd: BorrowedFd<'_>) -> io::Result<FileKind> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, and the call writes one `statx` to a place with room
    // for it.
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
