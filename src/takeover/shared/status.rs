//! The part of a server's state that its handles and tasks wait for.

use bytes::Bytes;
use tokio::time::Instant;

use crate::takeover::Phase;

/// The progress of takeovers: from a predecessor, and to a successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::takeover) struct Status {
    pub(in crate::takeover) phase: Phase,
    /// True if this process has the control socket, so that another one can take over.
    pub(in crate::takeover) has_control: bool,
    /// True as long as the predecessor may still have to serve again.
    pub(in crate::takeover) has_predecessor: bool,
    pub(in crate::takeover) baton: Baton,
    /// True while another process is taking over from this one.
    pub(in crate::takeover) is_claimed: bool,
    /// The id of the process that has replaced this one, if it is in this PID namespace.
    pub(in crate::takeover) successor: Option<u32>,
    /// The moment at which this process was replaced. `None` in [`Phase::Serving`].
    pub(in crate::takeover) replaced_at: Option<Instant>,
    /// True once a successor has asked this process to leave before its connections have ended.
    pub(in crate::takeover) must_leave: bool,
}

/// The baton that comes with a takeover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::takeover) enum Baton {
    /// The predecessor has not put it down yet.
    Awaited,
    /// This process has it. `None` if there is no baton: then no other process has one either.
    Held(Option<Bytes>),
}
