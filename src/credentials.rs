//! The process that sent a message.

use std::{fmt, os::fd::OwnedFd};

/// The process that sent a message, as the kernel reports it with the message (`SCM_CREDENTIALS`
/// and `SCM_PIDFD`, unix(7)).
///
/// [`PeerCred`](crate::socket::PeerCred), in contrast, names the process that made the connection.
/// Several processes may hold one end of a connection and write to it. A receiver has to switch
/// credentials on, with [`Socket::set_pass_credentials`](crate::Socket::set_pass_credentials) or
/// [`DatagramSocket::set_pass_credentials`](crate::socket::DatagramSocket::set_pass_credentials).
///
/// **What credentials prove.** The kernel checks what it reports. An unprivileged sender can only
/// choose among its own real, effective and saved ids. A sender with `CAP_SETUID`, `CAP_SETGID` or
/// `CAP_SYS_ADMIN` may name other ids or another process, as systemd-notify does for the script
/// that calls it. When you look up `pid`, the number may already belong to another process. The
/// pidfd always means the same process.
#[derive(Debug)]
#[non_exhaustive]
pub struct Credentials {
    /// The user id of the sender: the real one, unless the sender has chosen another of its own.
    pub uid: u32,
    /// The group id of the sender, in the same way.
    pub gid: u32,
    /// The process id. `None` if the process is in another PID namespace.
    pub pid: Option<i32>,
    /// A pidfd of that process, if it was [requested](crate::socket::PassCredentials::IdsAndPidfd).
    /// `None` also before Linux 6.5, and if this process has no descriptor left.
    pub pidfd: Option<OwnedFd>,
}

impl fmt::Display for Credentials {
    /// Writes the ids, for example `process 812 of uid 1000, gid 1000`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_process(f, self.pid, self.uid, self.gid)
    }
}

/// Writes the ids of a process for people.
pub(crate) fn write_process(
    f: &mut fmt::Formatter<'_>,
    pid: Option<i32>,
    uid: u32,
    gid: u32,
) -> fmt::Result {
    match pid {
        Some(pid) => write!(f, "process {pid} of uid {uid}, gid {gid}"),
        None => write!(f, "a process of uid {uid}, gid {gid}"),
    }
}
