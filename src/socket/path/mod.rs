//! The ownership of a path, by a lock file beside it.

mod lock;
mod moved;

use std::{
    fs::{self, Metadata, OpenOptions, Permissions},
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixDatagram,
        },
    },
    path::{Path, PathBuf},
};

use lock::{PathLock, take_lock};
use nix::{
    libc,
    sys::{
        socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr},
        stat::{Mode, fchmod},
    },
};

/// The right to bind a socket to a path, and to remove it from there.
///
/// It holds a lock on a file beside the path. The kernel releases the lock when the process dies.
/// Without the lock, two processes that both find a stale socket could remove each other's new
/// socket.
#[derive(Debug)]
pub(crate) struct PathGuard {
    path: PathBuf,
    lock_path: PathBuf,
    lock: PathLock,
    /// The device and inode of the bound socket.
    bound: Option<(u64, u64)>,
    /// True if the path was made with a mode that lets only the owner connect.
    bound_for_owner_only: bool,
    /// False while another process owns the path, with a copy of the lock.
    may_remove: bool,
}

impl PathGuard {
    /// Takes the path, and removes a stale socket.
    ///
    /// # Errors
    /// `AddrInUse` if a live process has the path. `AlreadyExists` if something other than a socket
    /// is there, or if the lock file is not a regular file.
    pub(crate) fn take(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?; // the working directory may change before the drop
        let (lock_path, lock) = take_lock(&path)?;
        let guard = Self {
            path,
            lock_path,
            lock,
            bound: None,
            bound_for_owner_only: false,
            may_remove: true,
        };
        guard.remove_stale()?;
        Ok(guard)
    }

    /// Removes a socket that no process has open.
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
        // Other programs may listen there without the lock. So try to connect with a datagram
        // socket. The kernel refuses its type for a live listener (EPROTOTYPE), which does not
        // notice the attempt. For a socket that no process has open, it refuses the connection.
        match UnixDatagram::unbound()?.connect(path) {
            Err(error) => match error.raw_os_error() {
                Some(libc::ECONNREFUSED) => match fs::remove_file(path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                },
                Some(libc::ENOENT) => Ok(()),
                // EPERM: a datagram socket that is connected to another one.
                Some(libc::EPROTOTYPE | libc::EPERM) => Err(in_use(path)),
                _ => Err(error),
            },
            Ok(()) => Err(in_use(path)),
        }
    }

    /// Binds a socket, and gives the path exactly this mode. From then on, the socket is removed on
    /// drop.
    ///
    /// `bind` applies the umask to the mode of the path, and a change of the umask would affect the
    /// whole process. So the path is made with a mode that admits only the owner, and gets its
    /// final mode before the socket listens.
    ///
    /// # Errors
    /// The errors of bind(2) and chmod(2), the latter with a reason.
    pub(crate) fn bind(&mut self, socket: &OwnedFd, addr: &UnixAddr, mode: u32) -> Result<()> {
        // `bind` gives the path the mode that the socket has before.
        let mode = mode & 0o777;
        let initial = initial_mode(mode);
        fchmod(socket, Mode::from_bits_truncate(initial))?;
        socket::bind(socket.as_raw_fd(), addr)?;
        self.finish_bind(initial, mode)
    }

    /// Binds a new non-blocking socket. Unless it is a datagram socket, it listens then.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind), socket(2) and listen(2).
    pub(crate) fn bind_new(&mut self, kind: SockType, mode: u32) -> Result<OwnedFd> {
        let addr = UnixAddr::new(&self.path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Unix, kind, flags, None)?;
        self.bind(&fd, &addr, mode)?;
        if kind != SockType::Datagram {
            socket::listen(&fd, Backlog::MAXCONN)?;
        }
        Ok(fd)
    }

    /// Sets the mode of the path, after a check that the bound socket is still there.
    ///
    /// If other uids may write to the directory, they may move another socket of this uid to the
    /// path. So the mode is read and changed through one descriptor. It is changed only if it is
    /// the mode that `bind` has made.
    fn finish_bind(&mut self, initial: u32, mode: u32) -> Result<()> {
        let path = self.path.display();
        // Only O_PATH can open the file of a socket. It needs no permission.
        let found = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.path)?;
        let metadata = found.metadata()?;
        let found_mode = metadata.mode() & 0o7777;
        if !metadata.file_type().is_socket() || found_mode & !initial != 0 || metadata.nlink() != 1
        {
            return Err(Error::other(format!(
                "{path} was replaced by another process right after it was bound"
            )));
        }
        self.bound = Some(identity(&metadata));
        self.bound_for_owner_only = is_for_owner_only(mode);
        if found_mode != mode {
            let descriptor = format!("/proc/thread-self/fd/{}", found.as_raw_fd());
            fs::set_permissions(descriptor, Permissions::from_mode(mode)).map_err(|error| {
                let reason = format!(
                    "mode {mode:o} cannot be set for {path}: {error} (this takes a mounted /proc)"
                );
                Error::new(error.kind(), reason)
            })?;
        }
        Ok(())
    }

    /// Returns true if the kernel lets only the owner, which is this process's uid, connect to the
    /// bound socket. Privileged processes can connect too.
    ///
    /// Both the first mode and the present mode are checked. Clients that connected with the first
    /// mode may still be in the backlog, and a deployment may change the mode later. Access control
    /// lists need no check, because they permit no more than the mode permits to the group.
    pub(super) fn admits_owner_only(&self) -> bool {
        self.bound_for_owner_only
            && fs::symlink_metadata(&self.path).is_ok_and(|found| {
                self.bound == Some(identity(&found))
                    && found.uid() == nix::unistd::geteuid().as_raw()
                    && is_for_owner_only(found.mode())
            })
    }

    /// Leaves the socket file in its place for the next holder of the socket.
    pub(super) fn hand_on(mut self) {
        self.bound = None;
    }
}

impl Drop for PathGuard {
    fn drop(&mut self) {
        if !self.may_remove {
            return;
        }
        let there = fs::symlink_metadata(&self.path).ok().map(|found| identity(&found));
        if self.bound.is_some() && self.bound == there {
            let _ = fs::remove_file(&self.path);
        }
        // The lock is still held here. It is released when this field is dropped.
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Returns true if only the owner may write to a path with this mode. Connecting needs write
/// permission.
fn is_for_owner_only(mode: u32) -> bool {
    mode & 0o022 == 0
}

/// Returns the mode with which `bind` makes the path.
///
/// If others may connect, it is a mode that sockets do not usually have. So another socket that was
/// moved to the path is noticed. It lets the owner connect, because a stale socket is recognized by
/// an attempt to connect.
fn initial_mode(mode: u32) -> u32 {
    if is_for_owner_only(mode) { mode } else { 0o200 }
}

/// Returns the device and the inode.
fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Returns the error for a path that a live process owns.
fn in_use(path: &Path) -> Error {
    Error::new(ErrorKind::AddrInUse, format!("{} is in use by a live process", path.display()))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixListener};

    use super::*;

    /// Other uids that may write to the directory can move a socket of this uid to the path,
    /// although they may not connect to it.
    #[test]
    fn a_socket_that_was_swapped_in_does_not_get_the_mode() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("socket"), directory.path().join("other"));
        // A socket that is bound elsewhere takes the place of the one that is being bound.
        let mut guard = PathGuard::take(&path).unwrap();
        let _for_owner_only = UnixListener::bind(&other).unwrap();
        fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap();
        fs::rename(&other, &path).unwrap();

        let error = guard.finish_bind(initial_mode(0o666), 0o666).unwrap_err();
        assert!(error.to_string().contains("was replaced"), "{error}");
        drop(guard);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600,
            "it is open to others now"
        );

        // The same with a hard link to a socket elsewhere, and with a file that is not a socket.
        fs::set_permissions(&path, Permissions::from_mode(0o200)).unwrap();
        fs::hard_link(&path, &other).unwrap();
        let (lock_path, lock) = take_lock(&path).unwrap();
        let mut guard = PathGuard {
            path: path.clone(),
            lock_path,
            lock,
            bound: None,
            bound_for_owner_only: false,
            may_remove: true,
        };
        assert!(guard.finish_bind(0o200, 0o666).is_err());
        fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_permissions(Permissions::from_mode(0o200)).unwrap();
        assert!(guard.finish_bind(0o200, 0o666).is_err());
    }
}
