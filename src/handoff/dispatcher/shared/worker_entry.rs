use std::{sync::Arc, time::Instant};

use super::{Shared, lock};
use crate::handoff::WorkerId;

/// Keeps a worker in the pool as long as its task lives. The worker leaves the pool even if the
/// task panics in a subscriber of `tracing`.
#[derive(Debug)]
pub(in crate::handoff::dispatcher) struct WorkerEntryGuard {
    shared: Arc<Shared>,
    id: WorkerId,
}

impl WorkerEntryGuard {
    pub(in crate::handoff::dispatcher) fn new(shared: &Arc<Shared>, id: WorkerId) -> Self {
        Self { shared: Arc::clone(shared), id }
    }
}

impl Drop for WorkerEntryGuard {
    fn drop(&mut self) {
        lock(&self.shared.signals).remove(&self.id);
        self.shared.with_pool(|pool| pool.forget(self.id, Instant::now()));
        self.shared.changed();
    }
}
