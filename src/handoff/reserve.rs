//! The reserve of descriptors that connections must not use.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit};

/// Returns the first descriptor of a reserve of `most`, or of an eighth of `RLIMIT_NOFILE` if that
/// is less.
pub(super) fn first_of_reserve(most: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    limit - (limit / 8).min(most)
}

/// Returns true if a descriptor that was just opened belongs to the reserve that begins at
/// `first_of_reserve`. The kernel gives out the lowest free number, so all below are taken then.
pub(super) fn is_of_reserve(fd: impl AsFd, first_of_reserve: u64) -> bool {
    fd.as_fd().as_raw_fd() as u64 >= first_of_reserve
}
