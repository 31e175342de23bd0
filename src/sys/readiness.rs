//! The registration of a descriptor with tokio's event loop.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use tokio::io::{Interest, unix::AsyncFd};

/// A value that owns one open descriptor.
///
/// # Safety
/// `as_raw_fd` returns the same number for as long as the value lives, and the descriptor is open
/// for as long.
pub(crate) unsafe trait OwnsFd: AsRawFd {}

// SAFETY: an `OwnedFd` keeps its descriptor open, and never changes its number.
unsafe impl OwnsFd for OwnedFd {}

// SAFETY: it keeps the `OwnedFd` alive, whose number it returns.
unsafe impl OwnsFd for Arc<OwnedFd> {}

/// Registers a descriptor with the event loop of the current runtime.
///
/// # Errors
/// The errors of epoll_ctl(2).
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver is not enabled.
pub(crate) fn register<T: OwnsFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: the value keeps its descriptor open and the number the same, and it lives in the
    // `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}

/// A way to close a descriptor.
pub(crate) trait CloseFd {
    fn close(&mut self, fd: OwnedFd);
}

/// A descriptor that its closer closes when the guard is dropped.
#[derive(Debug)]
pub(crate) struct FdGuard<C: CloseFd> {
    /// `None` only while the guard is dropped or taken apart.
    fd: Option<OwnedFd>,
    closer: C,
}

impl<C: CloseFd> FdGuard<C> {
    pub(crate) fn new(fd: OwnedFd, closer: C) -> Self {
        Self { fd: Some(fd), closer }
    }

    pub(crate) fn into_fd(mut self) -> OwnedFd {
        self.fd.take().expect("only the end of the guard takes it")
    }
}

// SAFETY: the `OwnedFd` is taken out only by methods that end the guard.
unsafe impl<C: CloseFd> OwnsFd for FdGuard<C> {}

impl<C: CloseFd> AsFd for FdGuard<C> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("only the end of the guard takes it").as_fd()
    }
}

impl<C: CloseFd> AsRawFd for FdGuard<C> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl<C: CloseFd> Drop for FdGuard<C> {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.closer.close(fd);
        }
    }
}
