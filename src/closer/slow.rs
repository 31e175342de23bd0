//! Threads for descriptors whose `close` may block.

use std::{
    collections::VecDeque,
    os::fd::AsFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::account::Closing;
use crate::sys;

/// A few threads, each of which may be stuck in a `close`.
#[derive(Debug)]
pub(super) struct SlowThreads {
    shared: Arc<Mutex<State>>,
    most: usize,
}

/// The state that the threads share.
#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Closing>,
    /// The number of threads that run. A thread ends when nothing waits.
    threads: usize,
    /// The number of threads that are closing a descriptor, and may be stuck.
    busy: usize,
}

impl State {
    /// Returns true if more descriptors wait than idle threads are about to take, and one more
    /// thread is allowed.
    fn needs_a_thread(&self, most: usize) -> bool {
        self.threads < most && self.threads - self.busy < self.waiting.len()
    }
}

impl SlowThreads {
    pub(super) fn new(most: usize) -> Self {
        Self { shared: Arc::default(), most }
    }

    /// Appends a descriptor. Call [`start_threads`](Self::start_threads) after that.
    pub(super) fn close(&self, closing: Closing) {
        lock(&self.shared).waiting.push_back(closing);
    }

    /// Starts a thread for each descriptor that no thread is about to take, up to the limit.
    pub(super) fn start_threads(&self) {
        let mut state = lock(&self.shared);
        while state.needs_a_thread(self.most) {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name("fdwire-close-slow".to_owned());
            if thread.spawn(move || close_all_that_wait(&shared)).is_err() {
                break;
            }
            state.threads += 1;
        }
    }

    /// Returns true if a descriptor waits because the system could not start a thread.
    pub(super) fn lacks_a_thread(&self) -> bool {
        lock(&self.shared).needs_a_thread(self.most)
    }
}

/// Runs a thread, until nothing waits.
fn close_all_that_wait(shared: &Mutex<State>) {
    loop {
        let mut state = lock(shared);
        let Some(closing) = state.waiting.pop_front() else {
            state.threads -= 1;
            return;
        };
        // From here on, this thread may be stuck, so it counts as busy until it is done.
        state.busy += 1;
        drop(state);
        if sys::is_socket(closing.fd.as_fd()) {
            // The exiting tasks could not take this socket. Switching the linger time off loses no
            // data. `close` then blocks only if a peer sets the time again at this very moment.
            sys::switch_off_linger(closing.fd.as_fd());
        }
        drop(closing);
        lock(shared).busy -= 1;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, IoSlice, Write},
        net::{TcpListener, TcpStream},
        os::fd::OwnedFd,
        os::unix::net::UnixStream,
        time::Duration,
    };

    use nix::{
        libc,
        sys::socket::{setsockopt, sockopt},
    };

    use super::*;

    /// Returns a Unix socket whose `close` takes an hour, and the sockets that make it slow.
    fn stuck() -> (OwnedFd, impl Sized) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut server = listener.accept().unwrap().0;
        server.set_nonblocking(true).unwrap();
        let full = loop {
            if let Err(error) = server.write(&[7; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        setsockopt(&server, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 3600 }).unwrap();
        let (unix, peer) = UnixStream::pair().unwrap();
        sys::sendmsg(peer.as_fd(), &[IoSlice::new(b"x")], [server.as_fd()].into_iter()).unwrap();
        (unix.into(), (client, peer))
    }

    #[test]
    fn a_descriptor_does_not_wait_behind_one_that_is_stuck() {
        let slow = SlowThreads::new(2);
        let close = |fd| {
            slow.close(Closing { fd, charge: None });
            slow.start_threads();
        };
        let (unix, _open) = stuck();
        close(unix);
        while !lock(&slow.shared).waiting.is_empty() {
            thread::yield_now();
        }

        let (reader, writer) = UnixStream::pair().unwrap();
        close(writer.into());
        reader.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(std::io::Read::read(&mut &reader, &mut [0]).unwrap(), 0);
    }
}
