//! The lanes of the closer's thread: one for each way to close a descriptor.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use super::{
    account::{Charge, Closing},
    files::{KnownFiles, Lane},
    slow::SlowThreads,
};
use crate::sys::{self, ExitCloser};

/// The greatest number of threads for descriptors whose `close` may block.
const SLOW_THREADS: usize = 4;

/// The time for which sockets wait, if the kernel refuses them, before the slow threads get them.
const PATIENCE: Duration = Duration::from_secs(1);

/// The charges of the sockets in one message to an exiting task.
pub(super) type Closed = Vec<Option<Charge>>;

/// The descriptors that the closer's thread has sorted, and the means to close each kind.
pub(super) struct Lanes {
    /// `None` if the kernel or a sandbox does not allow it, or if the system could not start its
    /// thread.
    exit: Option<ExitCloser<Closed>>,
    /// The time of the next attempt to start it. `None` if no attempt is worth making.
    next_start: Option<Instant>,
    report_closed: fn(Closed),
    /// The number of messages whose sockets are not reported as closed yet.
    unreported: usize,
    /// Descriptors whose `close` does not block.
    quick: Vec<Closing>,
    /// Sockets for exiting tasks.
    sockets: Vec<Closing>,
    /// The time since which the kernel has refused `sockets`.
    refused_since: Option<Instant>,
    known: KnownFiles,
    slow: SlowThreads,
}

impl Lanes {
    /// Returns empty lanes. `report_closed` is called with the charges of closed sockets. It must
    /// not drop them, because that may wake a task, and its thread has none of the process's
    /// descriptors.
    pub(super) fn new(report_closed: fn(Closed)) -> Self {
        let mut lanes = Self {
            exit: None,
            next_start: None,
            report_closed,
            unreported: 0,
            quick: Vec::new(),
            sockets: Vec::new(),
            refused_since: None,
            known: KnownFiles::find(),
            slow: SlowThreads::new(SLOW_THREADS),
        };
        lanes.start_exit();
        lanes
    }

    /// Starts the closer for sockets, or sets the time of the next attempt.
    fn start_exit(&mut self) {
        match ExitCloser::start(self.report_closed) {
            Ok(exit) => self.exit = Some(exit),
            // The thread that was started is stuck, and another one would get stuck too.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => self.next_start = None,
            Err(_) => self.next_start = Some(Instant::now() + PATIENCE),
        }
    }

    /// Returns true if an attempt has failed and has to be repeated.
    pub(super) fn has_to_retry(&self) -> bool {
        !self.sockets.is_empty() || self.slow.lacks_a_thread()
    }

    /// Returns true if sockets are being closed whose charges will be reported.
    pub(super) fn expects_a_report(&self) -> bool {
        self.unreported > 0
    }

    /// Counts the messages that were reported.
    pub(super) fn reported(&mut self, messages: usize) {
        self.unreported -= messages;
    }

    /// Sorts one descriptor.
    pub(super) fn add(&mut self, closing: Closing, is_socket: bool) {
        let lane = if is_socket { Lane::Exit } else { self.known.lane(closing.fd.as_fd()) };
        match lane {
            Lane::Exit => self.sockets.push(closing),
            Lane::Quick => self.quick.push(closing),
            Lane::Slow => self.slow.close(closing),
        }
    }

    /// Closes what can be closed now.
    pub(super) fn close(&mut self) {
        self.slow.start_threads();
        if !self.sockets.is_empty() {
            self.close_sockets();
        }
        // Quick ones come last, because freeing their memory may take time.
        let (fds, charges): (Vec<_>, Vec<_>) =
            self.quick.drain(..).map(Closing::into_parts).unzip();
        sys::close_all(fds);
        drop(charges);
    }

    /// Passes the sockets to exiting tasks, or to the slow threads if that is not possible.
    fn close_sockets(&mut self) {
        if self.exit.is_none() && self.next_start.is_some_and(|next| next < Instant::now()) {
            self.start_exit();
        }
        let sockets = std::mem::take(&mut self.sockets);
        let refused = self.close_in_exiting_tasks(sockets);
        if refused.is_empty() {
            self.refused_since = None;
            return;
        }
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        // Wait if it is not too late, or if other messages are being processed: then there will be
        // room. Otherwise use the slow threads.
        if self.exit.is_some() && (since.elapsed() < PATIENCE || self.expects_a_report()) {
            self.sockets = refused;
        } else {
            refused.into_iter().for_each(|closing| self.slow.close(closing));
            self.slow.start_threads();
        }
    }

    /// Passes sockets to exiting tasks. Returns those that the kernel refuses at the moment.
    fn close_in_exiting_tasks(&mut self, mut sockets: Vec<Closing>) -> Vec<Closing> {
        let Some(exit) = &self.exit else { return sockets };
        // One message carries a limited number of sockets.
        while !sockets.is_empty() {
            let rest = sockets.split_off(sockets.len().min(sys::most_sockets_at_once()));
            let (fds, charges) = sockets.into_iter().map(Closing::into_parts).unzip();
            if let Err((fds, charges)) = exit.close(fds, charges) {
                let mut refused: Vec<_> = fds
                    .into_iter()
                    .zip(charges)
                    .map(|(fd, charge)| Closing { fd, charge })
                    .collect();
                refused.extend(rest);
                return refused;
            }
            self.unreported += 1;
            sockets = rest;
        }
        sockets
    }
}
