//! An attack, and the bounds within which its victim has to stay.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use nix::sys::resource::{Resource, getrlimit};

use super::{
    addr_of, attackers,
    process::{Identity, Process, Role},
    sorts::Sort,
    victim::{self, Report},
};
use crate::{soon, until};

/// The number of attackers, unless their descriptors are too many for one process.
const ATTACKERS: usize = 100;

/// Round trips of the honest client before the attack, while the attackers start, and when all have
/// started.
const TRIPS: usize = 30;

/// The number of threads that the library may start besides those that it has: four for slow files.
const MORE_THREADS: usize = 4;

/// Descriptors that the library and the runtime may open for a moment.
const MORE_FDS: usize = 3;

/// Memory that the victim may take beyond that of its connections.
const MORE_BYTES: usize = 16 << 20;

/// The conditions of an attack.
pub(super) struct Attack {
    pub(super) victim: Identity,
    pub(super) attackers: Identity,
    /// Whether the victim admits only its own uid, which the attackers do not have.
    pub(super) are_refused: bool,
    pub(super) resources: Resources,
}

/// The descriptors and threads that the victim's process may have.
#[derive(Debug, Clone, Copy)]
pub(super) enum Resources {
    /// As many as the system gives.
    All,
    /// Few descriptors and threads, so that the attackers take all of them. The limit of threads
    /// counts all processes of the uid, and the attackers alone have more.
    Few { fds: usize, threads: usize },
    /// Few descriptors. The listener's limits keep the attackers' uid from taking all of them.
    FewForEachUid { fds: usize },
}

impl Resources {
    fn max_fds(self) -> Option<usize> {
        match self {
            Self::All => None,
            Self::Few { fds, .. } | Self::FewForEachUid { fds } => Some(fds),
        }
    }

    fn max_threads(self) -> Option<usize> {
        match self {
            Self::Few { threads, .. } => Some(threads),
            _ => None,
        }
    }

    fn limits_uids(self) -> bool {
        matches!(self, Self::FewForEachUid { .. })
    }
}

impl Default for Attack {
    fn default() -> Self {
        Self::within(Identity::Own)
    }
}

impl Attack {
    /// Returns an attack on a process by processes of the same user.
    pub(super) fn within(identity: Identity) -> Self {
        Self {
            victim: identity,
            attackers: identity,
            are_refused: false,
            resources: Resources::All,
        }
    }

    /// Runs the attack, and checks that the victim withstands it.
    pub(super) async fn withstand(&self, sort: Sort, kind: SocketKind) {
        eprintln!("{sort:?} on {kind:?}"); // shown if the test fails
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("fdwire-crowd-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let is_stream = kind == SocketKind::Stream;

        // Start the victim, and measure it while only the honest client is there.
        let settings = victim::Settings {
            name: name.clone(),
            is_stream,
            admits_any_uid: !self.are_refused,
            limits_uids: self.resources.limits_uids(),
            max_fds: self.resources.max_fds(),
            max_threads: self.resources.max_threads(),
        };
        let mut victim = Process::start(self.victim, &Role::Victim(settings)).await;
        victim.next::<Report>().await;
        let mut honest = Honest::connect(&name, kind).await;
        honest.trips(TRIPS).await;
        let before = Usage::of(&victim);

        // Start the attackers. The honest client is served while they start and when all are there.
        let attackers = ATTACKERS.min(most_attackers(sort));
        let settings = attackers::Settings { sort, attackers, name: name.clone(), is_stream };
        let mut crowd = Process::start(self.attackers, &Role::Attackers(settings)).await;
        tokio::join!(crowd.next::<()>(), honest.trips(TRIPS));
        let mut most = before;
        for _ in 0..TRIPS {
            honest.trips(1).await;
            most = most.max(Usage::of(&victim));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if self.resources.limits_uids() {
            Honest::connect(&name, kind).await.trips(TRIPS).await;
        }
        let report: Report = victim.report().await;
        drop(crowd);

        // After the attack, everything that it took is free again, and clients are served.
        until("what the attackers have left is closed", || {
            let now = Usage::of(&victim);
            most = most.max(now);
            now.fds == before.fds && now.threads <= before.threads
        })
        .await;
        let mut late = Honest::connect(&name, kind).await;
        late.trips(TRIPS).await;
        honest.trips(TRIPS).await;
        self.check(before, most, &report, sort, attackers);
    }

    /// Checks that the victim stayed within the bounds, and that the attack took place.
    fn check(&self, before: Usage, most: Usage, report: &Report, sort: Sort, attackers: usize) {
        eprintln!("{before:?}, then {most:?}, {report:?}");

        // Threads, descriptors and memory.
        let sorts = || (0..attackers).map(|index| sort.of_attacker(index));
        assert!(most.threads <= before.threads + MORE_THREADS, "too many threads");
        assert!(
            most.fds <= before.fds + sorts().map(Sort::most_fds).sum::<usize>() + MORE_FDS,
            "too many descriptors"
        );
        let bytes = sorts().enumerate().map(|(index, sort)| sort.most_bytes(index)).sum::<usize>();
        assert!(most.peak_bytes <= before.peak_bytes + bytes + MORE_BYTES, "too much memory");

        // Each attacker has about as many turns as the connection that was measured, and gets a
        // frame or two in each.
        const FRAMES_OF_EACH: usize = 8;
        assert!(report.inner_trips > 0);
        assert!(
            report.most_fds_in_a_trip <= FRAMES_OF_EACH * 253 * attackers,
            "no fair share of turns"
        );

        // The attack took place: all attackers connected, or the resources were used up.
        let connected = if self.are_refused { report.refused } else { report.accepted };
        match self.resources {
            Resources::All => assert!(connected >= attackers, "not all attackers have connected"),
            Resources::Few { .. } => {
                assert!(!report.can_start_threads, "the victim could still start threads");
                assert!(
                    sort != Sort::Silent || report.not_accepted > 0,
                    "there were enough descriptors for all connections"
                );
            }
            Resources::FewForEachUid { .. } => {
                assert_eq!(report.not_accepted, 0, "one uid has taken all descriptors")
            }
        }
    }
}

/// The resources of a process.
#[derive(Debug, Clone, Copy)]
struct Usage {
    threads: usize,
    fds: usize,
    peak_bytes: usize,
}

impl Usage {
    fn of(process: &Process) -> Self {
        Self { threads: process.threads(), fds: process.fds(), peak_bytes: process.peak_bytes() }
    }

    fn max(self, other: Self) -> Self {
        Self {
            threads: self.threads.max(other.threads),
            fds: self.fds.max(other.fds),
            peak_bytes: self.peak_bytes.max(other.peak_bytes),
        }
    }
}

/// Returns the number of attackers whose descriptors fit into one process.
fn most_attackers(sort: Sort) -> usize {
    const OTHERS: usize = 100;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    (hard as usize).saturating_sub(OTHERS) / sort.most_fds()
}

/// A client that sends small frames and gets each back.
struct Honest {
    framed: Framed<FrameCodec>,
    trips: usize,
}

impl Honest {
    async fn connect(name: &str, kind: SocketKind) -> Self {
        let socket =
            soon("a connection", Socket::connect_addr(&addr_of(name), kind)).await.unwrap();
        Self { framed: Framed::new(socket, FrameCodec::default()), trips: 0 }
    }

    async fn trips(&mut self, count: usize) {
        for _ in 0..count {
            self.trips += 1;
            let sent = self.trips.to_string();
            let trip = async {
                self.framed.send(Frame::new(sent.clone())).await.unwrap();
                self.framed.try_next().await.unwrap().unwrap()
            };
            assert_eq!(soon("the echo of an honest client", trip).await.payload, sent);
        }
    }
}
