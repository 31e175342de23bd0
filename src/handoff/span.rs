//! The `tracing` spans of a connection, in the dispatcher's process and in the worker's.

use std::{
    fmt, mem,
    os::fd::AsFd,
    panic::{AssertUnwindSafe, catch_unwind},
};

use nix::sys::socket::getsockopt;
use tracing::{Span, debug_span, field};

use super::Address;
use crate::sys;

/// The target of all spans, regardless of the module.
const TARGET: &str = "fdwire::connection";

/// The identity of a connection in the logs of all processes: its `SO_COOKIE`, as `ss -e` prints
/// it.
#[derive(Clone, Copy)]
pub(super) struct ConnectionId(pub(super) u64);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A span of one connection, which ends when this is dropped.
///
/// A subscriber is foreign code. If it panics here, the connection goes on without its span.
#[derive(Debug)]
pub(super) struct ConnectionSpan(Span);

impl ConnectionSpan {
    /// Begins a span when a dispatcher gets a connection.
    pub(super) fn dispatch(cookie: u64, peer: &Address, local: &Address) -> Self {
        Self::new(|| {
            debug_span!(
                target: TARGET,
                "dispatch",
                connection = %ConnectionId(cookie),
                %peer,
                %local,
                worker = field::Empty,
                outcome = field::Empty,
            )
        })
    }

    /// Begins a span when a worker has adopted a connection.
    pub(super) fn serve(cookie: u64, peer: &Address, local: &Address) -> Self {
        Self::new(|| {
            let connection = ConnectionId(cookie);
            debug_span!(target: TARGET, "serve", %connection, %peer, %local)
        })
    }

    /// Begins a span for the function that prepares a connection.
    pub(super) fn prepare(socket: &impl AsFd) -> Self {
        Self::new(|| {
            // The system call is made only if a subscriber wants the span.
            debug_span!(
                target: TARGET,
                "prepare",
                connection = %ConnectionId(getsockopt(socket, sys::Cookie).unwrap_or(0)),
            )
        })
    }

    fn new(span: impl FnOnce() -> Span) -> Self {
        Self(catch_unwind(AssertUnwindSafe(span)).unwrap_or_else(|_| Span::none()))
    }

    /// Returns the span, for events of the application.
    pub(super) fn get(&self) -> &Span {
        &self.0
    }

    /// Returns the span itself, which ends when that is dropped.
    pub(super) fn into_span(mut self) -> Span {
        mem::replace(&mut self.0, Span::none())
    }

    /// Ends the span with the outcome of the connection, and the number of the worker that has
    /// adopted it.
    pub(super) fn end(&mut self, outcome: &'static str, worker: Option<u64>) {
        self.end_after(|span| {
            span.record("outcome", outcome);
            if let Some(worker) = worker {
                span.record("worker", worker);
            }
        });
    }

    fn end_after(&mut self, last: impl FnOnce(&Span)) {
        let span = mem::replace(&mut self.0, Span::none());
        if !span.is_disabled() {
            let _ = catch_unwind(AssertUnwindSafe(|| last(&span)));
            let _ = catch_unwind(AssertUnwindSafe(|| drop(span)));
        }
    }
}

impl Drop for ConnectionSpan {
    fn drop(&mut self) {
        self.end_after(|_| {});
    }
}
