//! The resources that the connections of one uid share, and their limits.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use nix::sys::resource::{Resource, getrlimit};

use crate::{closer::Account, error::Error, limits::SCM_MAX_FD};

/// Limits for all connections of one uid together, at a [`Listener`](crate::Listener).
///
/// [`Limits`](crate::Limits) limits one connection. `UidLimits` limits a uid that makes many
/// connections, so that other uids get their share.
///
/// ```
/// use fdwire::socket::UidLimits;
///
/// let limits = UidLimits::default().max_connections(64).max_bytes(16 << 20);
/// # let _ = limits;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct UidLimits {
    /// The number of connections that were accepted and are not dropped. One more is refused.
    /// Default: a quarter of the descriptors that this process may open (the soft `RLIMIT_NOFILE`,
    /// getrlimit(2)).
    ///
    /// A [`Socket`](crate::Socket) no longer counts when it is converted into another type.
    pub max_connections: usize,

    /// The number of bytes of messages that have arrived in part. A connection that exceeds the
    /// limit ends with [`Error::OverUidLimit`]. Default: 256 MiB.
    ///
    /// Messages that wait to be sent do not count. They are limited by the [limit of each
    /// connection](crate::Limits#structfield.max_queued_bytes) and by the number of connections.
    pub max_bytes: usize,

    /// The number of descriptors that have arrived and that no message has claimed yet. A
    /// connection that exceeds the limit ends with [`Error::OverUidLimit`]. Default: a quarter of
    /// the soft `RLIMIT_NOFILE`, at least 253.
    ///
    /// Raise it, or `RLIMIT_NOFILE`, if honest peers send frames with many descriptors at the same
    /// time: one connection may have
    /// [`Limits::max_queued_fds`](crate::Limits#structfield.max_queued_fds) of them.
    ///
    /// The same number may wait to be closed [in the background](crate::close_in_background). While
    /// more wait, the connections of the uid receive nothing and new ones are refused.
    pub max_fds: usize,
}

impl Default for UidLimits {
    /// A quarter of the soft `RLIMIT_NOFILE` for connections and for descriptors; 256 MiB.
    fn default() -> Self {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 0));
        let quarter = usize::try_from(soft / 4).unwrap_or(usize::MAX);
        Self {
            max_connections: quarter.max(1),
            max_bytes: 256 << 20,
            max_fds: quarter.max(SCM_MAX_FD),
        }
    }
}

impl UidLimits {
    /// Returns the limits with another [`max_connections`](Self#structfield.max_connections).
    #[must_use]
    pub const fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = connections;
        self
    }

    /// Returns the limits with another [`max_bytes`](Self#structfield.max_bytes).
    #[must_use]
    pub const fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Returns the limits with another [`max_fds`](Self#structfield.max_fds).
    #[must_use]
    pub const fn max_fds(mut self, fds: usize) -> Self {
        self.max_fds = fds;
        self
    }
}

/// The accounts of a listener, one for each uid that holds something.
#[derive(Debug)]
pub(super) struct UidAccounts {
    limits: UidLimits,
    by_uid: Mutex<HashMap<u32, Arc<UidAccount>>>,
}

/// The resources that the connections of one uid hold.
#[derive(Debug)]
struct UidAccount {
    uid: u32,
    limits: UidLimits,
    connections: AtomicUsize,
    /// The bytes of messages that have arrived in part.
    bytes: AtomicUsize,
    /// The descriptors that no message has claimed.
    fds: AtomicUsize,
    /// The count of descriptors that wait to be closed: the parent of each connection's account.
    closing: Arc<Account>,
}

/// The limit that one more connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OverLimit {
    /// The number of connections.
    Connections,
    /// The number of descriptors that wait to be closed.
    Closing,
}

impl UidAccounts {
    pub(super) fn new(limits: UidLimits) -> Self {
        Self { limits, by_uid: Mutex::default() }
    }

    /// Counts one more connection of a uid.
    pub(super) fn add_connection(&self, uid: u32) -> Result<UidShare, OverLimit> {
        // The lock is held until the connection counts, because several tasks may accept at the
        // same time.
        let mut by_uid = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        // Before an account is added, remove those that are no longer used.
        if !by_uid.contains_key(&uid) {
            by_uid.retain(|_, account| is_used(account));
        }
        let account =
            by_uid.entry(uid).or_insert_with(|| Arc::new(UidAccount::new(uid, self.limits)));
        if account.connections.load(Ordering::Relaxed) >= self.limits.max_connections {
            return Err(OverLimit::Connections);
        }
        if account.closing.closing() > self.limits.max_fds {
            return Err(OverLimit::Closing);
        }
        Ok(UidShare::new(Arc::clone(account)))
    }
}

impl UidAccount {
    fn new(uid: u32, limits: UidLimits) -> Self {
        Self {
            uid,
            limits,
            connections: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            fds: AtomicUsize::new(0),
            closing: Arc::default(),
        }
    }
}

/// Returns true if the account still has a connection, or a descriptor that came over one and may
/// have to be closed.
fn is_used(account: &Arc<UidAccount>) -> bool {
    Arc::strong_count(account) > 1 || Arc::strong_count(&account.closing) > 1
}

/// A connection's part of what its uid holds.
#[derive(Debug)]
pub(crate) struct UidShare {
    account: Arc<UidAccount>,
    /// The part of this connection in the numbers of the account. Only its receiver changes them.
    bytes: AtomicUsize,
    fds: AtomicUsize,
}

impl UidShare {
    fn new(account: Arc<UidAccount>) -> Self {
        account.connections.fetch_add(1, Ordering::Relaxed);
        Self { account, bytes: AtomicUsize::new(0), fds: AtomicUsize::new(0) }
    }

    /// Counts a copy of the connection that this process has made. It is never refused.
    pub(super) fn for_copy(&self) -> Self {
        Self::new(Arc::clone(&self.account))
    }

    /// Returns an account for the descriptors of this connection that wait to be closed.
    pub(super) fn closing_account(&self) -> Account {
        Account::with_parent(Arc::clone(&self.account.closing))
    }

    /// Waits while too many descriptors of the uid wait to be closed.
    pub(super) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.account.closing.poll_at_most(cx, self.account.limits.max_fds)
    }

    /// Sets the number of bytes and descriptors that this connection holds of incomplete messages.
    ///
    /// # Errors
    /// [`Error::OverUidLimit`] if the connection grows and its uid holds more than it may hold.
    pub(super) fn hold(&self, bytes: usize, fds: usize) -> Result<(), Error> {
        let UidAccount { uid, limits, bytes: all_bytes, fds: all_fds, .. } = &*self.account;
        // Only growth can be an error. To hold less is always allowed, even if the sum is too
        // large.
        let bytes = replace_part(&self.bytes, bytes, all_bytes);
        let fds = replace_part(&self.fds, fds, all_fds);
        let is_over = bytes.is_some_and(|all| all > limits.max_bytes)
            || fds.is_some_and(|all| all > limits.max_fds);
        if !is_over {
            return Ok(());
        }
        let [bytes, fds] = [all_bytes, all_fds].map(|all| all.load(Ordering::Relaxed));
        Err(Error::OverUidLimit { uid: *uid, bytes, fds })
    }
}

/// Replaces one part of a sum. Returns the new sum if the part has grown.
fn replace_part(part: &AtomicUsize, new: usize, sum: &AtomicUsize) -> Option<usize> {
    let old = part.swap(new, Ordering::Relaxed);
    if new > old {
        return Some(sum.fetch_add(new - old, Ordering::Relaxed) + (new - old));
    }
    sum.fetch_sub(old - new, Ordering::Relaxed);
    None
}

impl Drop for UidShare {
    fn drop(&mut self) {
        let _ = self.hold(0, 0); // to hold nothing is never over a limit
        self.account.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> UidLimits {
        UidLimits::default().max_connections(2).max_bytes(1000).max_fds(253)
    }

    #[test]
    fn each_uid_has_its_own_connections() {
        let accounts = UidAccounts::new(limits());
        let first = accounts.add_connection(1000).unwrap();
        let _second = accounts.add_connection(1000).unwrap();
        assert_eq!(accounts.add_connection(1000).unwrap_err(), OverLimit::Connections);
        let _other = accounts.add_connection(1001).unwrap();
        drop(first);
        accounts.add_connection(1000).unwrap();
    }

    #[test]
    fn connections_of_a_uid_hold_together_what_one_may_hold() {
        let accounts = UidAccounts::new(limits());
        let [a, b] = [(); 2].map(|()| accounts.add_connection(1000).unwrap());
        a.hold(600, 0).unwrap();
        b.hold(400, 253).unwrap();
        a.hold(500, 0).unwrap();
        b.hold(500, 253).unwrap();
        let error = b.hold(501, 253).unwrap_err();
        assert!(
            matches!(error, Error::OverUidLimit { uid: 1000, bytes: 1001, fds: 253 }),
            "{error}"
        );
        // Less is never an error, even if the sum is still too much.
        b.hold(501, 252).unwrap();
        assert!(a.hold(500, 2).is_err());

        drop(b);
        let b = accounts.add_connection(1000).unwrap();
        b.hold(500, 251).unwrap();
    }

    #[test]
    fn a_copy_of_a_connection_counts_and_holds_something_of_its_own() {
        let accounts = UidAccounts::new(limits());
        let _other = accounts.add_connection(1000).unwrap();
        let connection = accounts.add_connection(1000).unwrap();
        let copy = connection.for_copy();
        connection.hold(600, 0).unwrap();
        assert!(copy.hold(401, 0).is_err());
        drop(connection);
        copy.hold(1000, 0).unwrap();
        assert_eq!(accounts.add_connection(1000).unwrap_err(), OverLimit::Connections);
        drop(copy);
        accounts.add_connection(1000).unwrap();
    }

    #[test]
    fn accounts_that_nobody_uses_are_forgotten() {
        let accounts = UidAccounts::new(limits());
        let uids = || accounts.by_uid.lock().unwrap().len();
        for uid in 0..100 {
            drop(accounts.add_connection(uid).unwrap());
        }
        assert_eq!(uids(), 1);

        // A descriptor of a connection that is gone may still wait to be closed, or have to.
        let share = accounts.add_connection(100).unwrap();
        let closing = share.closing_account();
        drop(share);
        drop(accounts.add_connection(101).unwrap());
        assert_eq!(uids(), 2);
        drop(closing);
        drop(accounts.add_connection(102).unwrap());
        assert_eq!(uids(), 1);
    }

    /// Another task may accept a connection of another uid before the first one is a socket.
    #[test]
    fn a_connection_that_was_just_counted_keeps_its_account() {
        let accounts = UidAccounts::new(limits());
        let _new = accounts.add_connection(1000).unwrap();
        let _other = accounts.add_connection(1001).unwrap();
        let _second = accounts.add_connection(1000).unwrap();
        assert_eq!(accounts.add_connection(1000).unwrap_err(), OverLimit::Connections);
    }
}
