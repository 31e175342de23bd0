//! A connection that is being handed over, and a place that is kept for one.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::sync::oneshot;

use super::{
    Accepted, DispatchError, Group, Shared, WorkerId,
    handover::Handover,
    pool::{Admission, TicketId},
};

/// Hands a connection over to its group, or to this one if it names none.
pub(super) fn dispatch(
    shared: &Arc<Shared>,
    connection: Accepted,
    group: &Group,
    admission: Admission,
) -> Dispatching {
    let (reply, outcome) = oneshot::channel();
    match (Handover::new(connection, reply), admission) {
        (Some(connection), admission) => connection.dispatch(shared, group, admission),
        (None, Admission::Reserved(group)) => {
            shared.act(|pool| pool.give_up_slot(&group, Instant::now()));
        }
        (None, _) => {}
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
pub struct DispatchPermit {
    shared: Arc<Shared>,
    /// The group in which a place is kept. If it is kept nowhere, the permit is good for a
    /// connection that was accepted before the dispatcher has drained.
    place: Option<Group>,
}

impl DispatchPermit {
    pub(super) fn new(shared: &Arc<Shared>, place: Option<Group>) -> Self {
        Self { shared: Arc::clone(shared), place }
    }

    fn use_up(&mut self) -> Admission {
        self.place.take().map_or(Admission::Late, Admission::Reserved)
    }

    /// [Hands a connection over](super::Dispatcher::dispatch) to the place. If it is meant for
    /// [another group](Accepted::group), it waits there, and the place is free again.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub fn dispatch(mut self, connection: impl Into<Accepted>) -> Dispatching {
        let (connection, group) = (connection.into(), self.place.clone().unwrap_or_default());
        let admission = self.use_up();
        dispatch(&self.shared, connection, &group, admission)
    }

    /// The same for a connection for which nobody waits.
    pub(super) fn take(mut self, connection: Box<Handover>, group: &Group) {
        let admission = self.use_up();
        connection.dispatch(&self.shared, group, admission);
    }
}

impl Drop for DispatchPermit {
    fn drop(&mut self) {
        if let Some(group) = self.place.take() {
            self.shared.act(|pool| pool.give_up_slot(&group, Instant::now()));
        }
    }
}

/// Waits for a place in a group, which is kept; without a group until there is one in any, which is
/// not kept. `None` when the dispatcher drains.
pub(super) async fn reserve(shared: &Arc<Shared>, group: Option<&Group>) -> Option<DispatchPermit> {
    match shared.wait_for_slot(group)? {
        Ok(permit) => Some(permit),
        Err((ticket, granted)) => Waiting { shared, group, ticket, granted }.await,
    }
}

/// Permits a connection that was accepted before the dispatcher has drained to wait. `None` when it
/// has.
pub(super) fn reserve_late(shared: &Arc<Shared>) -> Option<DispatchPermit> {
    (!shared.act(|pool| pool.is_closed())).then(|| DispatchPermit::new(shared, None))
}

/// A place in the queue, until it is dropped.
struct Waiting<'a> {
    shared: &'a Arc<Shared>,
    group: Option<&'a Group>,
    ticket: TicketId,
    granted: oneshot::Receiver<DispatchPermit>,
}

impl Future for Waiting<'_> {
    type Output = Option<DispatchPermit>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<DispatchPermit>> {
        Pin::new(&mut self.granted).poll(cx).map(Result::ok)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.stop_waiting(self.group, self.ticket);
    }
}
