//! Messages one way and there and back, through fdwire, tokio-seqpacket, and bare `sendmsg`/`recvmsg`.
//!
//! ```text
//! cargo bench --bench transport                     # everything, in about three minutes
//! cargo bench --bench transport -- one_core/64B     # some of it
//! ```
//!
//! Rows of one group do the same work, under the same conditions:
//!
//! - The two ends live on two threads, each with a runtime of its own, as they would in two processes. Time ends when
//!   the receiver has everything, or the client the last answer.
//! - With `one_core` the threads share a core, which is never idle: the work that a message takes, and repeatable.
//!   With `two_cores` the scheduler places them, and what counts where one thread waits for the other is the time that
//!   the machine takes to wake an idle core: 5 us or 50, and another number in the next run.
//! - `each` sends message by message, `batched` 64 messages at a time.
//! - A message with a descriptor starts with an `OwnedFd` of its own, which is closed after it was sent. The receiver
//!   closes what it gets; in a round trip it sends it back.
//! - Send buffers have the system's default size, but 4 MiB where messages are 1 MiB, since a contender that sends a
//!   message as one packet needs room for it. Rows of packets that do not fit are left out, where
//!   `net.core.wmem_max` is low and we are not root.
//!
//! The time given is for one message (`each`, round trips) or one batch; compare the rates in messages.
#![allow(missing_docs, reason = "criterion's macros")]

mod links;

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use fdwire::SocketKind::{self, SeqPacket, Stream};
use links::{Bare, Fdwire, Link, TokioSeqpacket};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socketpair, sockopt},
    },
    unistd::Pid,
};

/// Messages between two flushes of a `batched` row.
const BATCH: usize = 64;

/// What a message is.
#[derive(Clone, Copy)]
struct Load {
    bytes: usize,
    fd: bool,
}

impl Load {
    const ALL: [Self; 6] = [
        Self { bytes: 64, fd: false },
        Self { bytes: 64, fd: true },
        Self { bytes: 4 << 10, fd: false },
        Self { bytes: 4 << 10, fd: true },
        Self { bytes: 1 << 20, fd: false },
        Self { bytes: 1 << 20, fd: true },
    ];

    fn name(self) -> String {
        let size = match self.bytes {
            bytes if bytes >= 1 << 20 => format!("{}MiB", bytes >> 20),
            bytes if bytes >= 1 << 10 => format!("{}KiB", bytes >> 10),
            bytes => format!("{bytes}B"),
        };
        size + if self.fd { "+fd" } else { "" }
    }

    fn messages(self) -> Messages {
        Messages {
            payload: vec![7; self.bytes].into(),
            fd: self.fd.then(|| File::open("/dev/null").expect("/dev/null is there").into()),
        }
    }

    /// The two ends of a connection. `None` if it would not take such messages in one packet each.
    fn pair(self, kind: SocketKind) -> Option<(OwnedFd, OwnedFd)> {
        let ty = if kind == Stream { SockType::Stream } else { SockType::SeqPacket };
        let (a, b) = socketpair(AddressFamily::Unix, ty, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
            .expect("a socket pair");
        if self.bytes >= 1 << 20 {
            for end in [&a, &b] {
                let size = 2 << 20; // the kernel doubles it
                setsockopt(end, sockopt::SndBufForce, &size)
                    .or_else(|_| setsockopt(end, sockopt::SndBuf, &size))
                    .expect("SO_SNDBUF can be set");
            }
        }
        let room = getsockopt(&a, sockopt::SndBuf).expect("SO_SNDBUF can be read");
        (kind == Stream || self.bytes + 32 <= room).then_some((a, b))
    }
}

/// Makes the messages of a [`Load`].
struct Messages {
    payload: Bytes,
    fd: Option<OwnedFd>,
}

impl Messages {
    fn fd(&self) -> Option<OwnedFd> {
        self.fd.as_ref().map(|fd| fd.as_fd().try_clone_to_owned().expect("a descriptor is free"))
    }
}

/// Time from the first of `batches` batches until the receiver has all.
fn one_way<L: Link>(ends: (OwnedFd, OwnedFd), load: Load, cores: Cores, batch: usize, batches: u64) -> Duration {
    let total = usize::try_from(batches).expect("fits") * batch;
    let start = &Barrier::new(2);
    on_two_threads(
        cores,
        async move || {
            let (mut link, messages) = (L::new(ends.0, 0), load.messages());
            start.wait();
            for _ in 0..batches {
                for _ in 0..batch {
                    link.send(&messages.payload, messages.fd()).await;
                }
                link.flush().await;
            }
        },
        async move || {
            let mut link = L::new(ends.1, load.bytes * batch);
            let (mut fds, mut fd_count, mut bytes) = (Vec::new(), 0, 0);
            start.wait();
            let start = Instant::now();
            while bytes < total * load.bytes {
                bytes += link.recv(&mut fds).await;
                fd_count += fds.len();
                fds.clear();
            }
            let elapsed = start.elapsed();
            assert_eq!((bytes, fd_count), (total * load.bytes, if load.fd { total } else { 0 }));
            elapsed
        },
    )
}

/// Time of `trips` messages, each answered by one of the same size that brings the descriptor back.
fn round_trip<L: Link>(ends: (OwnedFd, OwnedFd), load: Load, cores: Cores, trips: u64) -> Duration {
    let start = &Barrier::new(2);
    on_two_threads(
        cores,
        async move || {
            let (mut link, payload, mut fds) = (L::new(ends.0, load.bytes), load.messages().payload, Vec::new());
            start.wait();
            for _ in 0..trips {
                link.recv(&mut fds).await;
                link.send(&payload, fds.pop()).await;
                link.flush().await;
            }
        },
        async move || {
            let (mut link, messages, mut fds) = (L::new(ends.1, load.bytes), load.messages(), Vec::new());
            start.wait();
            let start = Instant::now();
            for _ in 0..trips {
                link.send(&messages.payload, messages.fd()).await;
                link.flush().await;
                let received = link.recv(&mut fds).await;
                assert_eq!((received, fds.pop().is_some()), (load.bytes, load.fd));
            }
            start.elapsed()
        },
    )
}

/// Where the two threads run.
#[derive(Clone, Copy)]
enum Cores {
    One,
    Two,
}

impl Cores {
    const ALL: [(Self, &str); 2] = [(Self::One, "one_core"), (Self::Two, "two_cores")];

    fn use_them(self) {
        if let Self::Two = self {
            return; // the scheduler's choice
        }
        let this_thread = Pid::from_raw(0);
        let allowed = sched_getaffinity(this_thread).expect("the cores can be listed");
        let mut one = CpuSet::new();
        let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu) == Ok(true)).expect("a core");
        one.set(first).expect("it is in range");
        sched_setaffinity(this_thread, &one).expect("a core can be chosen");
    }
}

/// Runs each end on a thread of its own, and returns what the second one returns.
fn on_two_threads<T: Send>(cores: Cores, one: impl AsyncFnOnce() + Send, other: impl AsyncFnOnce() -> T + Send) -> T {
    let runtime = || {
        cores.use_them();
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    };
    thread::scope(|scope| {
        scope.spawn(|| runtime().block_on(one()));
        scope.spawn(|| runtime().block_on(other())).join().expect("no panic")
    })
}

/// Adds a row to a group, unless its packets would not fit into the send buffer.
fn row(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    kind: SocketKind,
    load: Load,
    run: impl Fn((OwnedFd, OwnedFd), u64) -> Duration,
) {
    if load.pair(kind).is_none() {
        return eprintln!("{name} is left out: its packets do not fit into the send buffer");
    }
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|times| run(load.pair(kind).expect("tried before"), times));
    });
}

type OneWay = fn((OwnedFd, OwnedFd), Load, Cores, usize, u64) -> Duration;
type RoundTrip = fn((OwnedFd, OwnedFd), Load, Cores, u64) -> Duration;

fn all(criterion: &mut Criterion) {
    allow_many_fds();
    let loads_on_cores = || Load::ALL.into_iter().flat_map(|load| Cores::ALL.map(|cores| (load, cores)));
    for (load, (cores, cores_name)) in loads_on_cores() {
        let mut group = criterion.benchmark_group(format!("one_way/{cores_name}/{}", load.name()));
        group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements(1));
        let each = |run: OneWay| move |ends, times| run(ends, load, cores, 1, times);
        row(&mut group, "tokio_seqpacket/each", SeqPacket, load, each(one_way::<TokioSeqpacket>));
        row(&mut group, "bare/each", SeqPacket, load, each(one_way::<Bare>));
        row(&mut group, "fdwire_seqpacket/each", SeqPacket, load, each(one_way::<Fdwire>));
        row(&mut group, "fdwire_stream/each", Stream, load, each(one_way::<Fdwire>));

        group.throughput(Throughput::Elements(BATCH as u64));
        let batched = |run: OneWay| move |ends, times| run(ends, load, cores, BATCH, times);
        if load.bytes < 1 << 20 {
            row(&mut group, "fdwire_seqpacket/batched", SeqPacket, load, batched(one_way::<Fdwire>));
            row(&mut group, "fdwire_stream/batched", Stream, load, batched(one_way::<Fdwire>));
        }
        if load.bytes * BATCH <= 64 << 10 {
            row(&mut group, "bare/batched", SeqPacket, load, batched(one_way::<Bare>));
        }
    }
    for (load, (cores, cores_name)) in loads_on_cores() {
        let mut group = criterion.benchmark_group(format!("round_trip/{cores_name}/{}", load.name()));
        group.sampling_mode(SamplingMode::Flat);
        let on_cores = |run: RoundTrip| move |ends, times| run(ends, load, cores, times);
        row(&mut group, "tokio_seqpacket", SeqPacket, load, on_cores(round_trip::<TokioSeqpacket>));
        row(&mut group, "bare", SeqPacket, load, on_cores(round_trip::<Bare>));
        row(&mut group, "fdwire_seqpacket", SeqPacket, load, on_cores(round_trip::<Fdwire>));
        row(&mut group, "fdwire_stream", Stream, load, on_cores(round_trip::<Fdwire>));
    }
}

/// Descriptors under way count against the sender's `RLIMIT_NOFILE`, unless it is root.
fn allow_many_fds() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("RLIMIT_NOFILE can be read");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("RLIMIT_NOFILE can be raised to the hard limit");
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .nresamples(2000);
    targets = all
}
criterion_main!(benches);
