//! The process that sent a message.

use std::{fs, os::fd::OwnedFd};

use nix::sys::stat::fstat;

/// The process that sent a message, as the kernel reports it with the message (`SCM_CREDENTIALS`
/// and `SCM_PIDFD`, unix(7)).
///
/// This differs from [`PeerCred`](crate::PeerCred), which names the process that made the
/// connection: several processes may hold one end of it and write to it. A receiver has to ask for
/// credentials, by [`Socket::set_pass_credentials`](crate::Socket::set_pass_credentials) or
/// [`DatagramSocket::set_pass_credentials`](crate::DatagramSocket::set_pass_credentials).
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

impl Credentials {
    /// Returns `None` if the kernel does not know the sender. It then reports process 0 and the
    /// overflow ids, for example for everything that was sent before credentials were switched on.
    pub(crate) fn from_kernel(pid: i32, uid: u32, gid: u32, pidfd: Option<OwnedFd>) -> Option<Self> {
        let pid = (pid != 0).then_some(pid);
        let is_unknown = pid.is_none() && (uid, gid) == (overflow_id("overflowuid"), overflow_id("overflowgid"));
        (!is_unknown).then_some(Self { uid, gid, pid, pidfd })
    }

    /// Returns true if both name the same process with the same ids, as far as can be told.
    ///
    /// A process id may have been used again, and processes of another PID namespace have none.
    /// Pidfds distinguish even these processes from Linux 6.9 on, where each process has its own
    /// inode.
    pub(crate) fn is_same_sender(&self, other: &Self) -> bool {
        let has_same_ids = (self.pid, self.uid, self.gid) == (other.pid, other.uid, other.gid);
        has_same_ids
            && match (&self.pidfd, &other.pidfd) {
                (Some(pidfd), Some(other)) => has_same_inode(pidfd, other),
                _ => true,
            }
    }
}

/// Returns false if both are known and differ.
fn has_same_inode(a: &OwnedFd, b: &OwnedFd) -> bool {
    match (fstat(a), fstat(b)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => true,
    }
}

/// Returns the id that the kernel reports for every id without a mapping in this user namespace.
pub(crate) fn overflow_id(name: &str) -> u32 {
    /// The kernel's own default.
    const DEFAULT: u32 = 65534;
    let id = fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok();
    id.and_then(|id| id.trim().parse().ok()).unwrap_or(DEFAULT)
}
