//! Takeovers of processes that run out of descriptors (`RLIMIT_NOFILE`).

use std::{
    collections::BTreeSet,
    fs::DirEntry,
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::{
    control_path, is_locked,
    process::{Process, free_address, who_serves},
};

/// More descriptors than either side needs for a takeover of one listener.
const ENOUGH: u64 = 16;

/// Leaves a process room for this number of descriptors.
fn leave_room(process: &Process, room: u64) {
    let files = std::fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap();
    let number = |file: std::io::Result<DirEntry>| file.unwrap().file_name().into_string().unwrap();
    let open: BTreeSet<u64> = files.map(|file| number(file).parse().unwrap()).collect();
    let limit = (0..).filter(|number| !open.contains(number)).nth(room as usize);
    set_limit(process, limit);
}

fn set_limit(process: &Process, limit: Option<u64>) {
    let pid = Pid::from_child(&process.child);
    let maximum = getrlimit(Resource::Nofile).maximum; // the process has the same
    prlimit(Some(pid), Resource::Nofile, Rlimit { current: limit.or(maximum), maximum }).unwrap();
}

fn descriptors(process: &Process) -> u64 {
    std::fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap().count() as u64
}

/// Waits until a process has this number of descriptors. Some are closed in the background.
fn wait_for_descriptors(process: &Process, expected: u64) {
    let begin = Instant::now();
    while descriptors(process) != expected {
        assert!(begin.elapsed() < Duration::from_secs(20), "{} are open", descriptors(process));
        std::thread::yield_now();
    }
}

#[test]
fn a_server_without_descriptors_goes_on_and_loses_none() {
    // A server runs. Its number of descriptors is steady after a first attempt at a takeover.
    let (_directory, path) = control_path();
    let address = free_address();
    let mut old = Process::serving(&path, address);
    let start = || {
        let mut command = Command::new("/proc/self/exe");
        command.env("FDWIRE_ANSWER", "2000");
        let mut new = Process::start_by(command, &path, address);
        new.go();
        new
    };
    start().expect("requested");
    assert_eq!(who_serves(address), Some(old.child.id()));
    let mut before = descriptors(&old);
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = descriptors(&old);
        if now == before {
            break;
        }
        before = now;
    }

    // The server has room for no descriptor, for one, and so on, until a takeover succeeds.
    let mut failures = Vec::new();
    for room in 0..ENOUGH {
        leave_room(&old, room);
        let mut new = start();
        let report = new.report();
        if report == "requested" {
            // That room is enough for the later steps, too.
            new.go();
            new.expect("ready");
            new.expect("confirmed");
            set_limit(&old, None);
            old.expect("left");
            assert_eq!(who_serves(address), Some(new.child.id()));
            println!("room for {room} descriptors is enough; with less: {failures:?}");
            assert!(failures.iter().any(|failure: &String| failure.contains("Aborted(Failed)")));
            assert!(failures.iter().any(|failure: &String| failure.contains("TimedOut")));
            return;
        }
        // With less room, the takeover fails. The server goes on, and has the same number of
        // descriptors as before.
        failures.push(report);
        assert!(new.child.wait().unwrap().success());
        set_limit(&old, None);
        assert_eq!(who_serves(address), Some(old.child.id()));
        wait_for_descriptors(&old, before);
    }
    panic!("room for {ENOUGH} descriptors is not enough: {failures:?}");
}

#[test]
fn a_new_process_without_descriptors_gives_up_and_the_old_one_goes_on() {
    let (_directory, path) = control_path();
    let address = free_address();
    let old = Process::serving(&path, address);
    let mut failures = Vec::new();
    for room in 0..ENOUGH {
        let mut new = Process::start(&path, address);
        leave_room(&new, room);
        new.go();
        let report = new.report();
        assert_eq!(who_serves(address), Some(old.child.id()));
        if report == "requested" {
            println!("room for {room} descriptors is enough; with less: {failures:?}");
            assert!(room > 1);
            return;
        }
        let is_typed = ["Connection(TruncatedControl)", "Io(Os { code: 24"];
        assert!(is_typed.iter().any(|kind| report.contains(kind)), "{report:?}");
        failures.push(report);
        assert!(new.child.wait().unwrap().success());
    }
    panic!("room for {ENOUGH} descriptors is not enough: {failures:?}");
}

/// The two descriptors of COMMIT are lost if the new process has no room for them.
///
/// Rules: T-LOST.
#[test]
fn a_process_without_descriptors_at_the_cut_can_be_replaced_later() {
    let (_directory, path) = control_path();
    let address = free_address();
    let mut serving = Process::serving(&path, address);
    let mut lost = Vec::new();
    for room in 0..4 {
        // A new process is out of descriptors when it becomes ready.
        let mut new = Process::start(&path, address);
        new.go();
        new.expect("requested");
        leave_room(&new, room);
        new.go();
        new.expect("ready");
        // Either it has everything, or the lock was lost, and the old process has given it up.
        let confirmed = loop {
            let report = new.try_report();
            if report.is_some() || !is_locked(&path) {
                break report;
            }
        };
        if confirmed.is_none() {
            lost.push(room);
        }
        // The new process serves, and can be replaced in the next round.
        set_limit(&new, None);
        assert_eq!(confirmed.unwrap_or_else(|| new.report()), "confirmed");
        serving.expect("left");
        assert!(serving.child.wait().unwrap().success());
        serving = new;
        assert_eq!(who_serves(address), Some(serving.child.id()));
    }
    println!("COMMIT was lost with room for {lost:?} descriptors");
    assert!(lost.contains(&0));
}
