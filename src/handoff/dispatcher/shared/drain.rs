//! The drain of a dispatcher.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{task::JoinHandle, time::timeout_at};
use tracing::info;

use super::{Shared, lock};
use crate::handoff::dispatcher::{after, pool::Pool};

impl Shared {
    pub(in crate::handoff::dispatcher) fn start_drain(
        self: &Arc<Self>,
        within: Option<Duration>,
    ) -> JoinHandle<()> {
        let (half, until) = (within.map(|within| after(within / 2)), within.map(after));
        self.with_pool(|pool| pool.drain(until, Instant::now()));
        let callers = std::mem::take(&mut *lock(&self.callers));
        drop(callers); // after the unlock, because this wakes tasks
        self.changed();
        let shared = Arc::clone(self);
        self.runtime.spawn(async move { shared.drain(half, until).await })
    }

    async fn drain(self: &Arc<Self>, half: Option<Instant>, until: Option<Instant>) {
        // First, accepted connections are handed over. If all workers are full, half of the time
        // may pass before that.
        let is_settled = |pool: &Pool<_>| self.sources.load(Relaxed) == 0 && pool.is_settled();
        at_most(half, self.until(is_settled)).await;
        self.with_pool(|pool| pool.close(Instant::now()));
        self.changed();
        self.until(Pool::has_no_workers).await;
        let ended = || self.until(|pool| pool.leftover() == 0);
        // Wait for the processes, and then kill those that have not ended, if that is allowed.
        let exit_by = after(self.config.exit_timeout);
        at_most(Some(until.map_or(exit_by, |until| until.min(exit_by))), ended()).await;
        if self.config.kill_hung {
            self.kill.send_replace(true);
            ended().await;
        }
        info!("the dispatcher has drained");
    }
}

async fn at_most(until: Option<Instant>, future: impl Future<Output = ()>) {
    match until {
        Some(until) => drop(timeout_at(until.into(), future).await),
        None => future.await,
    }
}
