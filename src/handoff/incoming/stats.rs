//! The numbers of a worker.

/// Numbers of a worker's link to its dispatcher, from
/// [`IncomingHandle::stats`](super::IncomingHandle::stats). They count connections.
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
    /// Adopted, from the beginning.
    pub adopted: u64,
    /// Given back to the dispatcher, from the beginning.
    pub rejected: u64,
    /// Adopted and not ended, now.
    pub active: u64,
    /// Offered, and not answered yet, now.
    pub waiting: u64,
    /// Asked for, and not offered yet, now.
    pub requested: u64,
}
