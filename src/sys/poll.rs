//! poll(2) for one descriptor.

use std::{io, os::fd::BorrowedFd, time::Duration};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll, ppoll},
    sys::time::TimeSpec,
};

/// An event to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event {
    Readable,
    Writable,
}

/// Waits for an event of a descriptor, or for its end. Returns false if the timeout comes first.
///
/// # Errors
/// The errors of ppoll(2): `Interrupted` after a signal, `EINVAL` if `RLIMIT_NOFILE` is 0.
pub(crate) fn wait_for(
    fd: BorrowedFd<'_>,
    event: Event,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let flags = match event {
        Event::Readable => PollFlags::POLLIN,
        Event::Writable => PollFlags::POLLOUT,
    };
    let ready = ppoll(&mut [PollFd::new(fd, flags)], timeout.map(TimeSpec::from_duration), None)?;
    Ok(ready > 0)
}

/// Returns true if the content of a file in `/proc` has changed since it was read. The kernel
/// reports that as `POLLPRI`. An error counts as a change.
pub(crate) fn has_changed(file: BorrowedFd<'_>) -> bool {
    let mut events = [PollFd::new(file, PollFlags::POLLPRI)];
    poll(&mut events, PollTimeout::ZERO).is_err()
        || events[0]
            .revents()
            .is_none_or(|events| events.intersects(PollFlags::POLLPRI | PollFlags::POLLERR))
}
