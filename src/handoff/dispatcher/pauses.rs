//! Accept loops that wait for descriptors.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The pauses of all accept loops of a dispatcher.
#[derive(Debug, Clone, Default)]
pub(super) struct Pauses(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    begun: u64,
    /// The beginnings of the pauses that have not ended.
    lasting: BTreeMap<u64, Instant>,
}

/// The pause of one accept loop, which has no descriptor or memory to accept with. It ends when
/// this is dropped.
#[derive(Debug)]
pub(super) struct Pause {
    pauses: Pauses,
    number: u64,
}

impl Pauses {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) -> Pause {
        let mut state = self.lock();
        state.begun += 1;
        let number = state.begun;
        state.lasting.insert(number, Instant::now());
        Pause { pauses: self.clone(), number }
    }

    /// Returns the number of pauses since the beginning, and the length so far of the oldest pause
    /// that has not ended.
    pub(super) fn stats(&self, now: Instant) -> (u64, Option<Duration>) {
        let state = self.lock();
        let oldest = state.lasting.values().next();
        (state.begun, oldest.map(|since| now.saturating_duration_since(*since)))
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.pauses.lock().lasting.remove(&self.number);
    }
}
