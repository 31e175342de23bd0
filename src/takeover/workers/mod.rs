//! The workers of a dispatcher that move to the next process in a takeover.

#[cfg(not(feature = "handoff"))]
mod absent;

use std::io;

#[cfg(not(feature = "handoff"))]
pub(super) use absent::{Dispatcher, Succession, TakenWorkers};

use crate::Frame;
#[cfg(feature = "handoff")]
pub(super) use crate::handoff::{Dispatcher, Succession, TakenWorkers};

/// The workers of a hand-off that a server receives, and that it passes on.
#[derive(Debug, Default)]
pub(super) struct Workers {
    /// The workers of the server that this one has replaced, until the application calls
    /// `Server::keep_workers`.
    received: Vec<Frame>,
    /// The same workers, once the dispatcher has taken them.
    taken: Option<TakenWorkers>,
    /// Set by `Server::keep_workers`.
    dispatcher: Option<Dispatcher>,
}

impl Workers {
    pub(super) fn set_received(&mut self, workers: Vec<Frame>) {
        self.received = workers;
    }

    /// Sets the dispatcher whose workers are passed on. Returns the workers for it to take.
    #[cfg(feature = "handoff")]
    pub(super) fn keep(&mut self, dispatcher: Dispatcher) -> Vec<Frame> {
        self.dispatcher = Some(dispatcher);
        std::mem::take(&mut self.received)
    }

    #[cfg(feature = "handoff")]
    pub(super) fn set_taken(&mut self, taken: TakenWorkers) {
        self.taken = Some(taken);
    }

    /// Prepares the move of the workers to another process. `None` if there is no dispatcher.
    pub(super) fn prepare(&self) -> io::Result<Option<(Succession, Vec<Frame>)>> {
        self.dispatcher.as_ref().map(Dispatcher::prepare_succession).transpose()
    }

    /// Gives the workers back to the server that this one had replaced.
    pub(super) fn give_back(&mut self) {
        self.received.clear();
        self.taken.take().iter_mut().for_each(TakenWorkers::give_back);
    }
}
