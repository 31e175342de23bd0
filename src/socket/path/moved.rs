//! A path that moves to another process, with its socket, its lock and the right to remove it.

use std::{
    fs,
    io::Result,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use super::{
    PathGuard, identity,
    lock::{PathLock, lock_path_of, take_lock},
};

impl PathGuard {
    /// Returns the owned path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the device and inode of the path, if this process may remove it.
    pub(crate) fn path_id(&self) -> Option<(u64, u64)> {
        self.bound.filter(|_| self.may_remove)
    }

    /// Makes a copy of the lock for another process. The path stays locked until all copies are
    /// closed.
    pub(crate) fn share_lock(&mut self) -> Result<OwnedFd> {
        self.lock.share()
    }

    /// Gives up the right to remove the path, or takes it back from a process that had it.
    pub(crate) fn set_may_remove(&mut self, may_remove: bool) {
        self.may_remove = may_remove && self.lock.is_at(&self.lock_path).unwrap_or(false);
    }

    /// Takes a path whose lock its last owner has sent. This process may remove the path only if
    /// the locked file is the one beside the path. In another mount namespace, another file may be
    /// there.
    ///
    /// # Errors
    /// `AddrInUse` if the received descriptor does not have the lock.
    pub(crate) fn received(path: PathBuf, lock: OwnedFd, path_id: (u64, u64)) -> Result<Self> {
        let lock_path = lock_path_of(&path);
        let lock = PathLock::received(lock, &path)?;
        let may_remove = lock.is_at(&lock_path)?;
        Ok(Self {
            path,
            lock_path,
            lock,
            bound: Some(path_id),
            bound_for_owner_only: false,
            may_remove,
        })
    }

    /// Takes a path whose last owner has died. This process has the socket of that owner.
    ///
    /// # Errors
    /// `AddrInUse` if a live process has the lock.
    pub(crate) fn inherited(path: &Path, path_id: (u64, u64)) -> Result<Self> {
        let (lock_path, lock) = take_lock(path)?;
        let there = fs::symlink_metadata(path).ok().map(|found| identity(&found));
        let bound = Some(path_id).filter(|_| there == Some(path_id));
        let path = path.to_owned();
        Ok(Self { path, lock_path, lock, bound, bound_for_owner_only: false, may_remove: true })
    }
}
