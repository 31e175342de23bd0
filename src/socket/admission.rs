//! Decides which peers a listener admits.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

use super::path::PathGuard;

/// The overflow uid of a kernel on which nobody has changed it.
const DEFAULT_OVERFLOW_UID: u32 = 65534;

/// The uids that a listener admits.
#[derive(Debug)]
pub(super) struct Admission {
    admitted: Admitted,
    /// The uid that `SO_PEERCRED` reports for every uid without a mapping in this process's user namespace. `None` if
    /// every uid has a mapping.
    overflow_uid: Option<u32>,
    refused: AtomicU64,
}

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
}

impl Admission {
    /// Admits the own effective uid and root.
    pub(super) fn new() -> Self {
        let admitted = Admitted::Uids(vec![nix::unistd::geteuid().as_raw(), 0]);
        Self { admitted, overflow_uid: overflow_uid(), refused: AtomicU64::new(0) }
    }

    pub(super) fn allow_uids(&mut self, uids: impl IntoIterator<Item = u32>) {
        if let Admitted::Uids(admitted) = &mut self.admitted {
            admitted.extend(uids);
        }
    }

    pub(super) fn allow_any_uid(&mut self) {
        self.admitted = Admitted::Any;
    }

    pub(super) fn needs_uid(&self) -> bool {
        matches!(self.admitted, Admitted::Uids(_))
    }

    /// Returns true if a peer of this uid is admitted by a listener at this path, and counts it if not.
    pub(super) fn admits(&self, uid: u32, path: Option<&PathGuard>) -> bool {
        let refusal = self.check(uid, || path.is_some_and(PathGuard::admits_owner_only));
        if refusal.is_some() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        refusal.is_none()
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn check(&self, uid: u32, path_admits_owner_only: impl FnOnce() -> bool) -> Option<Refusal> {
        let Admitted::Uids(uids) = &self.admitted else { return None };
        if !uids.contains(&uid) {
            return Some(Refusal::NotListed);
        }
        // The kernel compares the owner of a path with the peer's real uid, not with the one that it reports here.
        let is_ambiguous = self.overflow_uid == Some(uid) && !path_admits_owner_only();
        is_ambiguous.then_some(Refusal::Overflow)
    }
}

/// Returns the uid that is reported for a uid without a mapping, or `None` if every uid has one. If `/proc` does not tell,
/// the answer is the cautious one.
fn overflow_uid() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if maps_every_uid(&map) {
        return None;
    }
    let overflow_uid = fs::read_to_string("/proc/sys/kernel/overflowuid").ok();
    Some(overflow_uid.and_then(|uid| uid.trim().parse().ok()).unwrap_or(DEFAULT_OVERFLOW_UID))
}

/// Returns true for the map of the initial user namespace. Each uid that exists has itself as its mapping there.
fn maps_every_uid(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(uids: &[u32], overflow_uid: Option<u32>) -> Admission {
        Admission { admitted: Admitted::Uids(uids.to_vec()), overflow_uid, refused: AtomicU64::new(0) }
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
