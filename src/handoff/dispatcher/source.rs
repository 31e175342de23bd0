use std::sync::Arc;

use super::shared::Shared;

/// An accept loop, or a connection that is being prepared: it may bring connections while the
/// dispatcher drains, and the drain waits for it.
#[derive(Debug)]
pub(super) struct Source(Arc<Shared>);

impl Source {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.add_source();
        Self(Arc::clone(shared))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.remove_source();
    }
}
