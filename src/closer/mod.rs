//! The one place that closes what a peer may have made slow.
//!
//! Whoever has a copy of a descriptor can make its last `close` block: with `SO_LINGER` on a TCP socket, with a file of a
//! FUSE file system whose daemon does not answer, with a Unix socket that has such descriptors in its queue. So
//! the threads of a runtime close nothing that came from a peer, no socket that was sent to one, and no connection.
//! They append it to a backlog, which costs a lock and seldom a wake-up. The closer's own thread sorts the backlog:
//!
//! | kind | how it is closed | what can delay it |
//! |---|---|---|
//! | sockets | by a task that [exits](crate::sys::ExitCloser), which never lingers | the time it takes to free memory |
//! | regular files and devices of file systems that this process does not know | by one of four threads | other files of this kind |
//! | everything else | by the closer's thread | the time it takes to free memory |
//!
//! The number of threads and tasks is fixed. What a connection has in the backlog counts against its [`Account`], and a connection
//! with too much in it does not receive more until it has been closed.

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
    frame::Home,
    send_fd::{FdKind, SendFd},
    sys::{self, CloseFd, FdGuard},
};

/// After it has closed something, the closer's thread looks at the backlog again after this time, or when
/// [`WAKE_AT`] descriptors wait. A process that closes all the time should not wake it for each of them, and to start an
/// exiting task takes as much as to close 50 sockets.
const PAUSE: Duration = Duration::from_millis(10);
const WAKE_AT: usize = 64;

/// The thread tries again after this time if the kernel refuses something.
const RETRY: Duration = Duration::from_millis(20);

/// Closes descriptors on a thread of the crate, so that the caller never blocks.
///
/// Whoever sent a descriptor decides how long its last `close` takes: days, with `SO_LINGER` on a TCP connection whose client
/// does not read. Use this for received descriptors that you do not want, and for sockets of which a copy was sent.
/// [`Fds`](crate::Fds) that came from a peer, connections and listeners use it by themselves when they are dropped.
///
/// A connection is closed as by a plain `close`: what is unsent is still sent, and other copies are not touched. The peer
/// sees the end a moment later, usually within 10 milliseconds. Works on any thread, with or without a runtime.
///
/// The crate has two threads for this, a child process for a moment at a time, and up to four threads for files of file
/// systems that it does not know. If the kernel refuses to move sockets for a second (too many descriptors in flight, see
/// unix(7)), or is older than 5.9, sockets are closed by one of the four after `SO_LINGER` was switched off.
///
/// # What cannot be had
/// A regular file of a FUSE file system whose daemon does not answer can't be closed by anyone, not even by the exit of
/// the process. Each takes one of four threads until the daemon answers or ends, and after that such files stay open. If
/// a peer may send such files, refuse descriptors ([`Socket::set_pass_fds`](crate::Socket::set_pass_fds)).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let file = std::fs::File::open("/dev/null")?;
/// fdwire::close_in_background([file]);
/// # Ok(()) }
/// ```
pub fn close_in_background(fds: impl IntoIterator<Item = impl Into<OwnedFd>>) {
    CLOSER.add(Job { fds: fds.into_iter().map(Into::into).collect(), account: None, are_sockets: false });
}

/// Closes descriptors of which a copy was just sent, except those that others hold. The message holds that copy, so this
/// `close` is not the last one, unless the receiver was faster and has closed it. Then sockets can block. Files of a FUSE file
/// system can block in any case; to recognize those would take three times as long for each descriptor, so the
/// documentation names them.
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

/// Closes descriptors that were to be sent and are not, except those that others hold. If the sender has not said what a
/// descriptor is, the closer's thread finds out.
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

/// The same as [`close_in_background`] for descriptors that are known to be sockets, which saves asking.
pub(crate) fn close_sockets(fds: impl Into<SmallVec<[OwnedFd; 1]>>) {
    CLOSER.add(Job { fds: fds.into(), account: None, are_sockets: true });
}

/// Starts the closer's thread unless it runs, and waits until it has the descriptors that it needs. Called before any peer
/// can do harm, for example by using up all threads.
pub(crate) fn start() {
    let backlog = CLOSER.running();
    let starting = |backlog: &mut Backlog| backlog.thread == Thread::Starting;
    drop(CLOSER.started.wait_while(backlog, starting).unwrap_or_else(PoisonError::into_inner));
}

/// A socket that is closed in the background when it is dropped.
pub(crate) type BackgroundFd = FdGuard<InBackground>;

/// Closes a socket in the background. The account, if there is one, lives until then.
#[derive(Debug, Default)]
pub(crate) struct InBackground(Option<Arc<Account>>);

impl InBackground {
    pub(crate) fn counted(account: Arc<Account>) -> Self {
        Self(Some(account))
    }
}

impl CloseFd for InBackground {
    fn close(&mut self, fd: OwnedFd) {
        CLOSER.add(Job { fds: SmallVec::from_buf([fd]), account: self.0.take(), are_sockets: true });
    }
}

static CLOSER: Closer = Closer {
    backlog: Mutex::new(Backlog { jobs: Vec::new(), fds: 0, closed: Vec::new(), thread: Thread::None }),
    changed: Condvar::new(),
    started: Condvar::new(),
};

struct Closer {
    backlog: Mutex<Backlog>,
    /// Wakes the closer's thread.
    changed: Condvar,
    started: Condvar,
}

struct Backlog {
    jobs: Vec<Job>,
    /// Number of descriptors in all jobs.
    fds: usize,
    /// The charges of sockets that exiting tasks have closed. The closer's thread ends them, which may
    /// wake tasks.
    closed: Vec<Closed>,
    thread: Thread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    /// It is not started, or none could be had.
    None,
    /// It looks around.
    Starting,
    /// It waits until there is something to close.
    Idle,
    /// It closes something, or looks again after [`PAUSE`].
    Busy,
}

struct Job {
    fds: SmallVec<[OwnedFd; 1]>,
    account: Option<Arc<Account>>,
    /// Whether all of them are known to be sockets. Otherwise the closer's thread finds out.
    are_sockets: bool,
}

/// Descriptors of a connection that nobody wants are closed in the background, and counted.
impl Home<OwnedFd> for Account {
    fn take_back(self: Arc<Self>, fds: SmallVec<[OwnedFd; 1]>) {
        CLOSER.add(Job { fds, account: Some(self), are_sockets: false });
    }
}

impl Closer {
    fn lock(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The backlog, with a thread to work on it unless none can be had.
    fn running(&'static self) -> MutexGuard<'static, Backlog> {
        let mut backlog = self.lock();
        if backlog.thread == Thread::None {
            let thread = thread::Builder::new().name("fdwire-close".to_owned());
            // Without a thread the jobs wait until a later call gets one. They are never closed here.
            if thread.spawn(|| self.run()).is_ok() {
                backlog.thread = Thread::Starting;
            }
        }
        backlog
    }

    fn add(&'static self, job: Job) {
        if job.fds.is_empty() {
            return;
        }
        if let Some(account) = &job.account {
            account.add(job.fds.len());
        }
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

    /// Called by the thread that has no descriptors. The closer's thread is not woken: as long as it expects a report, it looks
    /// again by itself.
    fn report_closed(&self, closed: Closed) {
        self.lock().closed.push(closed);
    }

    fn run(&'static self) {
        let mut lanes = Lanes::new(|closed| CLOSER.report_closed(closed));
        self.lock().thread = Thread::Busy;
        self.started.notify_all();
        let (mut jobs, mut closed) = (Vec::new(), Vec::new());
        loop {
            self.next(&lanes, &mut jobs, &mut closed);
            lanes.reported(closed.len());
            closed.clear();
            for job in jobs.drain(..) {
                for fd in job.fds {
                    lanes.add(Closing { fd, charge: job.account.clone().map(Charge::new) }, job.are_sockets);
                }
            }
            lanes.close();
        }
    }

    /// Waits until there is something to do, and exchanges `jobs` and `closed`, which are empty, with what waits: all of
    /// them keep their room.
    fn next(&self, lanes: &Lanes, jobs: &mut Vec<Job>, closed: &mut Vec<Closed>) {
        let pause = if lanes.has_to_retry() { RETRY } else { PAUSE };
        let (mut backlog, _) = self
            .changed
            .wait_timeout_while(self.lock(), pause, |backlog| backlog.fds < WAKE_AT)
            .unwrap_or_else(PoisonError::into_inner);
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
