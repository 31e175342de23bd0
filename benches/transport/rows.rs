//! The rows that are measured, and the contenders of each.

use fdwire::SocketKind::{self, SeqPacket, Stream};
use serde::{Deserialize, Serialize};

use crate::{
    acknowledged,
    contenders::{
        Anchovy, Bare, Fdwire, IpcChannel, IpcSharedMem, LengthDelimited, Link, Load, Setup, Side,
        TokioSeqpacket, TokioUnixIpc, UnixAncillary,
    },
    ends::{MakeEnd, client, echo, idle, receiver, sender},
    handoff::{InOneProcess, front, worker},
    haproxy, http,
    processes::Threads,
    reuse_port,
    tasks::{
        BareShared, FdwireChannel, FdwireMutex, FdwireSender, SeqpacketShared, Shared, senders,
    },
};

/// A row of the report: contenders that do the same work.
pub(crate) struct Row {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// The thing that is counted: a time is for one of these, and a rate is these a second.
    pub(crate) unit: &'static str,
    load: Load,
    /// The number of messages in a sample is a multiple of this.
    pub(crate) quantum: usize,
    pub(crate) threads: Threads,
    pub(crate) contenders: Vec<Contender>,
}

/// The part that a contender has in a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Fdwire,
    /// `sendmsg` and `recvmsg` on `AsyncFd`: the floor. It promises nothing.
    Bare,
    /// Bare calls with a receiver that acknowledges: the floor of a hand-off that loses nothing.
    Acknowledged,
    /// Another crate, used message by message.
    Peer,
    /// Another crate with code of its user that puts many messages into one call and takes them
    /// apart again.
    ByHand,
    /// The same work done without passing descriptors.
    Reference,
}

pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) kind: SocketKind,
    pub(crate) role: Role,
    /// Whether it is flushed after each batch. If not, it is flushed after each message.
    batched: bool,
    pub(crate) near: MakeEnd,
    pub(crate) far: MakeEnd,
}

impl Row {
    pub(crate) fn setup(&self, contender: &Contender, side: Side) -> Setup {
        let batch = if contender.batched { self.load.batch } else { 1 };
        Setup { kind: contender.kind, side, load: Load { batch, ..self.load } }
    }

    /// Whether its sockets have larger send buffers.
    pub(crate) fn is_bulk(&self) -> bool {
        self.load.bytes >= 4 << 10
    }
}

/// The work that the two ends of a [`Link`] do.
#[derive(Clone, Copy)]
enum Pattern {
    OneWay,
    RoundTrip,
    HandOff,
}

fn contender<L: Link>(pattern: Pattern, name: &str, kind: SocketKind, role: Role) -> Contender {
    let (near, far): (MakeEnd, MakeEnd) = match pattern {
        Pattern::OneWay => (sender::<L>, receiver::<L>),
        Pattern::RoundTrip => (client::<L>, echo::<L>),
        Pattern::HandOff => (front::<L>, worker::<L>),
    };
    Contender { name: name.to_owned(), kind, role, batched: role != Role::Peer, near, far }
}

/// fdwire and bare calls, on both kinds of socket.
fn ours(pattern: Pattern) -> Vec<Contender> {
    vec![
        contender::<Fdwire>(pattern, "fdwire SEQPACKET", SeqPacket, Role::Fdwire),
        contender::<Fdwire>(pattern, "fdwire STREAM", Stream, Role::Fdwire),
        contender::<Bare>(pattern, "bare SEQPACKET", SeqPacket, Role::Bare),
        contender::<Bare>(pattern, "bare STREAM", Stream, Role::Bare),
    ]
}

/// Peers that pass any descriptor, message by message.
fn peers(pattern: Pattern) -> Vec<Contender> {
    vec![
        contender::<TokioSeqpacket>(pattern, "tokio-seqpacket", SeqPacket, Role::Peer),
        contender::<UnixAncillary>(pattern, "unix-ancillary", Stream, Role::Peer),
        contender::<Anchovy>(pattern, "anchovy", Stream, Role::Peer),
        contender::<TokioUnixIpc>(pattern, "tokio-unix-ipc", Stream, Role::Peer),
    ]
}

/// The same peers with whole batches put into one call by hand.
fn by_hand(pattern: Pattern) -> Vec<Contender> {
    let by_hand = |peer: Contender| Contender {
        name: format!("{}, by hand", peer.name),
        role: Role::ByHand,
        batched: true,
        ..peer
    };
    peers(pattern).into_iter().map(by_hand).collect()
}

fn ipc_channel(pattern: Pattern) -> Contender {
    contender::<IpcChannel>(pattern, "ipc-channel", SeqPacket, Role::Peer)
}

/// tokio-util's codec puts messages together by itself, so it is flushed after each batch.
fn length_delimited(pattern: Pattern) -> Contender {
    let contender =
        contender::<LengthDelimited>(pattern, "LengthDelimitedCodec", Stream, Role::Peer);
    Contender { batched: true, ..contender }
}

fn one_way(id: &'static str, title: &'static str, load: Load) -> Row {
    let pattern = Pattern::OneWay;
    let mut contenders = ours(pattern);
    if !load.fd {
        contenders.push(length_delimited(pattern)); // it passes no descriptors
    }
    if load.batch > 1 {
        contenders.extend(by_hand(pattern));
    }
    contenders.extend(peers(pattern));
    contenders.push(ipc_channel(pattern));
    if load.bytes >= 64 << 10 {
        let name = "ipc-channel, shared memory";
        contenders.push(contender::<IpcSharedMem>(pattern, name, SeqPacket, Role::Peer));
    }
    Row {
        id,
        title,
        unit: "message",
        load,
        quantum: load.batch,
        threads: Threads::OneBound,
        contenders,
    }
}

fn round_trip(id: &'static str, title: &'static str, fd: bool) -> Row {
    let pattern = Pattern::RoundTrip;
    let mut contenders = ours(pattern);
    if !fd {
        contenders.push(length_delimited(pattern));
    }
    contenders.extend(peers(pattern));
    contenders.push(ipc_channel(pattern));
    let load = Load { bytes: 64, fd, batch: 1 };
    Row { id, title, unit: "round trip", load, quantum: 1, threads: Threads::OneBound, contenders }
}

fn shared<S: Shared, L: Link, const TASKS: usize>(
    name: &str,
    kind: SocketKind,
    role: Role,
) -> Contender {
    let (near, far): (MakeEnd, MakeEnd) = (senders::<S, TASKS>, receiver::<L>);
    Contender { name: name.to_owned(), kind, role, batched: false, near, far }
}

fn tasks<const TASKS: usize>(id: &'static str, title: &'static str) -> Row {
    let contenders = vec![
        shared::<FdwireSender, Fdwire, TASKS>("fdwire SEQPACKET, Sender", SeqPacket, Role::Fdwire),
        shared::<FdwireSender, Fdwire, TASKS>("fdwire STREAM, Sender", Stream, Role::Fdwire),
        shared::<FdwireMutex, Fdwire, TASKS>("fdwire SEQPACKET, mutex", SeqPacket, Role::Fdwire),
        shared::<FdwireMutex, Fdwire, TASKS>("fdwire STREAM, mutex", Stream, Role::Fdwire),
        shared::<FdwireChannel, Fdwire, TASKS>(
            "fdwire SEQPACKET, channel",
            SeqPacket,
            Role::Fdwire,
        ),
        shared::<FdwireChannel, Fdwire, TASKS>("fdwire STREAM, channel", Stream, Role::Fdwire),
        shared::<BareShared, Bare, TASKS>("bare SEQPACKET, shared", SeqPacket, Role::Bare),
        shared::<SeqpacketShared, TokioSeqpacket, TASKS>(
            "tokio-seqpacket, shared",
            SeqPacket,
            Role::Peer,
        ),
    ];
    let load = Load { bytes: 64, fd: false, batch: 1 };
    Row { id, title, unit: "message", load, quantum: TASKS, threads: Threads::OneBound, contenders }
}

fn hand_off(id: &'static str, title: &'static str) -> Row {
    let pattern = Pattern::HandOff;
    let here =
        contender::<InOneProcess>(pattern, "answered where accepted", SeqPacket, Role::Reference);
    // In one process, the far end has nothing to do.
    let mut contenders = vec![Contender { far: idle, ..here }];
    contenders.extend(ours(pattern));
    contenders.extend(peers(pattern));
    let load = Load { bytes: 16, fd: true, batch: 64 };
    Row { id, title, unit: "hand-off", load, quantum: 64, threads: Threads::OneBound, contenders }
}

/// The contender whose worker calls `next` in a spawned task, as README shows, and not in `main`.
pub(crate) const IN_TASKS: &str = "fdwire SEQPACKET, in tasks";

/// Compares a whole HTTP server in one process, in two, behind a process that hands connections
/// over, and behind haproxy. The client keeps `WINDOW` connections open.
fn http<const WINDOW: usize>(id: &'static str, title: &'static str, threads: Threads) -> Row {
    let contender = |name: &str, kind, role, near, far| Contender {
        name: name.to_owned(),
        kind,
        role,
        batched: false,
        near,
        far,
    };

    // The processes that accept.
    let layer: MakeEnd = http::dispatcher::<WINDOW>;
    let bare: MakeEnd = http::front::<Bare, WINDOW>;
    let haproxy: MakeEnd = match threads {
        Threads::Many => haproxy::front::<WINDOW, 2>,
        Threads::One | Threads::OneBound => haproxy::front::<WINDOW, 1>,
    };

    // Without a hand-off, with the hand-off layer, and with bare calls.
    let mut contenders = vec![
        contender("one process", SeqPacket, Role::Reference, http::one_process::<WINDOW>, idle),
        contender(
            "two processes, SO_REUSEPORT",
            Stream,
            Role::Reference,
            reuse_port::near::<WINDOW>,
            reuse_port::far,
        ),
        contender("fdwire SEQPACKET", SeqPacket, Role::Fdwire, layer, http::incoming::<1>),
        contender(
            "fdwire SEQPACKET, next_batch",
            SeqPacket,
            Role::Fdwire,
            layer,
            http::incoming::<64>,
        ),
        contender("fdwire STREAM", Stream, Role::Fdwire, layer, http::incoming::<1>),
        contender("bare SEQPACKET", SeqPacket, Role::Bare, bare, http::worker::<Bare>),
        contender("bare STREAM", Stream, Role::Bare, bare, http::worker::<Bare>),
    ];

    // Bare calls with an acknowledgement.
    for (name, kind) in
        [("bare SEQPACKET, acknowledged", SeqPacket), ("bare STREAM, acknowledged", Stream)]
    {
        let (front, worker): (MakeEnd, MakeEnd) =
            (acknowledged::front::<WINDOW>, http::acknowledging::<Bare>);
        contenders.push(contender(name, kind, Role::Acknowledged, front, worker));
    }

    // On a multi-thread runtime it matters whether a loop runs in `main` or in a task.
    if threads == Threads::Many {
        let (near, far): (MakeEnd, MakeEnd) =
            (reuse_port::near_in_task::<WINDOW>, reuse_port::far_in_task);
        contenders.push(contender(
            "two processes, SO_REUSEPORT, in tasks",
            Stream,
            Role::Reference,
            near,
            far,
        ));
        contenders.push(contender(
            IN_TASKS,
            SeqPacket,
            Role::Fdwire,
            layer,
            http::incoming_in_task,
        ));
    }

    // haproxy, which passes bytes on.
    if haproxy::is_installed() {
        contenders.push(contender("haproxy", SeqPacket, Role::Reference, haproxy, haproxy::server));
    }
    let load = Load { bytes: 1, fd: true, batch: 1 };
    Row { id, title, unit: "connection", load, quantum: WINDOW, threads, contenders }
}

pub(crate) fn all() -> Vec<Row> {
    let load = |bytes, fd, batch| Load { bytes, fd, batch };
    vec![
        one_way("64B-batched", "64 B one way, 64 fed and then flushed", load(64, false, 64)),
        one_way("64B-each", "64 B one way, message by message", load(64, false, 1)),
        one_way(
            "64B-fd-batched",
            "64 B + 1 descriptor one way, 64 fed and then flushed",
            load(64, true, 64),
        ),
        one_way(
            "64B-fd-each",
            "64 B + 1 descriptor one way, message by message",
            load(64, true, 1),
        ),
        round_trip("64B-round-trip", "64 B there and back", false),
        round_trip("64B-fd-round-trip", "64 B + 1 descriptor there and back", true),
        one_way("4KiB", "4 KiB one way, 8 fed and then flushed", load(4 << 10, false, 8)),
        one_way("64KiB", "64 KiB one way, message by message", load(64 << 10, false, 1)),
        one_way("1MiB", "1 MiB one way, message by message", load(1 << 20, false, 1)),
        one_way("16MiB", "16 MiB one way, message by message", load(16 << 20, false, 1)),
        tasks::<64>("64-tasks", "64 B from 64 tasks into one socket"),
        tasks::<1000>("1000-tasks", "64 B from 1,000 tasks into one socket"),
        hand_off("hand-off", "TCP connections accepted here, answered there"),
        http::<64>("http-busy", "HTTP: 64 clients, current-thread runtimes", Threads::One),
        http::<1>("http-idle", "HTTP: one client, current-thread runtimes", Threads::One),
        http::<64>("http-mt-busy", "HTTP: 64 clients, multi-thread runtimes", Threads::Many),
        http::<1>("http-mt-idle", "HTTP: one client, multi-thread runtimes", Threads::Many),
    ]
}
