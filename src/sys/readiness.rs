//! Registration with tokio's event loop.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor for reading, or for both directions.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver is not enabled.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number for as long as it lives, and it lives in the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}
