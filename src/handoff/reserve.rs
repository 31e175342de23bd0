//! Descriptors that connections leave to others.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit};

/// The first descriptor of the reserve: an eighth of `RLIMIT_NOFILE`, at most 64, is for what the application opens, and for
/// starting a worker. The kernel gives out the lowest free number.
pub(super) fn first_of_reserve() -> u64 {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    limit - (limit / 8).min(64)
}

/// Whether a descriptor that was just opened is of the reserve that begins there.
pub(super) fn is_of_reserve(fd: impl AsFd, first_of_reserve: u64) -> bool {
    fd.as_fd().as_raw_fd() as u64 >= first_of_reserve
}
