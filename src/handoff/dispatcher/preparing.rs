//! The application's function that prepares accepted connections.

use std::{
    future::Future,
    io,
    os::fd::OwnedFd,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use futures::{FutureExt, future::BoxFuture};
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tracing::{Instrument, debug, warn};

use super::{
    Accepted, Group, IntoListener, Shared, builder::Config, dispatching::slot_in,
    handover::Handover, pool::Admission, shared::Source,
};
use crate::handoff::span::ConnectionSpan;

type Prepare =
    Arc<dyn Fn(OwnedFd) -> BoxFuture<'static, io::Result<Option<Accepted>>> + Send + Sync>;

/// The application's function, and the limit on the connections that are being prepared.
pub(super) struct Preparing {
    prepare: Prepare,
    free: Arc<Semaphore>,
    most: usize,
}

/// Permits one more connection to be prepared.
pub(super) struct PreparePermit {
    prepare: Prepare,
    _taken: OwnedSemaphorePermit,
}

impl Preparing {
    pub(super) fn new<L, P, F>(config: &Config, prepare: P) -> Self
    where
        L: IntoListener,
        P: Fn(L::Stream) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Accepted>> + Send + 'static,
    {
        let (most, prepare) = (config.max_preparing, Arc::new(prepare));
        let prepare: Prepare = Arc::new(move |connection| {
            let prepare = Arc::clone(&prepare);
            async move { Ok(prepare(L::stream(connection)?).await) }.boxed()
        });
        Self { prepare, free: Arc::new(Semaphore::new(most)), most }
    }

    /// Waits until another connection can be prepared.
    pub(super) async fn prepare_permit(&self) -> PreparePermit {
        let taken =
            Arc::clone(&self.free).acquire_owned().await.expect("nobody closes the semaphore");
        PreparePermit { prepare: Arc::clone(&self.prepare), _taken: taken }
    }

    /// Returns the number of connections that are being prepared, or are prepared and wait for a
    /// slot.
    pub(super) fn count(&self) -> u64 {
        (self.most - self.free.available_permits()) as u64
    }
}

impl PreparePermit {
    /// Prepares a connection and hands it over, in a task of its own.
    pub(super) fn prepare(self, shared: &Arc<Shared>, group: &Group, connection: OwnedFd) {
        let span = ConnectionSpan::prepare(&connection).into_span();
        let prepare = (self.prepare)(connection).instrument(span);
        // The span ends inside of `catch_unwind`, because a subscriber may panic.
        #[expect(clippy::redundant_async_block, reason = "drops the span where it ends")]
        let prepared = AssertUnwindSafe(async move { prepare.await }).catch_unwind();
        let (source, group) = (Source::new(shared), group.clone());
        shared.runtime.spawn(async move {
            let shared = source.shared();
            let drained = shared.until(|pool| pool.is_closed());
            let prepared = select! {
                prepared = prepared => prepared,
                () = sleep(shared.config.prepare_timeout) => {
                    return not_prepared(shared, "it took too long");
                }
                () = drained => return not_prepared(shared, "the dispatcher has drained"),
            };
            match prepared {
                Ok(Ok(Some(accepted))) => hand_over(shared, accepted, &group).await,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => not_prepared(shared, &error.to_string()),
                Err(_) => not_prepared(shared, "the application's function panicked"),
            }
            drop(self);
        });
    }
}

fn not_prepared(shared: &Arc<Shared>, reason: &str) {
    shared.count_lost();
    debug!(reason, "connection closed: it was not prepared");
}

/// Hands a connection over when a worker of its group has a slot. `group` is the group of a
/// connection that names none.
async fn hand_over(shared: &Arc<Shared>, accepted: Accepted, group: &Group) {
    let connection = match Handover::of(accepted) {
        Ok(connection) => connection,
        Err(unsendable) => return shared.refuse_unsendable(*unsendable),
    };
    let group = connection.group_or(group);
    // Without this limit, connections that wait for a group without room would use up the number
    // that may be prepared, and no connection of another group would be accepted.
    if !shared.with_pool(|pool| pool.may_wait(&group)) {
        shared.count_lost();
        // Clients can cause many of these, so only the first one is logged as a warning.
        if !shared.has_warned_of_crowd.swap(true, Relaxed) {
            warn!(%group, "connections are closed: too many wait for a worker of their group");
        }
        debug!(%group, "connection closed: too many wait for a worker of its group");
        return connection.shut_down();
    }
    let slot = match slot_in(shared, Some(&group)).await {
        Some(slot) => Some(slot),
        None => shared.admit_until_closed(), // the dispatcher drains
    };
    match slot {
        Some(slot) => slot.dispatch(connection, &group),
        // The drain hands nothing more over: the connection fails, and is counted.
        None => shared.dispatch(connection, &group, Admission::None),
    }
}
