//! The lock file beside a path.

use std::{
    fs::{File, OpenOptions},
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    sys::stat::{fstat, lstat},
};

use super::in_use;
use crate::sys;

/// An exclusive lock. It is held as long as this value or a copy of its descriptor exists.
#[derive(Debug)]
pub(super) struct PathLock {
    file: OwnedFd,
    /// True if another process may have a copy that is to keep the lock. Otherwise the lock is
    /// released explicitly, because between its fork and its exec a child has a copy of the
    /// descriptor.
    is_shared: bool,
}

impl PathLock {
    /// Locks an open file. Returns `None` if it is no longer the file at `lock_path`. The last
    /// holder removes the file before it unlocks it, so a lock on a removed file protects nothing.
    ///
    /// # Errors
    /// `EAGAIN` if another open file has the lock.
    pub(super) fn of(file: impl Into<OwnedFd>, lock_path: &Path) -> nix::Result<Option<Self>> {
        let file = file.into();
        sys::try_lock(file.as_fd())?;
        let lock = Self { file, is_shared: false };
        Ok(lock.is_at(lock_path)?.then_some(lock))
    }

    /// Takes over a lock from another process, which has sent a copy of the descriptor.
    ///
    /// # Errors
    /// `AddrInUse` if the descriptor does not have the lock.
    pub(super) fn received(file: OwnedFd, path: &Path) -> Result<Self> {
        sys::try_lock(file.as_fd()).map_err(|_| in_use(path))?;
        Ok(Self { file, is_shared: true })
    }

    /// Makes a copy for another process.
    pub(super) fn share(&mut self) -> Result<OwnedFd> {
        let copy = self.file.try_clone()?;
        self.is_shared = true;
        Ok(copy)
    }

    /// Returns true if the locked file is the one at `lock_path`.
    pub(super) fn is_at(&self, lock_path: &Path) -> nix::Result<bool> {
        let ours = fstat(&self.file)?;
        match lstat(lock_path) {
            Err(Errno::ENOENT) => Ok(false),
            there => there.map(|there| (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)),
        }
    }
}

impl AsFd for PathLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        if !self.is_shared {
            sys::unlock(self.file.as_fd());
        }
    }
}

/// Locks the file beside `path`, which it makes if it is missing.
pub(super) fn take_lock(path: &Path) -> Result<(PathBuf, PathLock)> {
    let lock_path = lock_path_of(path);
    loop {
        let file = open_lock(&lock_path)?;
        match PathLock::of(file, &lock_path) {
            Ok(Some(lock)) => return Ok((lock_path, lock)),
            Ok(None) => {} // the last holder has removed the file: make a new one
            Err(Errno::EAGAIN) => return Err(in_use(path)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns the path of the lock file.
pub(super) fn lock_path_of(path: &Path) -> PathBuf {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    lock_path.into()
}

/// Opens the lock file.
///
/// # Errors
/// `AlreadyExists` if something other than a regular file is there.
pub(super) fn open_lock(lock_path: &Path) -> Result<File> {
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // If other uids may write to the directory, they may have put another file there.
        // O_NOFOLLOW refuses symbolic links. Without O_NONBLOCK, opening a FIFO would wait for a
        // reader.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(lock_path);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(not_a_lock(lock_path)),
        Err(error) => match error.raw_os_error() {
            // A FIFO without a reader, a socket, a directory, or a symbolic link.
            Some(libc::ENXIO | libc::EISDIR | libc::ELOOP) => Err(not_a_lock(lock_path)),
            _ => Err(Error::new(error.kind(), format!("{}: {error}", lock_path.display()))),
        },
    }
}

/// Returns the error for another type of file at the path of the lock.
fn not_a_lock(lock_path: &Path) -> Error {
    let lock_path = lock_path.display();
    let reason =
        format!("{lock_path} is not a regular file, so it cannot be used as the lock; remove it");
    Error::new(ErrorKind::AlreadyExists, reason)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_lock_on_a_removed_file_is_not_taken_for_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket.lock");

        let removed = open_lock(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(PathLock::of(removed, &path).unwrap().is_none(), "nothing is there any longer");

        let replaced = open_lock(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let holder = PathLock::of(open_lock(&path).unwrap(), &path).unwrap();
        assert!(holder.is_some());
        assert!(PathLock::of(replaced, &path).unwrap().is_none(), "two hold the path");

        let late = open_lock(&path).unwrap();
        assert_eq!(PathLock::of(late, &path).unwrap_err(), Errno::EAGAIN);
    }

    #[test]
    fn a_shared_lock_is_held_until_the_last_copy_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (lock_path, mut first) = take_lock(&path).unwrap();
        let second = PathLock::received(first.share().unwrap(), &path).unwrap();
        drop(first);
        assert_eq!(take_lock(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert!(second.is_at(&lock_path).unwrap());
        // A lock that is not held is not taken for one.
        let stranger = open_lock(&lock_path).unwrap();
        assert!(PathLock::received(stranger.into(), &path).is_err());
        drop(second);
        take_lock(&path).unwrap();
    }
}
