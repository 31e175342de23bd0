//! The statistics of a worker.

/// The numbers of connections of a worker, from
/// [`IncomingHandle::stats`](super::IncomingHandle::stats).
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::handoff::Incoming;
///
/// let incoming = Incoming::from_stdin()?;
/// let stats = incoming.handle().stats();
/// println!("{} connections are being served", stats.active);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct IncomingStats {
    /// The number of connections adopted since the worker began.
    pub adopted: u64,
    /// The number of connections rejected since the worker began.
    pub rejected: u64,
    /// The number of adopted connections that have not ended yet.
    pub active: u64,
    /// The number of offers that are not answered yet.
    pub waiting: u64,
    /// The number of offers that were asked for and have not arrived yet.
    pub requested: u64,
}
