//! The numbers of a server that can be replaced.

use metrics::Label;

use super::{Series, describe};
use crate::takeover::{Phase, Server};

/// Passes the numbers of a [`Server`] to the recorder of its process: see the [module](super).
#[derive(Debug)]
pub struct TakeoverMetrics(Series);

impl TakeoverMetrics {
    /// Describes the numbers to the recorder. `name` becomes the label `server`.
    pub fn new(name: impl Into<String>) -> Self {
        describe("fdwire_takeover_");
        Self(Series::new("server", name.into()))
    }

    /// Updates the recorder.
    pub fn update(&mut self, server: &Server) {
        let (phase, old) = (server.phase(), server.generations());
        for (label, is_it) in [
            ("serving", phase == Phase::Serving),
            ("draining", phase == Phase::Draining),
            ("replaced", phase == Phase::Replaced),
        ] {
            let label = Label::from_static_parts("phase", label);
            self.0.set("fdwire_takeover_phase", &[label], f64::from(u8::from(is_it)));
        }
        let oldest = old.first().map_or(0.0, |oldest| oldest.replaced_for.as_secs_f64());
        for (name, value) in [
            ("fdwire_takeover_generation", f64::from(server.generation())),
            ("fdwire_takeover_open_connections", server.open_connections() as f64),
            ("fdwire_takeover_old_processes", old.len() as f64),
            ("fdwire_takeover_oldest_process_seconds", oldest),
        ] {
            self.0.set(name, &[], value);
        }
    }
}
