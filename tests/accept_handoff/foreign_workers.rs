//! Workers in Python and Node beside this crate's own.

use std::{
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;

use crate::{
    Front, KINDS, check_last_answers,
    common::{encoded, installed},
    demo,
};

const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/foreign_workers/worker.py");
/// The worker in Node, which takes sockets of kind STREAM only.
const NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/foreign_workers/worker.mjs");

/// Adds the arguments for a kind of socket, and for two workers in each other language that is
/// installed and supports that kind.
fn with_foreign_workers<'a>(kind: &'a str, first: &[&'a str]) -> Vec<&'a str> {
    let python = installed("python3").map(|_| PYTHON);
    let node = installed("node").filter(|_| kind == "stream").map(|_| NODE);
    let also = [python, node]
        .into_iter()
        .flatten()
        .flat_map(|program| ["--also", program, "--also", program]);
    first.iter().copied().chain(["--socket", kind]).chain(also).collect()
}

#[tokio::test]
async fn workers_in_other_languages_serve_and_drain_beside_ours() {
    for kind in KINDS {
        let arguments = with_foreign_workers(kind, &["--workers", "1"]);
        let front = Front::start(&arguments).await;
        let also = arguments.iter().filter(|argument| **argument == "--also").count();
        assert_eq!(front.every_worker_answers().await.len(), 1 + also, "{kind}");
        front.stop(Signal::SIGTERM).await;
        check_last_answers(Front::start(&arguments).await).await;
    }
}

#[tokio::test]
async fn nothing_is_lost_while_workers_in_other_languages_are_killed() {
    for kind in KINDS {
        let arguments = with_foreign_workers(
            kind,
            &["--demo", "3000", "--workers", "1", "--kill-every", "100"],
        );
        let (workers, summary) = demo(&arguments).await;
        assert_eq!(
            summary["answered"] + summary["cut while being served"],
            3000,
            "{kind}: {summary:?}"
        );
        assert!(summary["kills"] > 0 && summary["restarts"] > 0, "{kind}: {summary:?}");
        for none in ["failed", "lost before adoption", "given twice"] {
            assert_eq!(summary[none], 0, "{kind}: {none}");
        }
        assert!(workers.len() > 2, "{kind}: a row for ours, one for all, and others: {workers:?}");
    }
}

#[test]
fn a_worker_in_another_language_that_is_fenced_ends_in_order() {
    const WELCOME: [u8; 2] = [0x81, 1];
    const FENCED: [u8; 1] = [0x86];
    for (interpreter, program) in [("python3", PYTHON), ("node", NODE)] {
        if installed(interpreter).is_none() {
            continue;
        }
        let (mut dispatcher, socket) = UnixStream::pair().unwrap();
        let mut worker = Command::new(program);
        worker.stdin(OwnedFd::from(socket)).stderr(Stdio::piped());
        let worker = worker.spawn().unwrap();
        dispatcher.write_all(&[encoded(&WELCOME, 0), encoded(&FENCED, 0)].concat()).unwrap();
        let ended = worker.wait_with_output().unwrap();
        assert!(ended.status.success() && ended.stderr.is_empty(), "{program}: {ended:?}");
    }
}

#[test]
fn a_worker_in_another_language_names_what_is_wrong() {
    for (interpreter, program) in [("python3", PYTHON), ("node", NODE)] {
        if installed(interpreter).is_none() {
            continue;
        }
        let output = |arguments: &[&str]| {
            Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap()
        };
        assert!(output(&["--help"]).status.success(), "{program}");
        for (arguments, reason) in [(&["--nonsense"][..], "--nonsense"), (&[], "standard input")] {
            let ended = output(arguments);
            let stderr = String::from_utf8_lossy(&ended.stderr);
            assert!(!ended.status.success() && stderr.contains(reason), "{program}: {stderr}");
        }
    }
}
