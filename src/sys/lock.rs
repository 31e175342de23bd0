//! Locks on open files (flock(2)).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::{errno::Errno, libc};

/// Takes the exclusive lock of a file without waiting. The lock belongs to the open file, so all
/// processes with a copy of the descriptor hold it.
///
/// # Errors
/// `EWOULDBLOCK` if another open file has it.
pub(crate) fn try_lock(file: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: the call takes two numbers, and the descriptor is open.
    let outcome = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    Errno::result(outcome).map(drop)
}

/// Releases the lock, for all copies of the descriptor.
pub(crate) fn unlock(file: BorrowedFd<'_>) {
    // SAFETY: the call takes two numbers, and the descriptor is open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}
