//! A dispatcher whose workers go on when its process is replaced.

#[cfg(not(feature = "handoff"))]
mod absent;

use std::io;

#[cfg(not(feature = "handoff"))]
pub(super) use absent::{Dispatcher, Succession, TakenWorkers};

use crate::Frame;
#[cfg(feature = "handoff")]
pub(super) use crate::handoff::{Dispatcher, Succession, TakenWorkers};

/// The workers of a hand-off, as far as a server knows them.
#[derive(Debug, Default)]
pub(super) struct Workers {
    /// From the server that this one has replaced.
    coming: Vec<Frame>,
    taken: Option<TakenWorkers>,
    dispatcher: Option<Dispatcher>,
}

impl Workers {
    pub(super) fn come(&mut self, workers: Vec<Frame>) {
        self.coming = workers;
    }

    /// Keeps the workers of a dispatcher from now on. Returns those that it is to take.
    #[cfg(feature = "handoff")]
    pub(super) fn keep(&mut self, dispatcher: Dispatcher) -> Vec<Frame> {
        self.dispatcher = Some(dispatcher);
        std::mem::take(&mut self.coming)
    }

    #[cfg(feature = "handoff")]
    pub(super) fn took(&mut self, taken: TakenWorkers) {
        self.taken = Some(taken);
    }

    /// Prepares for another process to go on with the workers.
    pub(super) fn prepare(&self) -> io::Result<Option<(Succession, Vec<Frame>)>> {
        self.dispatcher.as_ref().map(Dispatcher::prepare_succession).transpose()
    }

    /// The server that this one has replaced goes on.
    pub(super) fn give_back(&mut self) {
        self.coming.clear();
        self.taken.take().iter_mut().for_each(TakenWorkers::give_back);
    }
}
