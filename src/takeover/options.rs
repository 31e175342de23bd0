//! Settings of a takeover.

use std::time::Duration;

use super::{giver::GiverSettings, protocol::Versions, taker::TakerSettings};

/// Settings of a server and of the process that takes over from it. Every wait has a limit.
///
/// ```
/// use std::time::Duration;
///
/// use fdwire::takeover::Options;
///
/// let options = Options::default().ready_timeout(Duration::from_secs(300)).allow_uids([33]);
/// # let _ = options;
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    versions: Versions,
    pub(super) answer_timeout: Duration,
    pub(super) ready_timeout: Duration,
    pub(super) lock_timeout: Duration,
    pub(super) mode: u32,
    /// Uids that are trusted beside the own one and root.
    pub(super) uids: Vec<u32>,
    pub(super) has_baton: bool,
    pub(super) drain: DrainLimits,
    pub(super) max_old_generations: usize,
}

/// The times of a drain. Both are measured from the moment at which the server is replaced, and the
/// deadline is never before the end of the spread.
#[derive(Debug, Clone, Copy)]
pub(super) struct DrainLimits {
    pub(super) spread: Duration,
    pub(super) deadline: Duration,
}

impl Default for Options {
    /// 5 s for answers and for the lock, 60 s until ready, mode 0600, own uid and root, no baton, a
    /// drain of 10 to 60 s, 8 old generations.
    fn default() -> Self {
        Self {
            versions: Versions::OURS,
            answer_timeout: Duration::from_secs(5),
            ready_timeout: Duration::from_secs(60),
            lock_timeout: Duration::from_secs(5),
            mode: 0o600,
            uids: Vec::new(),
            has_baton: false,
            drain: DrainLimits {
                spread: Duration::from_secs(10),
                deadline: Duration::from_secs(60),
            },
            max_old_generations: 8,
        }
    }
}

impl Options {
    /// Limits the time for each answer of the other process. Default: 5 s.
    #[must_use]
    pub fn answer_timeout(mut self, limit: Duration) -> Self {
        self.answer_timeout = limit;
        self
    }

    /// Limits the time from the moment at which a server has sent its listeners until the new
    /// process is ready. After that, the server calls the takeover off and goes on serving.
    /// Default: 60 s.
    #[must_use]
    pub fn ready_timeout(mut self, limit: Duration) -> Self {
        self.ready_timeout = limit;
        self
    }

    /// Limits the time from the death of a server until the kernel has released its lock. The
    /// kernel closes the files of a dead process one after another, so the lock may take a moment.
    /// Default: 5 s.
    #[must_use]
    pub fn lock_timeout(mut self, limit: Duration) -> Self {
        self.lock_timeout = limit;
        self
    }

    /// Sets the mode of the path at which a server offers its listeners. Default: 0600.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Trusts processes of these uids, beside the own uid and root: a server gives its listeners to
    /// them, and a new process takes listeners from them.
    #[must_use]
    pub fn allow_uids(mut self, uids: impl IntoIterator<Item = u32>) -> Self {
        self.uids.extend(uids);
        self
    }

    /// Declares that the application has a baton: something exclusive, such as a leader's role,
    /// that only the process that serves may have. A server that is replaced has to pass it on with
    /// [`put_down_baton`](super::Server::put_down_baton). The takeover is not confirmed before.
    #[must_use]
    pub fn with_baton(mut self) -> Self {
        self.has_baton = true;
        self
    }

    /// Sets the times of the drain, both measured from the moment at which a server is replaced.
    /// [`Server::finish`](super::Server::finish) obeys them.
    ///
    /// - `spread` is the time over which its connections [end](super::OpenConnection::ending), so
    ///   that clients do not all come back at once. The server stays at least that long, so the
    ///   takeover can be undone for that time. Default: 10 s.
    /// - After `deadline`, connections that are still open are cut. So this is also the greatest
    ///   age of an old generation. Default: 60 s. It is raised to `spread` if it is less.
    #[must_use]
    pub fn drain(mut self, spread: Duration, deadline: Duration) -> Self {
        self.drain = DrainLimits { spread, deadline: deadline.max(spread) };
        self
    }

    /// Limits the number of processes that were replaced and still finish their connections. If
    /// there are more, a new server asks the oldest to leave, and that process cuts its
    /// connections. Default: 8. The limit is at least 1, for the process that may have to serve
    /// again.
    #[must_use]
    pub fn max_old_generations(mut self, most: usize) -> Self {
        self.max_old_generations = most.max(1);
        self
    }

    /// Sets the versions of the protocol that this process speaks. Tests use this to simulate a
    /// takeover between releases.
    #[doc(hidden)]
    #[must_use]
    pub fn versions(mut self, lowest: u8, highest: u8) -> Self {
        self.versions = Versions { lowest, highest };
        self
    }

    pub(super) fn trusts(&self, uid: u32) -> bool {
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.uids.contains(&uid)
    }

    pub(super) fn giver_settings(&self) -> GiverSettings {
        GiverSettings {
            versions: self.versions,
            answer: self.answer_timeout,
            ready: self.ready_timeout,
        }
    }

    pub(super) fn taker_settings(&self) -> TakerSettings {
        TakerSettings {
            versions: self.versions,
            answer: self.answer_timeout,
            lock: self.lock_timeout,
        }
    }
}
