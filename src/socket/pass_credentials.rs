//! The choice of credentials that come with messages.

use std::{io::Result, os::fd::AsFd};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};

use crate::sys;

/// The choice of what the kernel reports about the process that sends a message.
///
/// The options are of the receiving socket (`SO_PASSCRED` and `SO_PASSPIDFD`, unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PassCredentials {
    /// No report.
    #[default]
    No,
    /// The ids of the process: [`Credentials`](crate::Credentials) without a pidfd.
    Ids,
    /// The ids and a pidfd of the process, which takes a descriptor for each receive (Linux 6.5).
    IdsAndPidfd,
}

impl PassCredentials {
    pub(super) fn set(self, socket: &impl AsFd) -> Result<()> {
        // First set the option that may be missing, so that nothing has changed if it is.
        match setsockopt(socket, sys::PassPidfd, &(self == Self::IdsAndPidfd)) {
            Err(Errno::ENOPROTOOPT) if self != Self::IdsAndPidfd => {} // a kernel before 6.5
            set => set?,
        }
        Ok(setsockopt(socket, sockopt::PassCred, &(self != Self::No))?)
    }
}
