//! Peers that do harm on purpose: they make a `close` slow, send descriptors that nobody claims,
//! and use up scarce resources.
//!
//! The tests count descriptors and threads of their process, so they run one at a time. None
//! measures time. If the library waits for a peer and must not, [`slow::Watchdog`] ends the waiting
//! and the test fails.

#[path = "../common/mod.rs"]
mod common;

mod closing;
mod crowd;
mod descriptors;
mod no_threads;
mod raw;
mod refused;
mod slow;
mod turns;
mod uid_limits;
mod waiting;
mod wakeups;

use std::{
    future::Future,
    io::{ErrorKind, Read},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Once,
    time::Duration,
};

use common::{KINDS, raw_send, run, with_raw_peer};
use fdwire::{Error, SocketKind};
use futures::StreamExt;

/// The time that a test waits for something that takes milliseconds, before it fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something that has to happen soon.
async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.unwrap_or_else(|_| panic!("still waiting: {what}"))
}

/// Waits until a condition holds.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    soon(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Runs a test on both kinds of socket, and counts the descriptors of this process around it.
fn counted(test: impl AsyncFn(SocketKind)) {
    static CLOSED_SOMETHING: Once = Once::new();
    // The threads that close for the library start with the first descriptors, and may keep some of
    // their own.
    CLOSED_SOMETHING.call_once(|| KINDS.map(close_something).into_iter().collect());
    common::counted(test);
    // This thread panics if it runs foreign code: without the descriptors of the process, a waker
    // fails there.
    nursery().expect("the thread that closes sockets has ended");
}

/// Finds the library's thread that has a descriptor table of its own, as a path in `/proc`.
fn nursery() -> Option<PathBuf> {
    let mut tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    tasks.find(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "fdwire-nursery\n")
    })
}

/// Lets the library close descriptors of several types, and waits until it has.
fn close_something(kind: SocketKind) {
    run(async {
        let (mut ours, socket) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (mut rx, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[socket.into(), writer.into()]);
        assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
        let (mut ours_too, unread) = UnixStream::pair().unwrap();
        raw_send(&peer, b"?", &[unread.into()]);
        drop(rx);
        for end in [&mut ours as &mut dyn Read, &mut ours_too, &mut reader] {
            match end.read(&mut [0]) {
                Ok(read) => assert_eq!(read, 0),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
        }
    });
}

/// Returns the number of threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// The number of threads that the library may have, besides those of the test.
const FEW_THREADS: usize = 12;
