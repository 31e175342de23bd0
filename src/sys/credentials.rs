//! Credentials in the form in which the kernel reports them.

use std::{
    fs,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{libc, sys::stat::fstat};

use crate::credentials::Credentials;

/// Converts credentials from the kernel. Returns `None` if the kernel does not know the sender. In
/// that case it reports process 0 and the overflow ids, for example for all messages that were sent
/// before credentials were switched on.
pub(super) fn from_kernel(sender: libc::ucred, pidfd: Option<OwnedFd>) -> Option<Credentials> {
    let libc::ucred { pid, uid, gid } = sender;
    let pid = (pid != 0).then_some(pid);
    let is_unknown =
        pid.is_none() && (uid, gid) == (overflow_id("overflowuid"), overflow_id("overflowgid"));
    (!is_unknown).then_some(Credentials { uid, gid, pid, pidfd })
}

/// Returns the id that the kernel reports for an id without a mapping in this user namespace.
pub(crate) fn overflow_id(name: &str) -> u32 {
    /// The default of the kernel.
    const DEFAULT: u32 = 65534;
    let id = fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok();
    id.and_then(|id| id.trim().parse().ok()).unwrap_or(DEFAULT)
}

/// Returns false if it is known that two descriptors have different files.
///
/// From Linux 6.9 on, each process has its own inode, so pidfds of different processes differ.
pub(crate) fn may_have_same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    match (fstat(a), fstat(b)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => true,
    }
}
