//! Replacements of the workers while wrk sends requests.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use fdwire::handoff::{Dispatcher, NotReplaced, WorkerCommand};
use futures::future::join;
use tokio::{
    net::TcpListener,
    process::{Child, Command},
};

use crate::{
    common::{installed, run_in, some_threads},
    end_to_end::{command, started},
    raw_worker::until,
};

/// The two kinds of clients: those that send each request on a new connection, and the others.
const ONE_SHOT: [bool; 2] = [false, true];

fn worker(log: &Path) -> WorkerCommand {
    let mut command = command(log);
    command.env("FDWIRE_HTTP", "1");
    WorkerCommand::from(command).restart(true)
}

/// Starts wrk, which sends requests for some seconds. The machine may be busy, so a slow answer is
/// not a failure.
fn wrk(program: &Path, address: SocketAddr, is_one_shot: bool) -> Child {
    let mut command = Command::new(program);
    command.args(["--threads", "1", "--connections", "16", "--duration", "8", "--timeout", "60"]);
    if is_one_shot {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{address}/"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap()
}

/// Waits for the end of wrk. Checks that no request has failed, and returns their number.
async fn all_answered(wrk: Child) -> u64 {
    let output = wrk.wait_with_output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for failure in ["Socket errors", "Non-2xx"] {
        assert!(!text.contains(failure), "{text}");
    }
    let line = text.lines().find(|line| line.contains("requests in")).expect(&text);
    println!("{}", line.trim());
    line.split_whitespace().next().unwrap().parse().expect(&text)
}

/// Runs a test with workers that are under load.
fn under_load(test: impl AsyncFn(&Dispatcher, &Path)) {
    let Some(program) = installed("wrk") else { return };
    for is_one_shot in ONE_SHOT {
        run_in(some_threads(), async {
            // Two workers serve.
            let directory = tempfile::tempdir().unwrap();
            let log = directory.path().join("log");
            let dispatcher = Dispatcher::builder().hello_timeout(Duration::from_secs(20)).build();
            for _ in 0..2 {
                dispatcher.spawn_worker(worker(&log)).unwrap();
            }
            started(&dispatcher, 2).await;
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            // The test runs between the first requests and the end of wrk. No request fails.
            let testing = async {
                let mut wrk = wrk(&program, address, is_one_shot);
                until("wrk sends requests", || dispatcher.stats().adopted >= 16).await;
                test(&dispatcher, &log).await;
                assert!(wrk.try_wait().unwrap().is_none(), "wrk has ended before the test");
                assert!(all_answered(wrk).await > 100);
                let stats = dispatcher.stats();
                assert_eq!((stats.lost, stats.given_back), (0, 0));
                dispatcher.drain(None).await;
            };
            join(testing, async { dispatcher.serve(listener).await.unwrap() }).await;
        });
    }
}

#[test]
fn no_request_fails_while_the_workers_are_replaced_again_and_again() {
    under_load(async |dispatcher, log| {
        for _ in 0..3 {
            let before = dispatcher.stats().adopted;
            let new = [worker(log), worker(log)];
            let replaced = dispatcher.replace_workers(new, None).await.unwrap();
            assert_eq!((replaced.old.len(), replaced.unfinished()), (2, 0));
            until("the new ones serve", || dispatcher.stats().adopted > before).await;
        }
    });
}

#[test]
fn no_request_fails_while_workers_of_a_broken_program_are_started() {
    under_load(async |dispatcher, log| {
        let pids = |dispatcher: &Dispatcher| {
            Vec::from_iter(dispatcher.stats().workers.iter().map(|worker| worker.pid))
        };
        let old = pids(dispatcher);
        for _ in 0..3 {
            for script in ["exit 1", "echo hello >&0; exec sleep 100", "kill -KILL $$"] {
                let mut broken = Command::new("sh");
                broken.args(["-c", script]).kill_on_drop(true);
                let new = [worker(log), broken.into()];
                let error = dispatcher.replace_workers(new, None).await.unwrap_err();
                assert!(matches!(error, NotReplaced::Failed(_)), "{error}");
            }
        }
        assert_eq!(pids(dispatcher), old);
    });
}
