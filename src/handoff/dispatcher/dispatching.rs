//! A connection that is being handed over, and a slot that is kept for one.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::oneshot;

use super::{
    Accepted, DispatchError, Group, WorkerId,
    handover::Handover,
    pool::{Admission, TicketId},
    shared::{Shared, Slot},
};

/// Hands a connection over to its group, or to `group` if it names none. Takes a slot that was
/// reserved for it.
pub(super) fn dispatch(
    shared: &Arc<Shared>,
    connection: Accepted,
    group: &Group,
    slot: Option<Slot>,
) -> Dispatching {
    let (reply, outcome) = oneshot::channel();
    // If the connection cannot be offered, the slot is dropped, and free again.
    if let Some(connection) = Handover::new(connection, reply) {
        match slot {
            Some(slot) => slot.dispatch(connection, group),
            None => shared.dispatch(connection, group, Admission::None),
        }
    }
    Dispatching { outcome }
}

/// A connection that is being handed over, from
/// [`Dispatcher::dispatch`](super::Dispatcher::dispatch). The future is ready when a worker has
/// adopted it, or when it was given up.
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

/// A slot at a worker for one connection, from
/// [`Dispatcher::reserve`](super::Dispatcher::reserve). Dropping it frees the slot.
#[derive(Debug)]
#[must_use = "dropping it frees the slot again"]
pub struct DispatchPermit(Slot);

impl DispatchPermit {
    /// [Hands a connection over](super::Dispatcher::dispatch) to the slot. If it is meant for
    /// [another group](Accepted::group), it waits there, and the slot is free again.
    ///
    /// # Errors
    /// The errors of [`Dispatcher::dispatch`](super::Dispatcher::dispatch).
    ///
    /// # Cancel safety
    /// If the future is dropped, the connection is handed over all the same. If that fails, its
    /// client sees the end.
    pub fn dispatch(self, connection: impl Into<Accepted>) -> Dispatching {
        let Self(slot) = self;
        let group = slot.group().cloned().unwrap_or_default();
        dispatch(&Arc::clone(slot.shared()), connection.into(), &group, Some(slot))
    }
}

/// Waits for a slot in a group, and keeps it. Returns `None` when the dispatcher drains.
pub(super) async fn reserve(shared: &Arc<Shared>, group: &Group) -> Option<DispatchPermit> {
    slot_in(shared, Some(group)).await.map(DispatchPermit)
}

/// Waits for a slot in a group, and keeps it. Without a group, waits until there is a slot in any
/// group, which is not kept. Returns `None` when the dispatcher drains.
pub(super) async fn slot_in(shared: &Arc<Shared>, group: Option<&Group>) -> Option<Slot> {
    match shared.wait_for_slot(group)? {
        Ok(slot) => Some(slot),
        Err((ticket, granted)) => WaitingForSlot { shared, group, ticket, granted }.await,
    }
}

/// A position in the queue for a slot, given up when it is dropped.
struct WaitingForSlot<'a> {
    shared: &'a Arc<Shared>,
    group: Option<&'a Group>,
    ticket: TicketId,
    granted: oneshot::Receiver<Slot>,
}

impl Future for WaitingForSlot<'_> {
    type Output = Option<Slot>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Slot>> {
        Pin::new(&mut self.granted).poll(cx).map(Result::ok)
    }
}

impl Drop for WaitingForSlot<'_> {
    fn drop(&mut self) {
        self.shared.stop_waiting(self.group, self.ticket);
    }
}
