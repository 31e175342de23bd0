//! The phases of a server.

use std::fmt;

/// The phase of a server: whether this process accepts connections.
///
/// ```
/// use fdwire::takeover::Phase;
///
/// assert_eq!(Phase::Draining.to_string(), "draining");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// This process accepts connections.
    Serving,
    /// Another process accepts, and this one finishes its connections. If the other process ends,
    /// this one accepts again.
    Draining,
    /// Another process accepts. This one has closed its listeners, and can't serve again.
    Replaced,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Replaced => "replaced",
        })
    }
}
