//! Registration with tokio's event loop.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor for reading only. A registration for both directions would wake the sender for each packet
/// that its peer consumes.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver is not enabled.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number for as long as it lives, and it lives in the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    registered.map_err(Into::into)
}

/// Registers a descriptor for writing only. Not one that is registered already (`EEXIST`): a duplicate.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver is not enabled.
pub(crate) fn writable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number for as long as it lives, and it lives in the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::WRITABLE) };
    registered.map_err(Into::into)
}
