//! The process that sent a message.

use std::{fmt, os::fd::OwnedFd};

/// The process that sent a message, as the kernel reports it with the message (`SCM_CREDENTIALS`
/// and `SCM_PIDFD`, unix(7)).
///
/// This differs from [`PeerCred`](crate::socket::PeerCred), which names the process that made the
/// connection: several processes may hold one end of it and write to it. A receiver has to ask for
/// credentials, by [`Socket::set_pass_credentials`](crate::Socket::set_pass_credentials) or
/// [`DatagramSocket::set_pass_credentials`](crate::socket::DatagramSocket::set_pass_credentials).
///
/// **What credentials prove.** The kernel checks what it reports. An unprivileged sender can only
/// choose among its own real, effective and saved ids. A sender with `CAP_SETUID`, `CAP_SETGID` or
/// `CAP_SYS_ADMIN` may name other ids or another process, as systemd-notify does for the script
/// that calls it. By the time that you look up `pid`, the number may belong to another process. The
/// pidfd never does.
#[derive(Debug)]
#[non_exhaustive]
pub struct Credentials {
    /// The user id of the sender: the real one, unless the sender has chosen another of its own.
    pub uid: u32,
    /// The group id of the sender, in the same way.
    pub gid: u32,
    /// The process id. `None` if the process is in another PID namespace.
    pub pid: Option<i32>,
    /// A pidfd of that process, if it was asked for and the kernel could make one: not before Linux
    /// 6.5, and not if this process has no descriptor left.
    pub pidfd: Option<OwnedFd>,
}

impl fmt::Display for Credentials {
    /// Writes the ids, for example `process 812 of uid 1000, gid 1000`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_process(f, self.pid, self.uid, self.gid)
    }
}

/// Writes a process as people read it.
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
