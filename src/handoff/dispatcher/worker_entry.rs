use std::{sync::Arc, time::Instant};

use super::{WorkerId, shared::Shared};

/// A worker is listed as long as its task lives, even if that panics in a subscriber of `tracing`:
/// nobody waits for it then.
#[derive(Debug)]
pub(super) struct WorkerEntryGuard {
    shared: Arc<Shared>,
    id: WorkerId,
}

impl WorkerEntryGuard {
    pub(super) fn new(shared: &Arc<Shared>, id: WorkerId) -> Self {
        Self { shared: Arc::clone(shared), id }
    }
}

impl Drop for WorkerEntryGuard {
    fn drop(&mut self) {
        self.shared.remove_signal(self.id);
        self.shared.act(|pool| pool.forget(self.id, Instant::now()));
        self.shared.changed();
    }
}
