//! Waiting in the calling thread, each time with a deadline.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crate::sys::{self, Event};

/// The time at which a call gives up. `None` if it never does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    /// Returns the deadline of a call that begins now.
    pub(super) fn after(timeout: Option<Duration>) -> Self {
        Self(timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
    }

    /// Returns the earlier one of two deadlines.
    pub(super) fn or(self, other: Instant) -> Self {
        Self(Some(self.0.map_or(other, |own| own.min(other))))
    }

    /// Returns true if the deadline has passed.
    pub(super) fn is_over(self) -> bool {
        self.remaining().is_some_and(|left| left.is_zero())
    }

    /// Returns the time until the deadline. `None` if there is no deadline.
    fn remaining(self) -> Option<Duration> {
        self.0.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}

/// Waits until a descriptor is ready. Returns false if it is not ready at the deadline.
///
/// # Errors
/// The errors of ppoll(2): `EINVAL` if `RLIMIT_NOFILE` is 0.
pub(super) fn until_ready(
    fd: BorrowedFd<'_>,
    event: Event,
    deadline: Deadline,
) -> io::Result<bool> {
    loop {
        match sys::wait_for(fd, event, deadline.remaining()) {
            // A signal handler has run. Wait for the rest of the time.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            ready => return ready,
        }
    }
}

/// Sleeps for a time. Returns false if the deadline comes first.
pub(super) fn sleep(time: Duration, deadline: Deadline) -> bool {
    let left = deadline.remaining().unwrap_or(Duration::MAX);
    thread::sleep(time.min(left));
    time < left
}

/// Waits until `poll` returns ready. Between the calls the thread sleeps, so something has to wake
/// the waker. Returns false if `poll` is not ready at the deadline.
pub(super) fn until_woken(
    deadline: Deadline,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<()>,
) -> bool {
    // All calls in a thread use the same waker. If a wait ends at its deadline, an account keeps
    // the waker, and recognizes it the next time. Otherwise it would keep one waker for each call.
    thread_local! {
        static WAKER: Waker = thread_waker();
    }
    // While a thread ends, its thread-local variables may be gone.
    let waker = WAKER.try_with(Waker::clone).unwrap_or_else(|_thread_ends| thread_waker());
    let mut context = Context::from_waker(&waker);
    // A thread may also be unparked for another reason, so poll again each time.
    while poll(&mut context).is_pending() {
        match deadline.remaining() {
            None => thread::park(),
            Some(left) if left.is_zero() => return false,
            Some(left) => thread::park_timeout(left),
        }
    }
    true
}

/// Returns a waker that unparks this thread.
fn thread_waker() -> Waker {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    Arc::new(Unpark(thread::current())).into()
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsFd, unix::net::UnixStream},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::closer::Account;

    fn in_millis(millis: u64) -> Deadline {
        Deadline::after(Some(Duration::from_millis(millis)))
    }

    #[test]
    fn a_deadline_ends_each_kind_of_wait() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        for deadline in [in_millis(0), in_millis(3)] {
            assert!(!until_ready(socket.as_fd(), Event::Readable, deadline).unwrap());
            assert!(!until_woken(deadline, |_| Poll::Pending));
            assert!(!sleep(Duration::from_secs(600), deadline));
            assert!(deadline.is_over());
        }
        let never = Deadline::after(None);
        assert!(until_ready(socket.as_fd(), Event::Writable, never).unwrap());
        assert!(until_woken(never, |_| Poll::Ready(())));
        assert!(sleep(Duration::from_millis(1), never));
        assert!(!never.is_over() && !in_millis(600_000).is_over());
        assert!(
            never.or(Instant::now()).is_over()
                && in_millis(0).or(Instant::now() + Duration::from_secs(600)).is_over()
        );
    }

    #[test]
    fn what_is_ready_is_ready_when_the_time_is_over_too() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        assert!(until_ready(socket.as_fd(), Event::Writable, in_millis(0)).unwrap());
        assert!(until_woken(in_millis(0), |_| Poll::Ready(())));
    }

    #[test]
    fn a_thread_waits_until_another_one_wakes_it() {
        let polls = AtomicUsize::new(0);
        let poll = |cx: &mut Context<'_>| {
            let waker = cx.waker().clone();
            match polls.fetch_add(1, Ordering::Relaxed) {
                0..3 => {
                    thread::spawn(move || waker.wake());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        };
        assert!(until_woken(Deadline::after(None), poll));
    }

    #[test]
    fn a_thread_that_gives_up_often_is_remembered_once() {
        let mut waker = None;
        for _ in 0..10 {
            assert!(!until_woken(in_millis(0), |cx| {
                let first = waker.get_or_insert_with(|| cx.waker().clone());
                assert!(first.will_wake(cx.waker()), "an account keeps each of them");
                Poll::Pending
            }));
        }
        let account = Account::default();
        assert!(until_woken(in_millis(0), |cx| account.poll_at_most(cx, 0)));
    }
}
