//! The state of a server as a service manager sees it.

use super::{Phase, Server};

/// The state of a service, which its manager has to be informed of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServiceState {
    /// The service accepts connections, in this process or in its successor.
    Ready,
    /// A new process is about to take over.
    Reloading,
    /// This process can't serve again. The process id is that of its successor, if it is known.
    Replaced(Option<u32>),
}

impl Server {
    /// Waits until the state differs from the one that was reported last, and returns it.
    pub(crate) async fn next_service_state(&self, reported: Option<ServiceState>) -> ServiceState {
        let mut next = None;
        self.wait(|status| {
            let current = match status.phase {
                Phase::Serving if status.is_claimed => ServiceState::Reloading,
                // While this process drains, its successor serves.
                Phase::Serving | Phase::Draining => ServiceState::Ready,
                Phase::Replaced => ServiceState::Replaced(status.successor),
            };
            next = Some(current).filter(|current| reported != Some(*current));
            next.is_some()
        })
        .await;
        next.expect("the wait ends when there is one")
    }
}
