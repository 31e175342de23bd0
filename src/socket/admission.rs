//! Decides which peers a listener admits, and logs those that it refuses.

use std::{
    fmt, fs,
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    PeerCred, UidLimits,
    path::PathGuard,
    uid_account::{OverLimit, UidAccounts, UidShare},
};
use crate::sys::overflow_id;

/// The shortest time between two log lines about refused peers. It keeps a peer that connects in a
/// loop from filling the log.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// The uids that a listener admits, and the account of each of them.
#[derive(Debug)]
pub(crate) struct Admission {
    admitted: Admitted,
    accounts: UidAccounts,
    /// The uid that `SO_PEERCRED` reports for every uid without a mapping in this process's user
    /// namespace. `None` if every uid has a mapping.
    overflow_uid: Option<u32>,
    refused: AtomicU64,
    log: Mutex<RefusalLog>,
}

/// The uids that are admitted.
#[derive(Debug)]
enum Admitted {
    Uids(Vec<u32>),
    Any,
}

/// The reason why a peer is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// Its uid is not in the list.
    NotListed,
    /// Its uid is in the list, but may stand for any other.
    Overflow,
    /// Its uid has reached a limit.
    OverLimit(OverLimit),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotListed => "its uid is not admitted; to admit it, use `Listener::allow_uids`",
            Self::Overflow => {
                "its uid may stand for any uid that this user namespace does not map, \
                 so it cannot be admitted by number; bind a path with mode 0600, or use \
                 `Listener::allow_any_uid` and the mode of the path or its directory"
            }
            Self::OverLimit(OverLimit::Connections) => {
                "its uid has as many connections as `UidLimits::max_connections` allows; \
                 to change that, use `Listener::limit_each_uid`"
            }
            Self::OverLimit(OverLimit::Closing) => {
                "more descriptors from its uid wait to be closed than `UidLimits::max_fds` allows"
            }
        })
    }
}

impl Admission {
    /// Admits the own effective uid and root.
    pub(super) fn new() -> Self {
        let admitted = Admitted::Uids(vec![nix::unistd::geteuid().as_raw(), 0]);
        let accounts = UidAccounts::new(UidLimits::default());
        Self {
            admitted,
            accounts,
            overflow_uid: overflow_uid(),
            refused: AtomicU64::new(0),
            log: Mutex::default(),
        }
    }

    pub(crate) fn allow_uids(&mut self, uids: impl IntoIterator<Item = u32>) {
        if let Admitted::Uids(admitted) = &mut self.admitted {
            admitted.extend(uids);
        }
    }

    pub(crate) fn allow_any_uid(&mut self) {
        self.admitted = Admitted::Any;
    }

    pub(crate) fn limit_each_uid(&mut self, limits: UidLimits) {
        self.accounts = UidAccounts::new(limits);
    }

    /// Admits a peer to the listener with this address and path. A refusal is counted and logged.
    pub(super) fn admit(
        &self,
        peer: PeerCred,
        path: Option<&PathGuard>,
        addr: impl FnOnce() -> std::io::Result<SocketAddr>,
    ) -> Option<UidShare> {
        // The uid has to be in the list, and below its limit of connections.
        let refusal = match self.check(peer.uid, || path.is_some_and(PathGuard::admits_owner_only))
        {
            Some(refusal) => refusal,
            None => match self.accounts.add_connection(peer.uid) {
                Ok(share) => return Some(share),
                Err(over_limit) => Refusal::OverLimit(over_limit),
            },
        };
        // Count and log the refusal.
        self.refused.fetch_add(1, Ordering::Relaxed);
        // The lock is released before a subscriber, which is foreign code, gets the line.
        let to_log = self.log.lock().unwrap_or_else(PoisonError::into_inner).count(Instant::now());
        if let Some(refused) = to_log {
            let listener = addr().map_or_else(|error| error.to_string(), |addr| readable(&addr));
            warn!(
                uid = peer.uid,
                pid = peer.pid,
                listener,
                refused,
                "connection refused: {refusal}"
            );
        }
        None
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns the reason to refuse a uid, apart from its limits.
    fn check(&self, uid: u32, path_admits_owner_only: impl FnOnce() -> bool) -> Option<Refusal> {
        let Admitted::Uids(uids) = &self.admitted else { return None };
        if !uids.contains(&uid) {
            return Some(Refusal::NotListed);
        }
        // The overflow uid may be any uid without a mapping. But for the permission to connect to a
        // path, the kernel has compared the true uid, and not the one that it reports here.
        let is_ambiguous = self.overflow_uid == Some(uid) && !path_admits_owner_only();
        is_ambiguous.then_some(Refusal::Overflow)
    }
}

/// Decides which refusals get a line in the log.
#[derive(Debug, Default)]
struct RefusalLog {
    last_line: Option<Instant>,
    /// Refusals since the last line.
    unlogged: u64,
}

impl RefusalLog {
    /// Counts a refusal. Returns the number of refusals to log, or `None` if the last line is too
    /// recent.
    fn count(&mut self, now: Instant) -> Option<u64> {
        self.unlogged += 1;
        if self.last_line.is_some_and(|last| now < last + LOG_INTERVAL) {
            return None;
        }
        self.last_line = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

/// Returns a path as it is, and an abstract name with an `@` in front, as most tools write it.
fn readable(addr: &SocketAddr) -> String {
    match (addr.as_pathname(), addr.as_abstract_name()) {
        (Some(path), _) => path.display().to_string(),
        (_, Some(name)) => format!("@{}", name.escape_ascii()),
        _ => "unnamed".to_owned(),
    }
}

/// Returns the uid that is reported for a uid without a mapping, or `None` if every uid has one. If
/// `/proc` cannot be read, it assumes that some uid has no mapping.
fn overflow_uid() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if maps_every_uid(&map) {
        return None;
    }
    Some(overflow_id("overflowuid"))
}

/// Returns true for the map of the initial user namespace. Each uid that exists has itself as its
/// mapping there.
fn maps_every_uid(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(uids: &[u32], overflow_uid: Option<u32>) -> Admission {
        Admission { admitted: Admitted::Uids(uids.to_vec()), overflow_uid, ..Admission::new() }
    }

    #[test]
    fn the_overflow_uid_is_admitted_only_if_something_else_vouches_for_it() {
        let everywhere = admission(&[1000, 65534], None);
        assert_eq!(everywhere.check(65534, || false), None);
        assert_eq!(everywhere.check(0, || true), Some(Refusal::NotListed));

        let in_namespace = admission(&[1000, 65534], Some(65534));
        assert_eq!(in_namespace.check(1000, || false), None);
        assert_eq!(in_namespace.check(65534, || false), Some(Refusal::Overflow));
        assert_eq!(in_namespace.check(65534, || true), None);
        assert_eq!(admission(&[1000], Some(65534)).check(65534, || true), Some(Refusal::NotListed));
        // An administrator can change the number.
        assert_eq!(admission(&[0], Some(0)).check(0, || false), Some(Refusal::Overflow));
    }

    #[test]
    fn one_line_a_second_counts_all_refusals() {
        let mut log = RefusalLog::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(log.count(at(0)), Some(1));
        assert_eq!(log.count(at(1)), None);
        assert_eq!(log.count(at(999)), None);
        assert_eq!(log.count(at(1000)), Some(3));
        assert_eq!(log.count(at(1999)), None);
        assert_eq!(log.count(at(60_000)), Some(2));
    }

    #[test]
    fn only_the_map_of_the_initial_user_namespace_maps_every_uid() {
        assert!(maps_every_uid("         0          0 4294967295\n"));
        for map in [
            "",
            "         0     100000      65536\n",
            "         0       1000          1\n",
            "         0          0      65536\n",
            "         0          0 4294967294\n",
            "         0          0 4294967295\n 5 5 1\n",
            "     65534          0          1\n",
        ] {
            assert!(!maps_every_uid(map), "{map:?}");
        }
    }
}
