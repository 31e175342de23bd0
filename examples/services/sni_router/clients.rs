//! The clients that the router holds, and which of them has to go when there are too many.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::oneshot;

/// The clients that the router holds: it waits for their first message, or for a worker that takes
/// them. When there are too many, the one that has been held longest is let go. So however many
/// clients send nothing, one that sends its hello without delay is served.
#[derive(Clone)]
pub(crate) struct Clients {
    max: usize,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    next_number: u64,
    /// By number, so the first one is the oldest. A sender is only dropped, which wakes its
    /// client's task.
    clients: BTreeMap<u64, oneshot::Sender<()>>,
}

/// A client that is held until this is dropped.
pub(crate) struct HeldClient {
    clients: Clients,
    number: u64,
    let_go: oneshot::Receiver<()>,
}

impl Clients {
    /// Returns a register for `max` clients, at least one.
    pub(crate) fn new(max: usize) -> Self {
        Self { max: max.max(1), held: Arc::default() }
    }

    /// Registers one more client, and lets the oldest one go if there are too many.
    pub(crate) fn hold(&self) -> HeldClient {
        let (sender, let_go) = oneshot::channel();
        let mut held = self.lock();
        let number = held.next_number;
        held.next_number += 1;
        held.clients.insert(number, sender);
        if held.clients.len() > self.max {
            held.clients.pop_first();
        }
        HeldClient { clients: self.clone(), number, let_go }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("nothing panics while it is locked")
    }
}

impl HeldClient {
    /// Waits until the client has to go, because newer ones need its place. Must not be awaited
    /// again after that.
    pub(crate) async fn let_go(&mut self) {
        let _ = (&mut self.let_go).await;
    }
}

impl Drop for HeldClient {
    fn drop(&mut self) {
        self.clients.lock().clients.remove(&self.number);
    }
}
