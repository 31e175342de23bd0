//! The one place that closes what a peer may have made slow.
//!
//! Whoever has a copy of a descriptor can make its last `close` block: with `SO_LINGER` on a TCP socket, with a file of a
//! FUSE file system whose daemon does not answer, with a Unix socket that has such descriptors in its queue. So
//! the threads of a runtime close nothing that came from a peer, no socket that was sent to one, and no connection.
//! They append it to a backlog, which costs a lock and seldom a wake-up. The closer's own thread sorts the backlog:
//!
//! | kind | how it is closed | what can delay it |
//! |---|---|---|
//! | sockets | by a thread that [exits](crate::sys::ExitCloser), which never lingers | the time it takes to free memory |
//! | regular files and devices of file systems that this process does not know | by one of [`SLOW_THREADS`] threads | other files of this kind |
//! | everything else | by the closer's thread | the time it takes to free memory |
//!
//! The number of threads is fixed. What a connection has in the backlog counts against its [`Account`], and a connection
//! with too much in it does not receive more until it has been closed.

mod account;
mod files;
mod slow;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use smallvec::SmallVec;

pub(crate) use account::Account;
use account::Charge;
use files::KnownFiles;
use slow::SlowThreads;

use crate::{
    frame::Home,
    sys::{self, CloseFd, ExitCloser, FdGuard},
};

/// Most threads that wait for files whose `close` may block.
const SLOW_THREADS: usize = 4;

/// After it has closed something, the closer's thread looks at the backlog again after this time, or when
/// [`WAKE_AT`] descriptors wait: a process that closes all the time should not wake it for each of them.
const PAUSE: Duration = Duration::from_millis(2);
const WAKE_AT: usize = 64;

/// The thread tries again after this time if the kernel refuses something.
const RETRY: Duration = Duration::from_millis(20);

/// How long sockets wait for the kernel before they are given to the slow threads.
const PATIENCE: Duration = Duration::from_secs(1);

/// Closes descriptors on a thread of the crate, so that the caller never blocks.
///
/// Whoever sent a descriptor decides how long its last `close` takes: days, with `SO_LINGER` on a TCP connection whose client
/// does not read. Use this for received descriptors that you do not want, and for sockets of which a copy was sent.
/// [`Fds`](crate::Fds) that came from a peer, connections and listeners use it by themselves when they are dropped.
///
/// A connection is closed as by a plain `close`: what is unsent is still sent, and other copies are not touched. The peer
/// sees the end a moment later, usually within a few milliseconds. Works on any thread, with or without a runtime.
///
/// The crate has two threads for this, and one more for a moment at a time. If the kernel refuses to move sockets to them
/// for a second (too many descriptors in flight, see unix(7)), or is older than 5.11, sockets are closed by a plain thread after
/// `SO_LINGER` was switched off.
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
    close_for(None, fds.into_iter().map(Into::into).collect());
}

/// Closes descriptors in the background, and counts them against an account until they are closed.
pub(crate) fn close_for(account: Option<Arc<Account>>, fds: SmallVec<[OwnedFd; 1]>) {
    if !fds.is_empty() {
        CLOSER.add(Job { fds, account });
    }
}

/// Closes descriptors of which a copy was just sent. The message holds that copy, so this `close` is not the last one,
/// unless the receiver was faster and has closed it. Then only sockets can block.
pub(crate) fn close_sent(fds: impl Iterator<Item = OwnedFd>) {
    let mut sockets = SmallVec::new();
    sys::close_all(fds.filter_map(|fd| match sys::is_socket(fd.as_fd()) {
        true => {
            sockets.push(fd);
            None
        }
        false => Some(fd),
    }));
    close_for(None, sockets);
}

/// Starts the closer's thread unless it runs, and waits until it has the descriptors that it needs. Called before any peer
/// can do harm, for example by using up all threads.
pub(crate) fn start() {
    let backlog = CLOSER.running();
    let starting = |backlog: &mut Backlog| backlog.thread == Thread::Starting;
    drop(CLOSER.started.wait_while(backlog, starting).unwrap_or_else(PoisonError::into_inner));
}

/// A descriptor that is closed in the background when it is dropped.
pub(crate) type BackgroundFd = FdGuard<InBackground>;

/// Closes a descriptor in the background. The account, if there is one, lives until then.
#[derive(Debug, Default)]
pub(crate) struct InBackground(Option<Arc<Account>>);

impl InBackground {
    pub(crate) fn counted(account: Arc<Account>) -> Self {
        Self(Some(account))
    }
}

impl CloseFd for InBackground {
    fn close(&mut self, fd: OwnedFd) {
        close_for(self.0.take(), SmallVec::from_buf([fd]));
    }
}

static CLOSER: Closer = Closer {
    backlog: Mutex::new(Backlog { jobs: Vec::new(), fds: 0, thread: Thread::None }),
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
}

/// Descriptors of a connection that nobody wants are closed in the background, and counted.
impl Home<OwnedFd> for Account {
    fn take_back(self: Arc<Self>, fds: SmallVec<[OwnedFd; 1]>) {
        close_for(Some(self), fds);
    }
}

/// One descriptor on its way. The charge ends after it is closed: fields are dropped in this order.
#[derive(Debug)]
struct Closing {
    fd: OwnedFd,
    charge: Option<Charge>,
}

/// The charge of a socket that an exiting thread closes.
#[derive(Debug)]
struct Closed(Option<Charge>);

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

    fn run(&self) {
        let mut lanes = Lanes::new();
        self.lock().thread = Thread::Busy;
        self.started.notify_all();
        let mut jobs = Vec::new();
        loop {
            self.next_jobs(&lanes, &mut jobs);
            for job in jobs.drain(..) {
                for fd in job.fds {
                    lanes.add(Closing { fd, charge: job.account.clone().map(Charge::new) });
                }
            }
            lanes.close();
        }
    }

    /// Waits until there is something to do, and exchanges `jobs`, which is empty, with those that wait: both keep their room.
    fn next_jobs(&self, lanes: &Lanes, jobs: &mut Vec<Job>) {
        let pause = if lanes.is_empty() { PAUSE } else { RETRY };
        let (mut backlog, _) = self
            .changed
            .wait_timeout_while(self.lock(), pause, |backlog| backlog.fds < WAKE_AT)
            .unwrap_or_else(PoisonError::into_inner);
        if lanes.is_empty() && backlog.jobs.is_empty() {
            backlog.thread = Thread::Idle;
            backlog = self
                .changed
                .wait_while(backlog, |backlog| backlog.jobs.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            backlog.thread = Thread::Busy;
        }
        backlog.fds = 0;
        std::mem::swap(&mut backlog.jobs, jobs);
    }
}

/// The descriptors that the closer's thread has sorted, and where each kind goes.
struct Lanes {
    /// `None` if the kernel or a sandbox does not allow it, or if no thread could be had.
    exit: Option<ExitCloser<Vec<Closed>>>,
    exit_tried: Instant,
    sockets: Vec<Closing>,
    /// The time since which the kernel has refused `sockets`.
    refused_since: Option<Instant>,
    known: KnownFiles,
    slow: SlowThreads,
}

impl Lanes {
    fn new() -> Self {
        Self {
            exit: ExitCloser::start().ok(),
            exit_tried: Instant::now(),
            sockets: Vec::new(),
            refused_since: None,
            known: KnownFiles::find(),
            slow: SlowThreads::new(SLOW_THREADS),
        }
    }

    /// Returns true if nothing has to be tried again.
    fn is_empty(&self) -> bool {
        self.sockets.is_empty() && !self.slow.lacks_a_thread()
    }

    fn add(&mut self, closing: Closing) {
        let fd = closing.fd.as_fd();
        if sys::is_socket(fd) {
            self.sockets.push(closing);
        } else if self.known.close_is_quick(fd) {
            drop(closing);
        } else {
            self.slow.close(closing);
        }
    }

    /// Closes what can be closed now.
    fn close(&mut self) {
        self.slow.start_threads();
        if self.sockets.is_empty() {
            return;
        }
        if self.exit.is_none() && self.exit_tried.elapsed() > PATIENCE {
            self.exit = ExitCloser::start().ok();
            self.exit_tried = Instant::now();
        }
        let refused = match &self.exit {
            Some(exit) => close_in_exiting_threads(exit, std::mem::take(&mut self.sockets)),
            None => std::mem::take(&mut self.sockets),
        };
        if refused.is_empty() {
            self.refused_since = None;
            return;
        }
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        if self.exit.is_some() && since.elapsed() < PATIENCE {
            self.sockets = refused;
        } else {
            refused.into_iter().for_each(|closing| self.slow.close(closing));
            self.slow.start_threads();
        }
    }
}

/// Returns the sockets that the kernel refuses for now.
fn close_in_exiting_threads(exit: &ExitCloser<Vec<Closed>>, mut sockets: Vec<Closing>) -> Vec<Closing> {
    while !sockets.is_empty() {
        let rest = sockets.split_off(sockets.len().min(sys::most_sockets_at_once()));
        let (fds, closed) = sockets.into_iter().map(|Closing { fd, charge }| (fd, Closed(charge))).unzip();
        if let Err((fds, closed)) = exit.close(fds, closed) {
            let mut refused: Vec<_> =
                fds.into_iter().zip(closed).map(|(fd, Closed(charge))| Closing { fd, charge }).collect();
            refused.extend(rest);
            return refused;
        }
        sockets = rest;
    }
    sockets
}
