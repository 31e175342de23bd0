//! Addresses, and who owns a path.

use std::{
    fs::{self, File, OpenOptions},
    io::{Error, ErrorKind, Result},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    libc,
    sys::socket::UnixAddr,
};

pub(super) fn unix_addr(addr: &SocketAddr) -> Result<UnixAddr> {
    match (addr.as_pathname(), addr.as_abstract_name()) {
        (Some(path), _) => Ok(UnixAddr::new(path)?),
        (_, Some(name)) => Ok(UnixAddr::new_abstract(name)?),
        _ => Err(Error::new(ErrorKind::InvalidInput, "the address has no name")),
    }
}

/// The right to bind a socket to a path, and to remove it from there.
///
/// Held by a lock on a file beside the path, which the kernel releases when the process dies. Without it, two
/// processes that both find a stale socket can remove each other's new one.
#[derive(Debug)]
pub(super) struct PathGuard {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: Flock<File>,
    /// Device and inode of the bound socket.
    bound: Option<(u64, u64)>,
}

impl PathGuard {
    /// Takes the path, and removes a socket there that nobody listens on.
    ///
    /// # Errors
    /// `AddrInUse` if a live process has it, `AlreadyExists` if something else than a socket is there.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?; // the working directory may change before the drop
        let (lock_path, lock) = take_lock(&path)?;
        let guard = Self { path, lock_path, _lock: lock, bound: None };
        guard.remove_stale()?;
        Ok(guard)
    }

    fn remove_stale(&self) -> Result<()> {
        let path = &self.path;
        let found = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        if !found.file_type().is_socket() {
            let reason = format!("{} exists and is not a socket", path.display());
            return Err(Error::new(ErrorKind::AlreadyExists, reason));
        }
        // Not every listener takes the lock. Asked with a datagram socket, a live one refuses the type (EPROTOTYPE) and
        // notices nothing; a socket that nobody has open refuses the connection.
        match UnixDatagram::unbound()?.connect(path) {
            Err(error) => match error.raw_os_error() {
                Some(libc::ECONNREFUSED) => match fs::remove_file(path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                },
                Some(libc::ENOENT) => Ok(()),
                Some(libc::EPROTOTYPE) => Err(in_use(path)),
                _ => Err(error),
            },
            Ok(()) => Err(in_use(path)),
        }
    }

    /// The socket is bound: from here on, it is removed on drop.
    pub(super) fn bound(&mut self) -> Result<()> {
        let metadata = fs::symlink_metadata(&self.path)?;
        self.bound = Some((metadata.dev(), metadata.ino()));
        Ok(())
    }

    /// Leaves the socket in its place: another process listens on it.
    pub(super) fn hand_on(mut self) {
        self.bound = None;
    }
}

impl Drop for PathGuard {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if self.bound.is_some() && self.bound == there {
            let _ = fs::remove_file(&self.path);
        }
        let _ = fs::remove_file(&self.lock_path); // the lock is still held
    }
}

fn take_lock(path: &Path) -> Result<(PathBuf, Flock<File>)> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&lock_path)
            .map_err(|error| Error::new(error.kind(), format!("{}: {error}", lock_path.display())))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EAGAIN)) => return Err(in_use(path)),
            Err((_, error)) => return Err(error.into()),
        };
        // The last holder removes the file: what was locked may no longer be the one at the path.
        let ours = lock.metadata()?;
        let there = fs::symlink_metadata(&lock_path).ok();
        if there.is_some_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok((lock_path, lock));
        }
    }
}

fn in_use(path: &Path) -> Error {
    Error::new(ErrorKind::AddrInUse, format!("{} is in use by a live process", path.display()))
}
