//! The number of a server's connections.

use std::sync::atomic::AtomicU64;

use tokio::sync::watch;

/// The connections of a server.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// Number of connections that were ever opened.
    pub(super) ever: AtomicU64,
    pub(super) counts: watch::Sender<Counts>,
}

/// Numbers of connections.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    pub(super) open: usize,
    /// Closed because of the deadline.
    pub(super) cut: usize,
}
