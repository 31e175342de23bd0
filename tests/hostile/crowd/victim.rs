//! The process under attack: it accepts all connections and echoes frames, on one thread.

use std::{
    os::unix::net::UnixStream as StdUnixStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use fdwire::{Frame, FrameCodec, Framed, Limits, Listener, Socket, socket::UidLimits};
use futures::{SinkExt, TryStreamExt};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::{addr_of, kind_of};
use crate::common::one_thread;

#[derive(Serialize, Deserialize)]
pub(super) struct Settings {
    /// The abstract name at which it listens.
    pub(super) name: String,
    pub(super) is_stream: bool,
    pub(super) admits_any_uid: bool,
    /// Whether the default limits of a uid apply. If not, there is no limit.
    pub(super) limits_uids: bool,
    /// The soft limit of `RLIMIT_NOFILE`, or `None` for the hard limit.
    pub(super) max_fds: Option<usize>,
    /// The soft limit of `RLIMIT_NPROC` from the moment at which it listens.
    pub(super) max_threads: Option<usize>,
}

/// The limit of descriptors of a connection that no message has claimed.
pub(super) const MAX_QUEUED_FDS: usize = 32;

/// The limits of each connection.
fn limits() -> Limits {
    Limits::default().max_queued_fds(MAX_QUEUED_FDS).max_unfinished_time(Duration::from_millis(50))
}

/// Makes the listener with its limits.
fn listen(settings: &Settings) -> Listener {
    let mut listener =
        Listener::bind_addr(&addr_of(&settings.name), kind_of(settings.is_stream)).unwrap();
    if !settings.limits_uids {
        const ALL: usize = usize::MAX;
        listener = listener
            .limit_each_uid(UidLimits::default().max_connections(ALL).max_bytes(ALL).max_fds(ALL));
    }
    if settings.admits_any_uid { listener.allow_any_uid() } else { listener }
}

/// The numbers that the victim reports.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) accepted: usize,
    /// Calls of `accept` that failed.
    pub(super) not_accepted: usize,
    pub(super) refused: usize,
    /// Whether a thread could be started for this report.
    pub(super) can_start_threads: bool,
    /// Frames that were received.
    pub(super) frames: usize,
    /// Round trips of a connection that has both ends in this process.
    pub(super) inner_trips: usize,
    /// The most descriptors of frames that were received during one of these round trips.
    pub(super) most_fds_in_a_trip: usize,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicUsize,
    not_accepted: AtomicUsize,
    frames: AtomicUsize,
    fds: AtomicUsize,
    inner_trips: AtomicUsize,
    most_fds_in_a_trip: AtomicUsize,
}

pub(super) fn run(control: StdUnixStream, settings: &Settings) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let soft = settings.max_fds.map_or(hard, |fds| fds as u64);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    one_thread().block_on(async {
        let counts = Arc::new(Counts::default());
        let listener = Arc::new(listen(settings));
        let (ours, echo_end) = Socket::pair(listener.kind()).unwrap();
        tokio::spawn(echo(echo_end, Arc::default()));
        tokio::spawn(measure_turns(ours, Arc::clone(&counts)));
        if let Some(threads) = settings.max_threads {
            let (_, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
            setrlimit(Resource::RLIMIT_NPROC, threads as u64, hard).unwrap();
        }
        tokio::spawn(accept_all(Arc::clone(&listener), Arc::clone(&counts)));
        report(control, &listener, &counts).await;
    });
}

/// Accepts and echoes, and goes on after an error, as a server does.
async fn accept_all(listener: Arc<Listener>, counts: Arc<Counts>) {
    loop {
        match listener.accept().await {
            Ok(socket) => {
                counts.accepted.fetch_add(1, Relaxed);
                tokio::spawn(echo(socket, Arc::clone(&counts)));
            }
            Err(_) => {
                counts.not_accepted.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// The payload of a frame whose descriptors are taken out of it and closed.
pub(super) const TAKE: &[u8] = b"take";

/// Sends frames back. It drops frames with several descriptors, like an application that has no use
/// for them.
async fn echo(socket: Socket, counts: Arc<Counts>) {
    let mut framed = Framed::new(socket, FrameCodec::new(limits()));
    while let Ok(Some(frame)) = framed.try_next().await {
        counts.frames.fetch_add(1, Relaxed);
        counts.fds.fetch_add(frame.fds.len(), Relaxed);
        if frame.payload == TAKE {
            frame.fds.into_iter().for_each(drop);
        } else if frame.fds.len() <= 1 && framed.send(frame).await.is_err() {
            break;
        }
    }
}

/// Makes round trips over a connection with both ends in this process, and counts the descriptors
/// that are received for other connections during each. No other process takes part, so the result
/// depends on turns and not on time.
async fn measure_turns(socket: Socket, counts: Arc<Counts>) {
    let mut framed = Framed::new(socket, FrameCodec::default());
    loop {
        let before = counts.fds.load(Relaxed);
        framed.send(Frame::new("turn")).await.unwrap();
        framed.try_next().await.unwrap().unwrap();
        let fds = counts.fds.load(Relaxed) - before;
        counts.inner_trips.fetch_add(1, Relaxed);
        counts.most_fds_in_a_trip.fetch_max(fds, Relaxed);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Reports at the start and at each request, until the test has ended.
async fn report(control: StdUnixStream, listener: &Listener, counts: &Counts) {
    control.set_nonblocking(true).unwrap();
    let mut control = BufReader::new(UnixStream::from_std(control).unwrap());
    loop {
        let report = Report {
            accepted: counts.accepted.load(Relaxed),
            not_accepted: counts.not_accepted.load(Relaxed),
            refused: listener.refused() as usize,
            can_start_threads: thread::Builder::new()
                .spawn(|| ())
                .is_ok_and(|thread| thread.join().is_ok()),
            frames: counts.frames.load(Relaxed),
            inner_trips: counts.inner_trips.load(Relaxed),
            most_fds_in_a_trip: counts.most_fds_in_a_trip.load(Relaxed),
        };
        let line = serde_json::to_string(&report).unwrap() + "\n";
        control.write_all(line.as_bytes()).await.unwrap();
        if control.read_line(&mut String::new()).await.unwrap() == 0 {
            return;
        }
    }
}
