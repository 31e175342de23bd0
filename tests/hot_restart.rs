//! Runs the example `hot_restart` as its user would.
#![cfg(feature = "axum")]

mod common;

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Command, Output, Stdio},
};

use common::{demo, example};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

#[test]
fn twenty_restarts_under_load_fail_no_request() {
    let seen = demo("hot_restart", &[]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0, "{seen:?}");
    println!("{seen:?}");
}

#[test]
fn twenty_restarts_in_which_processes_are_killed_fail_no_request_that_is_repeated() {
    let seen = demo("hot_restart", &["--kill"]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0 && seen["kills"] > 0.0, "{seen:?}");
    println!("{seen:?}");
}

#[test]
fn workers_go_on_through_twenty_restarts_of_their_front() {
    let seen = demo("hot_restart", &["--front"]);
    assert_eq!((seen["failed"], seen["processes that answered"]), (0.0, 2.0), "{seen:?}");
    assert!(seen["answered"] > 1000.0, "{seen:?}");
    println!("{seen:?}");
}

/// A front may die after the new one is ready and before its workers have moved. Then the workers
/// end too, and the new front starts others.
#[test]
fn fronts_that_are_killed_while_they_are_replaced_fail_no_request_that_is_repeated() {
    let seen = demo("hot_restart", &["--front", "--kill"]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0 && seen["kills"] > 0.0, "{seen:?}");
    println!("{seen:?}");
}

/// The process id of a server that was started in the background. Dropping it kills the server.
struct Background(u32);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0 as i32), Signal::SIGKILL);
    }
}

/// Returns the command of the example, with these arguments.
fn background(path: &Path, listen: SocketAddr, arguments: &[&str]) -> Command {
    let mut command = example("hot_restart");
    command.arg("--path").arg(path).args(["--listen", &listen.to_string()]).args(arguments);
    command.stderr(Stdio::inherit()); // the server keeps standard error for its log
    command
}

/// Runs the example with these arguments to its end.
fn command(path: &Path, listen: SocketAddr, arguments: &[&str]) -> Output {
    background(path, listen, arguments).output().unwrap()
}

/// Returns the process id in a line such as "process 812 serves".
fn serves(output: &Output) -> Background {
    let stdout = str::from_utf8(&output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    let pid =
        stdout.lines().find_map(|line| line.strip_prefix("process ")?.strip_suffix(" serves"));
    Background(pid.expect(stdout).parse().unwrap())
}

#[test]
fn the_exit_code_of_wait_shows_whether_the_new_process_serves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("takeover");
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let first = serves(&command(&path, listen, &["--wait"]));
    let second = serves(&command(&path, listen, &["--wait"]));
    assert_ne!(first.0, second.0);
    // A process fails while it starts, because it cannot reach its service manager.
    let mut failing = background(&path, listen, &["--wait"]);
    assert_eq!(failing.env("NOTIFY_SOCKET", "nonsense").status().unwrap().code(), Some(1));
    let listed = command(&path, listen, &["--list"]);
    assert_eq!(std::mem::ManuallyDrop::new(serves(&listed)).0, second.0);
    // No server runs at the path, and none can be started or listed.
    let elsewhere = path.with_extension("elsewhere");
    assert_eq!(
        command(&elsewhere, "203.0.113.1:1".parse().unwrap(), &["--wait"]).status.code(),
        Some(1)
    );
    assert_eq!(command(&elsewhere, listen, &["--list"]).status.code(), Some(1));
}

#[test]
fn an_error_names_the_path_or_the_address() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("takeover");
    let missing = directory.path().join("missing/takeover");
    let file = directory.path().join("file");
    std::fs::write(&file, "not a socket").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let used = other.local_addr().unwrap();
    let foreign: SocketAddr = "203.0.113.1:1".parse().unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    for (path, listen, arguments, expected) in [
        (&path, used, &[][..], used.to_string()),
        (&path, foreign, &[], foreign.to_string()),
        (&missing, any, &[], missing.display().to_string()),
        (&file, any, &[], file.display().to_string()),
        (&path, any, &["--list"], path.display().to_string()),
        (&missing, any, &["--list"], missing.display().to_string()),
        (&path, any, &["--spread", "soon"], "soon".to_owned()),
        (&path, any, &["--nonsense"], "--nonsense".to_owned()),
        (&path, any, &["--kill"], "--demo".to_owned()),
    ] {
        let mut command = background(path, listen, arguments);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        let stderr = str::from_utf8(&output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(stderr.contains(&expected), "{expected} is not in {stderr}");
    }
}
