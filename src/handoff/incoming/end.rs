//! How a worker's link to its dispatcher ends.

use std::{fmt, sync::Arc};

use crate::Error;

/// The way in which the link to a dispatcher has ended. Adopted connections outlive it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum IncomingEnd {
    /// In order: every adopted connection has ended, and the dispatcher knows.
    Drained,
    /// The dispatcher has died, or has closed its end without a goodbye.
    DispatcherGone,
    /// The dispatcher accepts no more answers from this worker, usually because it got none in
    /// time. It gives connections that this worker has not adopted to others. The dispatcher lives,
    /// so a worker may connect again.
    Fenced,
    /// The dispatcher broke the protocol, or the socket failed.
    Failed(Arc<Error>),
}

impl fmt::Display for IncomingEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drained => f.write_str("drained: every connection has ended"),
            Self::DispatcherGone => f.write_str("the dispatcher is gone"),
            Self::Fenced => f.write_str("the dispatcher has fenced this worker"),
            Self::Failed(error) => write!(f, "the link to the dispatcher failed: {error}"),
        }
    }
}
