//! The numbers of a worker, in its own process.

use super::{Series, describe};
use crate::handoff::IncomingStats;

/// Passes the [`IncomingStats`] of a worker to the recorder of its process: see the
/// [module](super).
#[derive(Debug)]
pub struct IncomingMetrics(Series);

impl IncomingMetrics {
    /// Describes the numbers to the recorder. `name` becomes the label `incoming`.
    pub fn new(name: impl Into<String>) -> Self {
        describe("fdwire_incoming_");
        Self(Series::new("incoming", name.into()))
    }

    /// Updates the recorder. All numbers have to come from the same link.
    pub fn update(&mut self, stats: &IncomingStats) {
        for (name, total) in [
            ("fdwire_incoming_adopted_connections_total", stats.adopted),
            ("fdwire_incoming_rejected_connections_total", stats.rejected),
        ] {
            self.0.count(name, &[], total);
        }
        for (name, value) in [
            ("fdwire_incoming_active_connections", stats.active),
            ("fdwire_incoming_waiting_connections", stats.waiting),
            ("fdwire_incoming_requested_connections", stats.requested),
        ] {
            self.0.set(name, &[], value as f64);
        }
    }
}
