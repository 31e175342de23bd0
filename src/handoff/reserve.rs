//! Descriptors that connections leave to others.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit};

/// The first descriptor of a reserve of `most`, or of an eighth of `RLIMIT_NOFILE` if that is less.
pub(super) fn first_of_reserve(most: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    limit - (limit / 8).min(most)
}

/// Whether a descriptor that was just opened is of the reserve that begins there. The kernel gives
/// out the lowest free number: all below are taken then.
pub(super) fn is_of_reserve(fd: impl AsFd, first_of_reserve: u64) -> bool {
    fd.as_fd().as_raw_fd() as u64 >= first_of_reserve
}
