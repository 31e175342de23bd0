//! The choice of credentials that come with messages.

use std::{io::Result, os::fd::AsFd};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};

use crate::sys;

/// The choice of what the kernel reports about the process that sends a message.
///
/// These are options of the receiving socket (`SO_PASSCRED` and `SO_PASSPIDFD`, unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PassCredentials {
    /// Nothing is reported.
    #[default]
    No,
    /// The ids of the process: [`Credentials`](crate::socket::Credentials) without a pidfd.
    Ids,
    /// The ids and a pidfd of the process, which takes a descriptor for each receive (Linux 6.5).
    IdsAndPidfd,
}

impl PassCredentials {
    /// Sets the options of a socket.
    pub(super) fn set(self, socket: &impl AsFd) -> Result<()> {
        // Set the newer option first, so that nothing has changed if the kernel does not have it.
        match setsockopt(socket, sys::PassPidfd, &(self == Self::IdsAndPidfd)) {
            Err(Errno::ENOPROTOOPT) if self != Self::IdsAndPidfd => {} // a kernel before 6.5
            set => set?,
        }
        Ok(setsockopt(socket, sockopt::PassCred, &(self != Self::No))?)
    }
}
