//! The numbers of a server's connections.

use std::sync::atomic::AtomicU64;

use tokio::sync::watch;

/// The numbers of a server's connections, and a way to wait for changes.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// Number of connections that were opened so far. The next one gets this number.
    pub(super) opened: AtomicU64,
    pub(super) counts: watch::Sender<Counts>,
}

/// Numbers that change together.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    /// Connections that are open.
    pub(super) open: usize,
    /// Connections that were closed because of the deadline.
    pub(super) cut: usize,
}
