//! SIGKILL at each system call of a takeover.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    common::*,
    control_path,
    process::{Process, free_address, keep_open, who_serves},
};

/// Attaches strace to all threads of a process.
fn trace(strace: &Path, process: &Process, arguments: &[&str]) -> Child {
    let mut tracer = Command::new(strace)
        .args(["-f", "-p", &process.child.id().to_string()])
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(tracer.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("attached"), "{line}");
    tracer
}

/// Lets a new process take over from an old one while one of them is traced, and checks that one
/// serves in the end. Returns true if the traced one was killed. A client whose connection is open
/// keeps the old one from leaving before the takeover is complete.
fn take_over(strace: &Path, traces_old: bool, arguments: &[&str]) -> bool {
    // The new process takes each step until it serves, or is killed.
    let (_directory, path) = control_path();
    let address = free_address();
    let mut old = Process::serving(&path, address);
    let open = keep_open(address);
    let mut new = Process::start(&path, address);
    let mut tracer = trace(strace, if traces_old { &old } else { &new }, arguments);
    let mut was_killed = false;
    for report in ["requested", "ready", "confirmed"] {
        new.go();
        let found = new.report();
        if found != report {
            assert!(!traces_old && found.is_empty(), "{found:?}, expected {report}");
            was_killed = true;
            break;
        }
    }
    // The old process leaves when its last client has gone. Its last calls are traced too.
    if traces_old {
        drop(open);
        let status = old.child.wait().unwrap();
        was_killed = status.signal().is_some();
        assert!(was_killed || status.success(), "{status}");
    }
    check_one_serves(address, &[&old, &new]);
    drop((old, new));
    tracer.wait().unwrap();
    was_killed
}

/// Kills one side at each of its system calls, in one takeover for each. strace counts each kind of
/// call, and each thread, separately.
fn kill_at_each_call(kills_old: bool) {
    let Some(strace) = attachable_strace() else { return };
    // A takeover without a kill shows which kinds of system calls are made.
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    assert!(!take_over(&strace, kills_old, &["-o", log.to_str().unwrap()]));
    let log = std::fs::read_to_string(log).unwrap();
    let name =
        |line: &str| Some(line.split_once(' ')?.1.trim_start().split_once('(')?.0.to_owned());
    let is_name =
        |name: &String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let names: BTreeSet<_> = log.lines().filter_map(name).filter(is_name).collect();

    // The process is killed at the first call of each kind, at the second, and so on to the last.
    let mut kills = 0;
    for name in &names {
        for call in 1.. {
            let inject = format!("--inject={name}:signal=SIGKILL:when={call}");
            if !take_over(&strace, kills_old, &["-o", "/dev/null", &inject]) {
                break;
            }
            kills += 1;
        }
    }
    let side = if kills_old { "old" } else { "new" };
    println!(
        "SIGKILL of the {side} process at {kills} of {kills} system calls of {} kinds: one serves",
        names.len()
    );
    assert!(kills > 30, "it was not killed in the takeover");
}

/// Checks that one of the processes that are alive answers.
fn check_one_serves(address: SocketAddr, processes: &[&Process]) {
    let begin = Instant::now();
    loop {
        let answer = who_serves(address);
        let is_alive = |process: &&&Process| !is_dead(process);
        if processes.iter().filter(is_alive).any(|process| answer == Some(process.child.id())) {
            return;
        }
        // A process may be killed while it answers, so clients try again.
        assert!(begin.elapsed() < Duration::from_secs(20), "nobody serves: {answer:?}");
    }
}

fn is_dead(process: &Process) -> bool {
    let status =
        std::fs::read_to_string(format!("/proc/{}/stat", process.child.id())).unwrap_or_default();
    status.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
}

#[test]
fn a_new_process_that_is_killed_at_any_system_call_leaves_one_that_serves() {
    kill_at_each_call(false);
}

#[test]
fn an_old_process_that_is_killed_at_any_system_call_leaves_one_that_serves() {
    kill_at_each_call(true);
}
