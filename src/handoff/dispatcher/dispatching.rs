//! A connection that is being handed over, and a place that is kept for one.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::sync::oneshot;

use super::{Accepted, DispatchError, Shared, WorkerId, handover::Handover, pool::TicketId};

pub(super) fn dispatch(shared: &Arc<Shared>, connection: Accepted, reserved: bool) -> Dispatching {
    let (reply, outcome) = oneshot::channel();
    match Handover::new(connection, reply) {
        Some(connection) => connection.dispatch(shared, reserved),
        None if reserved => shared.act(|pool| pool.give_up_place(Instant::now())),
        None => {}
    }
    Dispatching { outcome }
}

/// A connection that is being handed over, from
/// [`Dispatcher::dispatch`](super::Dispatcher::dispatch). Ready when a worker has adopted it.
#[derive(Debug)]
#[must_use = "if it is dropped, a connection that no worker adopts is closed instead of given back"]
pub struct Dispatching {
    outcome: oneshot::Receiver<Result<WorkerId, DispatchError>>,
}

impl Future for Dispatching {
    type Output = Result<WorkerId, DispatchError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match ready!(Pin::new(&mut self.outcome).poll(cx)) {
            Ok(outcome) => Poll::Ready(outcome),
            Err(_) => Poll::Pending, // the runtime that it was handed over in is gone
        }
    }
}

/// A place for one connection, from [`Dispatcher::reserve`](super::Dispatcher::reserve). Free again
/// when it is dropped.
#[derive(Debug)]
#[must_use = "dropping it frees the place again"]
pub struct Permit {
    shared: Arc<Shared>,
    is_used: bool,
}

impl Permit {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), is_used: false }
    }

    /// [Hands a connection over](super::Dispatcher::dispatch) to the place.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub fn dispatch(mut self, connection: impl Into<Accepted>) -> Dispatching {
        let connection = connection.into();
        self.is_used = true;
        dispatch(&self.shared, connection, true)
    }

    /// The same for a connection for which nobody waits.
    pub(super) fn take(mut self, connection: Box<Handover>) {
        self.is_used = true;
        connection.dispatch(&self.shared, true);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.is_used {
            self.shared.act(|pool| pool.give_up_place(Instant::now()));
        }
    }
}

/// Waits for a place. `None` when the dispatcher drains.
pub(super) async fn reserve(shared: &Arc<Shared>) -> Option<Permit> {
    match shared.wait_for_place()? {
        Ok(permit) => Some(permit),
        Err((ticket, granted)) => Waiting { shared, ticket, granted }.await,
    }
}

/// Reserves a place that there may not be, for a connection that was accepted before the dispatcher
/// has drained. `None` when it has.
pub(super) fn reserve_late(shared: &Arc<Shared>) -> Option<Permit> {
    shared.act(|pool| pool.reserve_late()).then(|| Permit::new(shared))
}

/// A place in the queue, until it is dropped.
struct Waiting<'a> {
    shared: &'a Arc<Shared>,
    ticket: TicketId,
    granted: oneshot::Receiver<Permit>,
}

impl Future for Waiting<'_> {
    type Output = Option<Permit>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Permit>> {
        Pin::new(&mut self.granted).poll(cx).map(Result::ok)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.stop_waiting(self.ticket);
    }
}
