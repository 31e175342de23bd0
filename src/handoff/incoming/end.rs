//! How a worker's link to its dispatcher ends.

use std::{fmt, sync::Arc};

use crate::Error;

/// The way in which the link to a dispatcher has ended. Adopted connections outlive it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum IncomingEnd {
    /// The worker has drained: every adopted connection has ended, and the worker has sent its
    /// goodbye.
    Drained,
    /// The dispatcher has died, or has closed its end without a goodbye.
    DispatcherGone,
    /// The dispatcher has fenced this worker, usually because the worker has not answered a ping in
    /// time. Connections that this worker has not adopted go to other workers. The dispatcher is
    /// alive, so the worker may connect again.
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
