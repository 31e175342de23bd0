//! Processes in other PID, mount and network namespaces, which share only a directory, and
//! processes that start at the same time.

use std::{path::Path, process::Command};

use fdwire::takeover::{self, Options};

use crate::{
    common::*,
    control_path,
    process::{Process, free_address, keep_open, who_serves},
};

/// Returns a command that runs this binary in namespaces of its own, in which `directory` is at
/// `place`. Its process id is 1, and it has no network except the sockets that it gets.
fn elsewhere(directory: &Path, place: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--pid",
        "--fork",
        "--kill-child",
        "--mount",
        "--net",
        "--ipc",
        "--uts",
        "--cgroup",
        "--",
        "sh",
        "-c",
    ]);
    command.arg("mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"").args([
        "sh".as_ref(),
        directory,
        place,
    ]);
    command.arg(std::env::current_exe().unwrap());
    command
}

/// Returns true if namespaces can be made. That needs root, and may be forbidden in a container.
fn can_unshare() -> bool {
    let unshare =
        Command::new("unshare").args(["--pid", "--fork", "--mount", "--net", "true"]).output();
    let can = unshare.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("skipped: needs root to make namespaces");
    }
    can
}

#[test]
fn a_process_in_other_namespaces_takes_over_and_is_replaced() {
    if !can_unshare() {
        return;
    }
    let (directory, path) = control_path();
    let (bind, address) = (tempfile::tempdir().unwrap(), free_address());
    let other_path = bind.path().join(path.file_name().unwrap());
    let mut first = Process::serving(&path, address);
    let other =
        || Process::serving_by(elsewhere(directory.path(), bind.path()), &other_path, address);

    // The other process serves, and dies while the first one drains. That undoes the takeover.
    let open = keep_open(address);
    let second = other();
    assert_eq!(who_serves(address), Some(1), "the process id in its namespace");
    drop(second);
    assert_eq!(who_serves(address), Some(first.child.id()));

    // The next one takes over for good, and is replaced by a process outside.
    let mut second = other();
    drop(open);
    first.expect("left");
    let listed = one_thread().block_on(takeover::status(&path, &Options::default())).unwrap();
    assert_eq!(listed.pid, 1);
    let third = Process::serving(&path, address);
    second.expect("left");
    assert_eq!(who_serves(address), Some(third.child.id()));
    // The path is still there, although the process that left had it at another place.
    assert!(path.exists());
}

#[test]
fn old_generations_in_other_pid_namespaces_are_listed_without_an_id() {
    if !can_unshare() {
        return;
    }
    let (directory, path) = control_path();
    let (bind, address) = (tempfile::tempdir().unwrap(), free_address());
    let other_path = bind.path().join(path.file_name().unwrap());
    let _first = Process::serving(&path, address);
    let _open = keep_open(address);
    let second =
        Process::serving_by(elsewhere(directory.path(), bind.path()), &other_path, address);
    let _open = keep_open(address);
    // The second process lists the first without an id, because that has none in its namespace.
    let status = || one_thread().block_on(takeover::status(&path, &Options::default())).unwrap();
    let listed: Vec<_> = status().generations.iter().map(|old| old.pid).collect();
    assert_eq!(listed, [None]);
    // The third process, which is outside, lists both with their ids.
    let _third = Process::serving(&path, address);
    let listed: Vec<_> = status().generations.iter().map(|old| old.pid).collect();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(Option::is_some), "{listed:?}");
    drop(second);
}

/// Both processes find no server. One of them binds, and the other takes over from it.
#[test]
fn processes_that_start_at_the_same_time_serve_one_after_the_other() {
    let (_directory, path) = control_path();
    let address = free_address();
    let mut processes = [Process::start(&path, address), Process::start(&path, address)];
    processes.iter_mut().for_each(|process| {
        process.go();
        process.go(); // lets it serve as soon as it has the listeners
    });
    for process in &mut processes {
        for report in ["requested", "ready", "confirmed"] {
            process.expect(report);
        }
    }
    let serving = who_serves(address);
    let [a, b] = &mut processes;
    let (serving, replaced) = if serving == Some(a.child.id()) { (a, b) } else { (b, a) };
    replaced.expect("left");
    assert_eq!(who_serves(address), Some(serving.child.id()));
}
