//! A hundred hostile connections of each sort, beside an honest one.
//!
//! A process of its own, the victim, serves all of them on one thread. Another one has the attackers. The test has the
//! honest client, and looks from outside how many threads and descriptors and how much memory the victim has.

mod attackers;
mod process;
mod sorts;
mod victim;

use std::{
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    common::{other_uid, skipped},
    counted, soon, until,
};
use process::{Identity, Process, Role};
use sorts::Sort;
use victim::Report;

fn kind_of(is_stream: bool) -> SocketKind {
    if is_stream { SocketKind::Stream } else { SocketKind::SeqPacket }
}

fn addr_of(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(name).unwrap()
}

/// A number of hostile connections at a time.
const ATTACKERS: usize = 100;

/// Round trips of the honest client during an attack.
const TRIPS: usize = 100;

/// Threads that the library may start beside those that it has: one that exits, and four for slow files.
const MORE_THREADS: usize = 5;

/// Descriptors that the library and the runtime may open for a moment.
const MORE_FDS: usize = 20;

/// Memory that a process may take whatever its connections do.
const MORE_BYTES: usize = 16 << 20;

struct Attack {
    sort: Sort,
    victim: Identity,
    attackers: Identity,
    admits_any_uid: bool,
    limits: Option<ProcessLimits>,
}

/// What a victim has too little of.
struct ProcessLimits {
    fds: u64,
    threads: u64,
}

/// A client that sends small frames and gets each back.
struct Honest {
    framed: Framed<FrameCodec>,
    trips: usize,
}

impl Honest {
    async fn connect(name: &str, kind: SocketKind) -> Self {
        let connected = Socket::connect_addr(&addr_of(name), kind).await.unwrap();
        Self { framed: Framed::new(connected, FrameCodec::default()), trips: 0 }
    }

    async fn trip(&mut self) {
        self.trips += 1;
        let sent = self.trips.to_string();
        let trip = async {
            self.framed.send(Frame::new(sent.clone())).await.unwrap();
            self.framed.try_next().await.unwrap().unwrap()
        };
        assert_eq!(soon("the echo for the honest client", trip).await.payload, sent);
    }

    async fn trips(&mut self, count: usize) {
        for _ in 0..count {
            self.trip().await;
        }
    }
}

impl Attack {
    fn new(sort: Sort) -> Self {
        let (victim, attackers) = (Identity::Own, Identity::Own);
        Self { sort, victim, attackers, admits_any_uid: true, limits: None }
    }

    fn by(self, identity: Identity) -> Self {
        Self { victim: identity, attackers: identity, ..self }
    }

    /// Lets the attack happen, and checks that the victim gets over it.
    async fn withstand(&self, kind: SocketKind) {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("fdwire-crowd-{}-{number}", std::process::id());
        let is_stream = kind == SocketKind::Stream;

        let role = Role::Victim(victim::Settings {
            name: name.clone(),
            is_stream,
            admits_any_uid: self.admits_any_uid,
            max_fds: self.limits.as_ref().map(|limits| limits.fds),
            max_threads: self.limits.as_ref().map(|limits| limits.threads),
        });
        let mut victim = Process::start(self.victim, &role).await;
        victim.hear::<Report>().await;
        let mut honest = Honest::connect(&name, kind).await;
        honest.trips(10).await;
        let (threads, fds, memory) = (victim.threads(), victim.fds(), victim.peak_memory());

        let attackers = ATTACKERS.min(self.most_attackers());
        let begin = std::time::Instant::now();
        let role = Role::Attackers(attackers::Settings { sort: self.sort, attackers, name: name.clone(), is_stream });
        let mut crowd = Process::start(self.attackers, &role).await;
        tokio::join!(crowd.hear::<()>(), honest.trips(TRIPS));
        let started = begin.elapsed();
        let (mut most_threads, mut most_fds) = (0, 0);
        for trip in 0..TRIPS {
            honest.trip().await;
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            if trip % 10 == 9 {
                most_threads = most_threads.max(victim.threads());
                if victim.threads() > 5 { eprintln!("{}", victim.names()); }
                most_fds = most_fds.max(victim.fds());
            }
        }
        let report: Report = victim.ask().await;
        let tripped = begin.elapsed();
        drop(crowd);

        until("everything of the attackers is closed", || victim.fds() == fds && victim.threads() <= threads).await;
        let ended = begin.elapsed();
        let mut late = Honest::connect(&name, kind).await;
        late.trips(10).await;
        honest.trips(10).await;

        eprintln!(
            "{:?} {kind:?} threads {threads} {most_threads} fds {fds} {most_fds} of {} mem {} of {} {report:?} {started:?} {tripped:?} {ended:?}",
            self.sort,
            self.most_fds(attackers),
            (victim.peak_memory() - memory) >> 10,
            self.most_bytes(attackers) >> 10,
        );
        assert!(most_threads <= threads + MORE_THREADS, "{most_threads} threads, {threads} before");
        let bound = fds + self.most_fds(attackers);
        assert!(most_fds <= bound, "{most_fds} descriptors, {fds} before");
        let more_memory = victim.peak_memory() - memory;
        assert!(more_memory <= self.most_bytes(attackers), "{more_memory} bytes more");
        assert!(report.inner_trips > 0);
        let most_fds_in_a_trip = 8 * 253 * attackers;
        assert!(report.most_fds_in_a_trip <= most_fds_in_a_trip, "{report:?}");
        assert!(report.accepted >= attackers || self.limits.is_some(), "{report:?}");
    }

    /// Attackers whose descriptors all fit into the victim.
    fn most_attackers(&self) -> usize {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        (hard as usize).saturating_sub(100) / self.sort.most_fds()
    }

    /// Most descriptors more than before.
    fn most_fds(&self, attackers: usize) -> usize {
        let each = (0..attackers).map(|index| self.sort.of_attacker(index).most_fds());
        each.sum::<usize>() + MORE_FDS
    }

    /// Most bytes of memory more than before.
    fn most_bytes(&self, attackers: usize) -> usize {
        let each = (0..attackers).map(|index| self.sort.of_attacker(index).most_bytes(index));
        each.sum::<usize>() + MORE_BYTES
    }
}

/// Root may have more descriptors than a process usually gets.
fn raise_hard_limit() {
    const MANY: u64 = 1 << 18;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if nix::unistd::geteuid().is_root() && hard < MANY {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, MANY, MANY);
    }
}

#[test]
fn x() {
    raise_hard_limit();
    counted(async |kind| {
        for sort in Sort::SIMPLE.into_iter().skip(std::env::var("SKIP").map_or(0, |s| s.parse().unwrap())) {
            Attack::new(sort).withstand(kind).await;
        }
    });
}
