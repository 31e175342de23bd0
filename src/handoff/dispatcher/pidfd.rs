//! Facts about a process, from a descriptor that names it (pidfd_open(2)).

use std::{
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout};

/// Returns the number of the process of a pidfd, if this process can see it (proc_pid_fdinfo(5)).
pub(super) fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Returns true if the process of this pidfd has ended.
pub(super) fn has_ended(pidfd: impl AsFd) -> bool {
    let mut poll = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
}
