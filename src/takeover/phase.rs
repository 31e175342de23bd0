//! The phases of a server.

/// The phase of a server: whether this process accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// This process accepts connections.
    Serving,
    /// Another process accepts, and this one finishes its connections. If the other one ends, this
    /// one accepts again.
    Draining,
    /// Another process accepts. This one has closed its listeners.
    Replaced,
}
