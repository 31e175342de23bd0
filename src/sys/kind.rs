//! The kind of an open file, determined without the process or host that provides the file.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::getsockopt,
    },
};

use super::Domain;

/// Returns true if the descriptor is a socket of any kind.
pub(crate) fn is_socket(fd: BorrowedFd<'_>) -> bool {
    // The kernel returns EBADF for an `O_PATH` descriptor, which has no open file.
    !matches!(getsockopt(&fd, Domain), Err(Errno::ENOTSOCK | Errno::EBADF))
}

/// The type of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Socket,
    Regular,
    Directory,
    CharacterDevice,
    BlockDevice,
    Pipe,
    /// A file without a type: an eventfd, an epoll instance and the like.
    Other,
}

impl FileType {
    fn of_mode(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFREG => Self::Regular,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFCHR => Self::CharacterDevice,
            libc::S_IFBLK => Self::BlockDevice,
            libc::S_IFIFO => Self::Pipe,
            _ => Self::Other,
        }
    }
}

/// The type of an open file, and its device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileKind {
    pub(crate) file_type: FileType,
    /// The major and minor number of the device of the file system.
    pub(crate) device: (u32, u32),
    /// The major number of the file itself, if it is a device.
    pub(crate) own_major: u32,
}

/// Returns the kind of an open file. Unlike `fstat`, this does not wait for the daemon of a FUSE
/// file system, which may never answer (`AT_STATX_DONT_SYNC`, statx(2)).
pub(crate) fn file_kind(fd: BorrowedFd<'_>) -> io::Result<FileKind> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, and the call writes one `statx` to a place with room
    // for it.
    let outcome = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr())
    };
    Errno::result(outcome)?;
    // SAFETY: all zero is a valid value, and the call has succeeded.
    let found = unsafe { found.assume_init() };
    Ok(FileKind {
        file_type: FileType::of_mode(found.stx_mode.into()),
        device: (found.stx_dev_major, found.stx_dev_minor),
        own_major: found.stx_rdev_major,
    })
}

/// Makes an empty file in memory.
pub(crate) fn new_memfd() -> io::Result<OwnedFd> {
    Ok(memfd_create("fdwire", MFdFlags::MFD_CLOEXEC)?)
}

/// Returns true for a memfd that nobody can write to or shorten. Only a memfd can have these seals.
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    let seals =
        fcntl(fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    seals.contains(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK)
}
