//! Frames over real sockets of both kinds. Each test ends with as many open descriptors as it began with, so the tests
//! of this binary run one at a time.

#[path = "../common/mod.rs"]
mod common;

mod cancellation;
mod delivery;
mod ends;
mod faults;
mod limits;
mod sender;
mod sender_ends;

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use fdwire::SocketKind;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;

/// Runs a test on both kinds of socket and counts the process's descriptors around it.
fn counted(test: impl AsyncFn(SocketKind)) {
    counted_in(common::one_thread, test);
}

/// The same in another runtime.
fn counted_in(runtime: fn() -> Runtime, test: impl AsyncFn(SocketKind)) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    common::run(async {}); // tokio opens two descriptors for signals once and for all
    for kind in common::KINDS {
        let before = open_fds();
        common::run_in(runtime(), test(kind));
        let begin = Instant::now();
        while open_fds() != before && begin.elapsed() < Duration::from_secs(10) {
            std::thread::yield_now(); // unwanted ones are closed on a thread of their own
        }
        assert_eq!(open_fds(), before, "descriptors leaked on {kind:?}");
    }
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
