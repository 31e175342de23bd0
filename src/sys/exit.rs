//! A way to close sockets that never blocks: in a task that exits.
//!
//! The last `close` of a TCP socket with `SO_LINGER` blocks until its data is acknowledged or the
//! linger time is over. Any process with a copy of the socket can set that time. The same is true
//! of every other call that drops the last reference, for example the `close` of a Unix socket
//! whose queue contains the TCP socket. There is one exception: **a task that exits never waits**
//! (`inet_release` tests `PF_EXITING`), and unsent data is still sent afterwards.
//!
//! So sockets are moved into the descriptor table of a task that then exits:
//!
//! ```text
//! caller                       nursery thread (its own table)      exiting task
//! sendmsg(sockets) ──────────► queue of the nursery's socket
//! close(own copies)            the queue has a copy, so this
//!                              is never the last one
//! announce the message ──────► starts ──────────────────────────► table of its own, recvmsg, exit
//!                              waits until it is gone
//! ```
//!
//! The message is announced after the caller has closed its own copies. Otherwise the exiting task
//! could be faster, and the caller's `close` would be the last one.
//!
//! The exiting task is not a thread, because it would take several times as long to start a thread
//! and to wait until it has closed its descriptors.

use std::{
    ffi::{c_int, c_void},
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::mpsc,
    thread,
    time::Duration,
};

use bytes::BytesMut;
use nix::{
    errno::Errno,
    libc,
    sys::{
        resource::{Resource, getrlimit},
        signal::SigSet,
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{close_all, recvmsg, sendmsg};
use crate::{backoff::Backoff, limits::SCM_MAX_FD};

/// The longest time that the nursery thread may take to start.
const LONGEST_START: Duration = Duration::from_secs(5);

/// A closer of sockets in tasks that exit. Each message of sockets has a value of type `T`, which
/// is reported when the sockets are closed.
#[derive(Debug)]
pub(crate) struct ExitCloser<T> {
    queue: OwnedFd,
    announce: mpsc::Sender<T>,
}

impl<T: Send + 'static> ExitCloser<T> {
    /// Starts the nursery thread, which calls `report_closed`. None of the process's descriptors is
    /// open in that thread. So `report_closed` must not wake a task: the wakers of a runtime write
    /// to a descriptor.
    ///
    /// # Errors
    /// `TimedOut` if the thread is stuck. It closes its copies of the process's descriptors, and
    /// one of them may be a file of a FUSE file system. Other errors if the system has no thread or
    /// descriptor left, if the kernel has no `CLOSE_RANGE_UNSHARE` (Linux 5.9), or if a sandbox
    /// forbids `close_range`.
    pub(crate) fn start(report_closed: impl Fn(T) + Send + 'static) -> io::Result<Self> {
        let (queue, nursery) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let (announce, announced) = mpsc::channel();
        let (report_ready, ready) = mpsc::sync_channel(1);
        let number = nursery.as_raw_fd();
        thread::Builder::new().name("fdwire-nursery".to_owned()).spawn(move || {
            // Block all signals. A signal handler in this thread, or in a task that it starts,
            // would not find the process's descriptors. tokio's handler writes to a pipe, so the
            // signal would be lost.
            SigSet::all().thread_block().expect("the mask is valid");
            let unshared = keep_only(number);
            let is_ready = unshared.is_ok();
            let _ = report_ready.send(unshared);
            if is_ready {
                // SAFETY: the table of this thread is its own from now on. The number is open in
                // it, and nobody else owns it.
                let nursery = unsafe { OwnedFd::from_raw_fd(number) };
                let mut stack = Stack::new();
                while let Ok(closed) = announced.recv() {
                    close_next_message(nursery.as_fd(), &mut stack);
                    report_closed(closed);
                }
            }
        })?;
        // `nursery` stays open in the shared table until the thread has copied it.
        ready
            .recv_timeout(LONGEST_START)
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(Self { queue, announce })
    }

    /// Closes sockets, at most [`most_sockets_at_once`] of them.
    ///
    /// # Errors
    /// The sockets and `closed`, if the kernel does not accept the message: too many descriptors
    /// are in flight (`ETOOMANYREFS`), too many messages wait (`EAGAIN`), or there is no memory.
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

/// Returns the number of sockets that one call of [`ExitCloser::close`] takes. The exiting task
/// needs a descriptor number below `RLIMIT_NOFILE` for each. Otherwise the kernel would close the
/// rest inside `recvmsg`.
pub(crate) fn most_sockets_at_once() -> usize {
    // Numbers that are in use in the exiting task: the socket of the nursery, and one in reserve.
    const OTHERS: u64 = 2;
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((SCM_MAX_FD as u64, 0));
    soft.saturating_sub(OTHERS).clamp(1, SCM_MAX_FD as u64) as usize
}

/// Starts a task that takes the next message out of the queue and exits, and waits until it has
/// ended.
fn close_next_message(nursery: BorrowedFd<'_>, stack: &mut Stack) {
    let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_secs(1));
    while !matches!(receive_in_exiting_task(nursery, stack), Ok(true)) {
        // There is no task or no memory at the moment. The message stays in the queue.
        thread::sleep(backoff.next());
    }
}

/// The memory in which an exiting task runs. One task at a time uses it.
struct Stack(Vec<MaybeUninit<u8>>);

impl Stack {
    fn new() -> Self {
        Self(vec![MaybeUninit::uninit(); 64 << 10])
    }

    /// Returns the end of the memory, from which a stack grows down, aligned as calls need it.
    fn end(&mut self) -> *mut c_void {
        let end = self.0.as_mut_ptr_range().end;
        end.wrapping_sub(end.addr() % 16).cast()
    }
}

/// The place where an exiting task puts a message.
struct Message<'a> {
    nursery: BorrowedFd<'a>,
    byte: BytesMut,
    /// The descriptors in the task's own table. This process must not close their numbers.
    fds: Vec<OwnedFd>,
}

/// Runs [`receive_and_exit`] in a task of its own, and waits until that has closed the descriptors.
/// Returns true if it has received a message.
///
/// The task is like one of vfork(2), but with a stack of its own. It runs in the same memory while
/// this thread sleeps, and has a copy of this thread's descriptor table.
fn receive_in_exiting_task(nursery: BorrowedFd<'_>, stack: &mut Stack) -> io::Result<bool> {
    let mut message =
        Message { nursery, byte: BytesMut::with_capacity(1), fds: Vec::with_capacity(SCM_MAX_FD) };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK; // and no signal at its end
    // SAFETY: the task uses `message` and the stack only while this thread sleeps in the call. The
    // stack is large enough for the function, which only calls `recvmsg` and allocates nothing.
    let task =
        unsafe { libc::clone(receive_and_exit, stack.end(), flags, (&raw mut message).cast()) };
    message.fds.into_iter().for_each(|fd| _ = fd.into_raw_fd());
    let task = Pid::from_raw(Errno::result(task)?);
    // The task first leaves this memory and then closes its descriptors. So wait for its end.
    match waitpid(task, Some(WaitPidFlag::__WALL)) {
        Ok(status) => Ok(status == WaitStatus::Exited(task, 0)),
        // Other code of this process waits for any child with __WALL, and has got this result.
        Err(_) => Ok(true),
    }
}

/// Receives a message and returns, which ends the task: the kernel closes its descriptors.
extern "C" fn receive_and_exit(message: *mut c_void) -> c_int {
    // SAFETY: the thread that has started this task lends it a `Message` and sleeps meanwhile.
    let Message { nursery, byte, fds } = unsafe { &mut *message.cast::<Message<'_>>() };
    match recvmsg(*nursery, byte, 1, fds) {
        Ok(_) => 0,
        Err(_) => 1,
    }
}

/// Gives this thread its own descriptor table, with only this number in it.
fn keep_only(number: RawFd) -> io::Result<()> {
    unshare_up_to(number)?;
    if number > 0 {
        // SAFETY: closes numbers in a table that belongs to this thread alone, and on which no
        // owner relies.
        Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 0, number - 1, 0) })?;
    }
    Ok(())
}

/// Gives this thread its own descriptor table: a copy of the shared one up to `number`.
fn unshare_up_to(number: RawFd) -> io::Result<()> {
    let (first, last) = (number + 1, libc::c_uint::MAX);
    // SAFETY: the kernel first copies the table and then closes only numbers of the copy, on which
    // no owner relies.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE)
    })?;
    Ok(())
}
