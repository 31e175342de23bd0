//! The changes of a server that a service manager has to know.

use super::{Phase, Server};

/// The state of a server, for a service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// A server serves, this one or its successor.
    Ready,
    /// A new process is about to take over.
    Reloading,
    /// This server can't serve again. With the process id of its successor.
    Replaced(Option<u32>),
}

impl Server {
    /// Waits until the state differs from the one that the manager was told last.
    pub(crate) async fn news_after(&self, told: Option<News>) -> News {
        let mut news = None;
        self.wait(|status| {
            let found = match status.phase {
                Phase::Serving if status.is_claimed => News::Reloading,
                Phase::Serving | Phase::Draining => News::Ready,
                Phase::Replaced => News::Replaced(status.successor),
            };
            news = Some(found).filter(|found| told != Some(*found));
            news.is_some()
        })
        .await;
        news.expect("the wait ends with something new")
    }
}
