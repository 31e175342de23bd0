use std::{
    collections::VecDeque,
    os::fd::AsFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};

use super::account::Closing;
use crate::sys;

/// A few threads, each of which may be stuck in a `close` without end.
#[derive(Debug)]
pub(super) struct SlowThreads {
    shared: Arc<Mutex<State>>,
    most: usize,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Closing>,
    /// Number of threads that run. They end when nothing waits.
    threads: usize,
}

impl SlowThreads {
    pub(super) fn new(most: usize) -> Self {
        Self { shared: Arc::default(), most }
    }

    /// Appends a descriptor. [`start_threads`](Self::start_threads) has to follow.
    pub(super) fn close(&self, closing: Closing) {
        lock(&self.shared).waiting.push_back(closing);
    }

    /// Starts a thread for each descriptor that waits, up to the limit.
    pub(super) fn start_threads(&self) {
        let mut state = lock(&self.shared);
        while state.threads < state.waiting.len().min(self.most) {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name("fdwire-close-slow".to_owned());
            if thread.spawn(move || close_all_that_wait(&shared)).is_err() {
                break;
            }
            state.threads += 1;
        }
    }

    /// Returns true if something waits and no thread could be had for it.
    pub(super) fn lacks_a_thread(&self) -> bool {
        let state = lock(&self.shared);
        state.threads == 0 && !state.waiting.is_empty()
    }
}

fn close_all_that_wait(shared: &Mutex<State>) {
    loop {
        let mut state = lock(shared);
        let Some(closing) = state.waiting.pop_front() else {
            state.threads -= 1;
            return;
        };
        drop(state);
        if sys::is_socket(closing.fd.as_fd()) {
            // The exiting tasks could not take it. Nothing is lost without the time to linger, and `close` waits only for
            // a peer that sets it again in this very moment.
            let _ = setsockopt(&closing.fd, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
        }
        drop(closing);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
