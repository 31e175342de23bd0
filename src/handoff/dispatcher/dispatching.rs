//! A connection that is being handed over, and a place that is kept for one.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::oneshot;

use super::{Accepted, DispatchError, Shared, WorkerId, job::Job};

pub(super) fn dispatch(shared: &Shared, connection: Accepted, reserved: bool) -> Dispatching {
    let (reply, outcome) = oneshot::channel();
    if let Some(job) = Job::new(connection, reply) {
        shared.lock().dispatch(job, reserved);
    } else if reserved {
        shared.lock().give_up_place();
    }
    Dispatching { outcome }
}

/// A connection that is being handed over, from [`Dispatcher::dispatch`](super::Dispatcher::dispatch). Ready when a worker has adopted it.
#[derive(Debug)]
#[must_use = "without it, nobody takes the connection back where no worker adopts it"]
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

/// A place for one connection, from [`Dispatcher::reserve`](super::Dispatcher::reserve). Free again when it is dropped.
#[derive(Debug)]
#[must_use = "a place is kept free for nothing"]
pub struct Permit {
    pub(super) shared: Arc<Shared>,
    /// It counts.
    pub(super) granted: bool,
}

impl Permit {
    /// [Hands a connection over](super::Dispatcher::dispatch) to the place.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub fn dispatch(mut self, connection: impl Into<Accepted>) -> Dispatching {
        let connection = connection.into();
        self.granted = false;
        dispatch(&self.shared, connection, true)
    }

    /// The same for a connection for which nobody waits.
    pub(super) fn take(mut self, job: Job) {
        self.granted = false;
        self.shared.lock().dispatch(job, true);
    }

    /// Gives it to who has waited for it. Returns whether it counts now.
    pub(super) fn grant(mut self, waiter: oneshot::Sender<Self>) -> bool {
        self.granted = true;
        match waiter.send(self) {
            Ok(()) => true,
            Err(mut unwanted) => {
                unwanted.granted = false;
                false
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.granted {
            self.shared.lock().give_up_place();
        }
    }
}
