//! Closing sockets in a thread that exits.
//!
//! The last `close` of a TCP socket with `SO_LINGER` blocks until its data is acknowledged or the time is up, and whoever
//! has a copy of the socket chooses that time. It does so in every `close` and in every other call that drops the last
//! reference, for example in the `close` of a Unix socket in whose queue it waits. There is one exception: **a task that
//! exits never waits** (`inet_release` tests `PF_EXITING`), and what is unsent is still sent afterwards.
//!
//! So sockets are moved into the descriptor table of a thread that then exits:
//!
//! ```text
//! caller                       nursery thread (its own table)      exiting thread
//! sendmsg(sockets) ──────────► queue of the nursery's socket
//! close(own copies)            the queue has a copy, so this
//!                              is never the last one
//! announce the message ──────► spawns ────────────────────────────► table of its own, recvmsg, exit
//!                              waits until it is gone
//! ```
//!
//! The message is announced after the caller has closed its own copies. Otherwise the exiting thread could be
//! faster, and the caller's `close` would be the last one.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use nix::{
    errno::Errno,
    libc,
    sys::{
        resource::{Resource, getrlimit},
        signal::SigSet,
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
};

use super::{close_all, recvmsg, sendmsg};
use crate::limits::SCM_MAX_FD;

/// How long an exiting thread may take before the next one is started beside it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Closes sockets in threads that exit. Each message of sockets has a `T` with it, which is reported when they are closed.
#[derive(Debug)]
pub(crate) struct ExitCloser<T> {
    queue: OwnedFd,
    announce: mpsc::Sender<T>,
}

impl<T: Send + 'static> ExitCloser<T> {
    /// Starts the nursery thread. It calls `report_closed`, which finds none of the process's descriptors there: it must
    /// not wake a task, since the wakers of a runtime write to one.
    ///
    /// # Errors
    /// When no thread or descriptor can be had, and when the kernel has no `CLOSE_RANGE_UNSHARE` (Linux 5.11) or a sandbox
    /// forbids `close_range`.
    pub(crate) fn start(report_closed: impl Fn(T) + Send + 'static) -> io::Result<Self> {
        let (queue, nursery) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let (announce, announced) = mpsc::channel();
        let (tell, ready) = mpsc::sync_channel(1);
        let number = nursery.as_raw_fd();
        thread::Builder::new().name("fdwire-nursery".to_owned()).spawn(move || {
            // A signal handler that runs in this thread, or in one that it spawns, would not find the process's descriptors.
            // tokio's writes to a pipe there, and the signal would be lost.
            SigSet::all().thread_block().expect("the mask is valid");
            let unshared = keep_only(number);
            let is_ready = unshared.is_ok();
            let _ = tell.send(unshared);
            if is_ready {
                // SAFETY: the table of this thread is its own from now on. The number is open in it, and nobody else owns it.
                let nursery = unsafe { OwnedFd::from_raw_fd(number) };
                while let Ok(closed) = announced.recv() {
                    close_next_message(&nursery);
                    report_closed(closed);
                }
            }
        })?;
        // `nursery` stays open in the shared table until the thread has copied it.
        ready.recv().map_err(|_| io::Error::other("the thread has ended"))??;
        Ok(Self { queue, announce })
    }

    /// Closes sockets, at most [`most_sockets_at_once`] of them.
    ///
    /// # Errors
    /// When the kernel takes no message, with the sockets and `closed`: `ETOOMANYREFS`, `EAGAIN` (too many wait already), or
    /// no memory.
    pub(crate) fn close(&self, sockets: Vec<OwnedFd>, closed: T) -> Result<(), (Vec<OwnedFd>, T)> {
        let fds = sockets.iter().map(AsFd::as_fd);
        if sendmsg(self.queue.as_fd(), &[IoSlice::new(b"x")], fds).is_err() {
            return Err((sockets, closed));
        }
        close_all(sockets);
        let _ = self.announce.send(closed); // fails only if the nursery has panicked
        Ok(())
    }
}

/// Number of sockets that one call of [`ExitCloser::close`] takes. The exiting thread needs a number for each below
/// `RLIMIT_NOFILE`, or the kernel would close the rest inside `recvmsg`.
pub(crate) fn most_sockets_at_once() -> usize {
    const OTHERS: u64 = 2; // the nursery's socket has a number too
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((SCM_MAX_FD as u64, 0));
    soft.saturating_sub(OTHERS).clamp(1, SCM_MAX_FD as u64) as usize
}

/// Spawns a thread that takes the next message out of the queue and exits, and waits for it.
fn close_next_message(nursery: &OwnedFd) {
    let mut delay = Duration::from_millis(1);
    loop {
        let exiting = thread::scope(|scope| {
            let exiting = thread::Builder::new().name("fdwire-exit".to_owned());
            exiting.spawn_scoped(scope, || receive_and_keep(nursery.as_fd())).ok()?.join().ok()?.ok()
        });
        if let Some(thread) = exiting {
            return wait_until_gone(thread);
        }
        // No thread or no memory can be had now. The message stays in the queue.
        thread::sleep(delay);
        delay = (2 * delay).min(Duration::from_secs(1));
    }
}

/// Receives a message into a table of this thread's own. The exit of the thread then closes what has
/// come. Returns the thread's id.
fn receive_and_keep(nursery: BorrowedFd<'_>) -> io::Result<libc::pid_t> {
    unshare_up_to(nursery.as_raw_fd())?;
    let mut byte = BytesMut::with_capacity(1);
    let mut fds = Vec::<OwnedFd>::with_capacity(SCM_MAX_FD);
    recvmsg(nursery, &mut byte, 1, &mut fds)?;
    for fd in fds {
        let _ = fd.into_raw_fd();
    }
    // SAFETY: the call has no arguments and always succeeds.
    Ok(unsafe { libc::gettid() })
}

/// Waits until the kernel has ended a thread that was joined. `join` returns before the thread has
/// closed its descriptors, which can take long: a Unix socket may hold thousands of files. Without
/// this, such threads could pile up.
fn wait_until_gone(thread: libc::pid_t) {
    const LONGEST: Duration = Duration::from_millis(10);
    let pid = std::process::id() as libc::pid_t;
    let mut delay = Duration::from_micros(20);
    let begin = Instant::now();
    // An exit is not known to block, but if one does, the others must not wait for it.
    while begin.elapsed() < PATIENCE {
        // SAFETY: signal 0 is never delivered. The call only tells whether this process has the thread.
        if unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, 0) } != 0 {
            return;
        }
        thread::sleep(delay);
        delay = (2 * delay).min(LONGEST);
    }
}

/// Gives this thread a descriptor table of its own that has only this number.
fn keep_only(number: RawFd) -> io::Result<()> {
    unshare_up_to(number)?;
    if number > 0 {
        // SAFETY: closes numbers in a table that belongs to this thread alone, and on which no owner relies.
        Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 0, number - 1, 0) })?;
    }
    Ok(())
}

/// Gives this thread a descriptor table of its own: a copy of the shared one up to `number`.
fn unshare_up_to(number: RawFd) -> io::Result<()> {
    let (first, last) = (number + 1, libc::c_uint::MAX);
    // SAFETY: the kernel first copies the table and then closes only numbers of the copy, on which no owner relies.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) })?;
    Ok(())
}
