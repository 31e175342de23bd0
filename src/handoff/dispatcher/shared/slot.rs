use std::{sync::Arc, time::Instant};

use super::Shared;
use crate::handoff::dispatcher::{Group, handover::Handover, pool::Admission};

/// The right of one connection to be dispatched. Usually a slot at a worker is kept for it, which
/// is free again when this is dropped.
#[derive(Debug)]
pub(in crate::handoff::dispatcher) struct Slot {
    shared: Arc<Shared>,
    /// The group in which a slot is kept. `None` if none is kept: the group of the connection is
    /// not known yet, the dispatcher drains, or the connection comes from another dispatcher.
    group: Option<Group>,
}

impl Slot {
    pub(super) fn new(shared: &Arc<Shared>, group: Option<Group>) -> Self {
        Self { shared: Arc::clone(shared), group }
    }

    pub(in crate::handoff::dispatcher) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(in crate::handoff::dispatcher) fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// [Dispatches](Shared::dispatch) a connection to the slot.
    pub(in crate::handoff::dispatcher) fn dispatch(
        mut self,
        connection: Box<Handover>,
        default: &Group,
    ) {
        // From here on, the connection has the slot, so dropping this frees nothing.
        let admission = self.group.take().map_or(Admission::UntilClosed, Admission::Reserved);
        self.shared.dispatch(connection, default, admission);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(group) = self.group.take() {
            self.shared.with_pool(|pool| pool.give_up_slot(&group, Instant::now()));
        }
    }
}
