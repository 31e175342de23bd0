//! The one place that closes descriptors whose `close` a peer may have made slow.
//!
//! Any process with a copy of a descriptor can make its last `close` block: with `SO_LINGER` on a
//! TCP socket, with a file of a FUSE file system whose daemon does not answer, or with a Unix
//! socket that has such descriptors in its queue. So the threads of a runtime never close a
//! descriptor that came from a peer, a socket that was sent to a peer, or a connection. They append
//! it to a backlog, which costs a lock and rarely a wake-up. The closer's own thread sorts the
//! backlog:
//!
//! | kind | how it is closed | what can delay it |
//! |---|---|---|
//! | sockets | by a task that exits ([`ExitCloser`](crate::sys::ExitCloser)) | freeing memory |
//! | files of unknown file systems | by one of four threads | other files of this kind |
//! | everything else | by the closer's thread | freeing memory |
//!
//! The number of threads and tasks is fixed. The descriptors of a connection in the backlog count
//! for its [`Account`]. A connection with too many of them receives nothing until they are closed.

mod account;
mod files;
mod lanes;
mod slow;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use smallvec::SmallVec;

pub(crate) use account::Account;
use account::{Charge, Closing};
use lanes::{Closed, Lanes};

use crate::{
    frame::FdCloser,
    send_fd::{FdKind, SendFd},
    sys::{self, CloseFd, FdGuard},
};

/// The pause of the closer's thread after it has closed something. It ends early if [`WAKE_AT`]
/// descriptors wait. A process that closes all the time should not wake the thread for each
/// descriptor, and starting an exiting task takes as much CPU as closing 50 sockets.
const PAUSE: Duration = Duration::from_millis(10);
/// The number of waiting descriptors that ends a [`PAUSE`].
const WAKE_AT: usize = 64;

/// The time until the next attempt if the kernel has refused one.
const RETRY: Duration = Duration::from_millis(20);

/// Closes descriptors on a thread of the crate, so that the caller never blocks.
///
/// The sender of a descriptor decides how long its last `close` takes. With `SO_LINGER` on a TCP
/// connection whose client does not read, it can take days. Use this function for received
/// descriptors that you do not use, and for sockets of which you have sent a copy. Received
/// [`Fds`](crate::Fds), connections and listeners use it by themselves when they are dropped.
///
/// A connection is closed as by a plain `close`: unsent data is still sent, and other copies are
/// not affected. The peer is notified a moment later, usually within 10 milliseconds. The function
/// works on any thread, with or without a runtime.
///
/// The crate has two threads for this, a short-lived child process, and up to four threads for
/// files of unknown file systems. These four also close sockets, after `SO_LINGER` was switched
/// off, in two cases: if the kernel is older than 5.9, or if it refuses for a second to move
/// sockets, because too many descriptors are in flight (unix(7)).
///
/// # Limitations
/// A regular file of a FUSE file system whose daemon does not answer can't be closed at all, not
/// even by the exit of the process. Each such file occupies one of four threads until the daemon
/// answers or ends. When all four are occupied, further files of this kind stay open. If a peer may
/// send such files, refuse descriptors ([`Socket::set_pass_fds`](crate::Socket::set_pass_fds)).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let file = std::fs::File::open("/dev/null")?;
/// fdwire::close_in_background([file]);
/// # Ok(()) }
/// ```
pub fn close_in_background(fds: impl IntoIterator<Item = impl Into<OwnedFd>>) {
    CLOSER.add(CloseJob {
        fds: fds.into_iter().map(Into::into).collect(),
        account: None,
        are_sockets: false,
    });
}

/// Closes descriptors of which a copy was just sent. A shared descriptor is left to its other
/// holders.
///
/// The message has a copy, so this `close` is usually not the last one. But the receiver may
/// already have closed its copy. Then closing a socket may block, so sockets are closed in the
/// background. Files of a FUSE file system may block in any case. Recognizing them would take three
/// times as long for each descriptor, so the documentation warns of them instead.
pub(crate) fn close_sent(fds: impl Iterator<Item = SendFd>) {
    let mut sockets = SmallVec::<[OwnedFd; 1]>::new();
    sys::close_all(fds.filter_map(|fd| {
        let (fd, kind) = fd.into_last()?;
        let is_socket = match kind {
            FdKind::Unknown => sys::is_socket(fd.as_fd()),
            FdKind::Socket => true,
            FdKind::File => false,
        };
        if is_socket {
            sockets.push(fd);
            None
        } else {
            Some(fd)
        }
    }));
    close_sockets(sockets);
}

/// Closes descriptors that were accepted and not sent. A shared descriptor is left to its other
/// holders. If the kind of a descriptor is unknown, the closer's thread determines it.
pub(crate) fn close_unsent(fds: impl IntoIterator<Item = SendFd>) {
    let mut unknown = SmallVec::<[OwnedFd; 1]>::new();
    let mut sockets = SmallVec::<[OwnedFd; 1]>::new();
    for (fd, kind) in fds.into_iter().filter_map(SendFd::into_last) {
        match kind {
            FdKind::Unknown => unknown.push(fd),
            FdKind::Socket => sockets.push(fd),
            FdKind::File => drop(fd),
        }
    }
    close_in_background(unknown);
    close_sockets(sockets);
}

/// Closes sockets in the background. Unlike in [`close_in_background`], their kind is not checked.
pub(crate) fn close_sockets(fds: impl Into<SmallVec<[OwnedFd; 1]>>) {
    CLOSER.add(CloseJob { fds: fds.into(), account: None, are_sockets: true });
}

/// Starts the closer's thread unless it runs, and waits until it has the descriptors that it needs.
/// Sockets call this when they are made, before a peer can do harm.
pub(crate) fn start() {
    let backlog = CLOSER.running();
    let starting = |backlog: &mut Backlog| backlog.thread == Thread::Starting;
    drop(CLOSER.started.wait_while(backlog, starting).unwrap_or_else(PoisonError::into_inner));
}

/// A socket that is closed in the background when it is dropped.
pub(crate) type BackgroundFd = FdGuard<InBackground>;

/// The way in which a [`BackgroundFd`] is closed. If there is an account, the socket counts for it
/// while it waits to be closed.
#[derive(Debug, Default)]
pub(crate) struct InBackground(Option<Arc<Account>>);

impl InBackground {
    pub(crate) fn counted(account: Arc<Account>) -> Self {
        Self(Some(account))
    }
}

impl CloseFd for InBackground {
    fn close(&mut self, fd: OwnedFd) {
        CLOSER.add(CloseJob {
            fds: SmallVec::from_buf([fd]),
            account: self.0.take(),
            are_sockets: true,
        });
    }
}

static CLOSER: Closer = Closer {
    backlog: Mutex::new(Backlog {
        jobs: Vec::new(),
        fds: 0,
        closed: Vec::new(),
        thread: Thread::None,
    }),
    changed: Condvar::new(),
    started: Condvar::new(),
};

/// The closer of this process.
struct Closer {
    backlog: Mutex<Backlog>,
    /// Wakes the closer's thread.
    changed: Condvar,
    /// Wakes the callers of [`start`].
    started: Condvar,
}

/// The descriptors that wait for the closer's thread.
struct Backlog {
    jobs: Vec<CloseJob>,
    /// The number of descriptors in all jobs.
    fds: usize,
    /// The charges of sockets that exiting tasks have closed. The closer's thread drops them, which
    /// may wake tasks.
    closed: Vec<Closed>,
    thread: Thread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    /// The thread does not run, because it was not started yet or the system could not start it.
    None,
    /// The thread opens the descriptors that it needs.
    Starting,
    /// The thread waits for something to close.
    Idle,
    /// The thread closes something, or pauses and then checks the backlog again.
    Busy,
}

/// Descriptors that were added to the backlog together.
struct CloseJob {
    fds: SmallVec<[OwnedFd; 1]>,
    account: Option<Arc<Account>>,
    /// True if all of them are known to be sockets. Otherwise the closer's thread checks each.
    are_sockets: bool,
}

/// Closes the unused descriptors of a connection in the background, and counts them.
impl FdCloser<OwnedFd> for Account {
    fn close(self: Arc<Self>, fds: SmallVec<[OwnedFd; 1]>) {
        CLOSER.add(CloseJob { fds, account: Some(self), are_sockets: false });
    }
}

impl Closer {
    fn lock(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the backlog, with a thread that works on it if the system has one.
    fn running(&'static self) -> MutexGuard<'static, Backlog> {
        let mut backlog = self.lock();
        if backlog.thread == Thread::None {
            let thread = thread::Builder::new().name("fdwire-close".to_owned());
            // If no thread can be started, the jobs wait until a later call starts one. The caller
            // never closes them itself.
            if thread.spawn(|| self.run()).is_ok() {
                backlog.thread = Thread::Starting;
            }
        }
        backlog
    }

    /// Adds a job to the backlog.
    fn add(&'static self, job: CloseJob) {
        if job.fds.is_empty() {
            return;
        }
        if let Some(account) = &job.account {
            account.add(job.fds.len());
        }
        // Append the job, and wake the thread if it sleeps or if many descriptors wait.
        let mut backlog = self.running();
        let before = backlog.fds;
        backlog.fds += job.fds.len();
        backlog.jobs.push(job);
        let many = before < WAKE_AT && backlog.fds >= WAKE_AT;
        let wakes = backlog.thread == Thread::Idle || many;
        if backlog.thread == Thread::Idle {
            backlog.thread = Thread::Busy;
        }
        drop(backlog);
        if wakes {
            self.changed.notify_one();
        }
    }

    /// Passes the charges of closed sockets to the closer's thread. The caller is the nursery
    /// thread, which has no descriptors and so must not wake a task. It need not wake the closer's
    /// thread either: as long as that thread expects a report, it checks again after each pause.
    fn report_closed(&self, closed: Closed) {
        self.lock().closed.push(closed);
    }

    /// Runs the closer's thread, without end.
    fn run(&'static self) {
        let mut lanes = Lanes::new(|closed| CLOSER.report_closed(closed));
        self.lock().thread = Thread::Busy;
        self.started.notify_all();
        let (mut jobs, mut closed) = (Vec::new(), Vec::new());
        loop {
            // Take everything that waits, sort it, and close it without the lock.
            self.next(&lanes, &mut jobs, &mut closed);
            lanes.reported(closed.len());
            closed.clear();
            for job in jobs.drain(..) {
                for fd in job.fds {
                    lanes.add(
                        Closing { fd, charge: job.account.clone().map(Charge::new) },
                        job.are_sockets,
                    );
                }
            }
            lanes.close();
        }
    }

    /// Waits until there is something to do. Then swaps the waiting jobs and charges with `jobs`
    /// and `closed`, which are empty, so that no vector is allocated anew.
    fn next(&self, lanes: &Lanes, jobs: &mut Vec<CloseJob>, closed: &mut Vec<Closed>) {
        // Pause first, so that a busy process rarely wakes this thread.
        let pause = if lanes.has_to_retry() { RETRY } else { PAUSE };
        let (mut backlog, _) = self
            .changed
            .wait_timeout_while(self.lock(), pause, |backlog| backlog.fds < WAKE_AT)
            .unwrap_or_else(PoisonError::into_inner);
        // Sleep without a limit only if everything that may come wakes this thread.
        if !lanes.has_to_retry() && !lanes.expects_a_report() && backlog.jobs.is_empty() {
            backlog.thread = Thread::Idle;
            backlog = self
                .changed
                .wait_while(backlog, |backlog| backlog.jobs.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            backlog.thread = Thread::Busy;
        }
        backlog.fds = 0;
        std::mem::swap(&mut backlog.jobs, jobs);
        std::mem::swap(&mut backlog.closed, closed);
    }
}
