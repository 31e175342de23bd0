//! Waiting in the calling thread.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};

/// The time at which a call gives up. `None`: never.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    /// Returns the deadline of a call that begins now.
    pub(super) fn after(timeout: Option<Duration>) -> Self {
        Self(timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
    }

    /// Returns the earlier one of two.
    pub(super) fn or(self, other: Instant) -> Self {
        Self(Some(self.0.map_or(other, |own| own.min(other))))
    }

    pub(super) fn is_over(self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    /// Returns the time until then.
    fn left(self) -> Option<Duration> {
        self.0.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}

/// Waits until a descriptor is ready. Returns false if it is not at the deadline.
///
/// # Errors
/// Those of ppoll(2): `EINVAL` if `RLIMIT_NOFILE` is 0.
pub(super) fn until_ready(fd: BorrowedFd<'_>, events: PollFlags, deadline: Deadline) -> io::Result<bool> {
    loop {
        let timeout = deadline.left().map(TimeSpec::from_duration);
        match ppoll(&mut [PollFd::new(fd, events)], timeout, None) {
            // A signal handler has run.
            Err(Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

/// Sleeps. Returns false if the deadline comes before that.
pub(super) fn sleep(time: Duration, deadline: Deadline) -> bool {
    let left = deadline.left().unwrap_or(Duration::MAX);
    thread::sleep(time.min(left));
    time < left
}

/// Waits until `poll` is ready, which has its waker woken. Returns false if it is not at the deadline.
pub(super) fn until_woken(deadline: Deadline, mut poll: impl FnMut(&mut Context<'_>) -> Poll<()>) -> bool {
    // The same waker for each call of a thread: one that is not woken in time is kept until it is woken.
    thread_local! {
        static WAKER: Waker = thread_waker();
    }
    let waker = WAKER.try_with(Waker::clone).unwrap_or_else(|_thread_ends| thread_waker());
    let mut context = Context::from_waker(&waker);
    while poll(&mut context).is_pending() {
        match deadline.left() {
            None => thread::park(),
            Some(left) if left.is_zero() => return false,
            Some(left) => thread::park_timeout(left),
        }
    }
    true
}

fn thread_waker() -> Waker {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    Arc::new(Unpark(thread::current())).into()
}
