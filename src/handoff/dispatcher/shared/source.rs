use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::Shared;

/// An accept loop, or a connection that is being prepared: it may bring connections while the
/// dispatcher drains, and the drain waits for it.
#[derive(Debug)]
pub(in crate::handoff::dispatcher) struct Source(Arc<Shared>);

impl Source {
    pub(in crate::handoff::dispatcher) fn new(shared: &Arc<Shared>) -> Self {
        shared.sources.fetch_add(1, Relaxed);
        Self(Arc::clone(shared))
    }

    pub(in crate::handoff::dispatcher) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.sources.fetch_sub(1, Relaxed);
        if !self.0.with_pool(|pool| pool.is_open()) {
            self.0.changed();
        }
    }
}
