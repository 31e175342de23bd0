//! Workers that run out of descriptors or of room in their event loop, beside others.

use std::{fs::File, path::Path, process::Stdio, time::Duration};

use fdwire::handoff::{Connection, Dispatcher, Incoming, WorkerCommand, WorkerId};
use futures::{StreamExt, stream};
use nix::sys::resource::{Resource, setrlimit};
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, process::Command, time::sleep};

use crate::{
    common::{KINDS, installed, run, skipped},
    end_to_end::started,
    raw_worker::connections,
};

const ROLE: &str = "shortage::greedy_process";

fn command() -> Command {
    with_role(Command::new("/proc/self/exe"))
}

/// Adds the role to a command that executes this binary with the arguments that it gets.
fn with_role(mut command: Command) -> Command {
    command.args([ROLE, "--exact", "--nocapture"]).env("FDWIRE_ROLE", ROLE);
    command.stdout(Stdio::null()).kill_on_drop(true);
    command
}

/// Is a worker like that of README, whose application opens files for each connection.
#[test]
fn greedy_process() {
    if std::env::var("FDWIRE_ROLE").as_deref() != Ok(ROLE) {
        return;
    }
    if let Some(limit) = std::env::var_os("FDWIRE_LIMIT") {
        let limit = limit.into_string().unwrap().parse().unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut incoming = Incoming::from_stdin().unwrap();
        let handle = incoming.handle();
        while let Some(connection) = incoming.next().await {
            tokio::spawn(greedy_application(connection));
        }
        handle.ended().await;
    });
    std::process::exit(0);
}

/// Answers with the process id. Needs many descriptors meanwhile.
async fn greedy_application(mut connection: Connection) {
    let _files = [(); 20].map(|()| File::open("/dev/null"));
    let mut serial = [0; 4];
    if connection.read_exact(&mut serial).await.is_ok() {
        sleep(Duration::from_millis(1)).await;
        let _ = connection.write_all(std::process::id().to_string().as_bytes()).await;
    }
}

/// Hands over `count` connections, `at_a_time` of them together. Returns the worker that has
/// adopted each, and the answer.
async fn serve(dispatcher: &Dispatcher, count: u32, at_a_time: usize) -> Vec<(WorkerId, String)> {
    let served = connections(count).await.into_iter().map(|(client, connection)| async move {
        let worker = dispatcher.dispatch(connection).await.unwrap();
        (worker, client.answer().await)
    });
    stream::iter(served).buffer_unordered(at_a_time).collect().await
}

/// When the workers asked for connections, they had descriptors for them. Offers for which there
/// are none later are rejected, and no connection is cut.
#[test]
fn workers_whose_application_uses_up_their_descriptors_lose_nothing() {
    for kind in KINDS {
        run(async {
            let dispatcher = Dispatcher::builder().build();
            for _ in 0..2 {
                let mut command = command();
                command.env("FDWIRE_LIMIT", "64");
                dispatcher.spawn_worker(WorkerCommand::from(command).socket_kind(kind)).unwrap();
            }
            started(&dispatcher, 2).await;
            for (_, answer) in serve(&dispatcher, 300, 100).await {
                assert!(!answer.is_empty(), "a client was cut off");
            }
            dispatcher.drain(None).await;
            let stats = dispatcher.stats();
            assert_eq!((stats.retired.drained, stats.lost), (2, 0));
        });
    }
}

/// The kernel fails each registration from the 20th on, as it does when `fs.epoll.max_user_watches`
/// is reached.
///
/// Rules: W-REGISTER.
#[test]
fn a_worker_whose_event_loop_is_full_leaves_connections_to_others() {
    let Some(strace) = installed("strace") else { return };
    if !may_trace(&strace) {
        return skipped("strace may not trace");
    }
    for kind in KINDS {
        run(async {
            let dispatcher = Dispatcher::builder().build();
            let mut traced = Command::new(&strace);
            traced.args([
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "--inject=epoll_ctl:error=ENOSPC:when=20+",
            ]);
            traced.arg(std::env::current_exe().unwrap());
            let full = WorkerCommand::from(with_role(traced)).socket_kind(kind);
            let full = dispatcher.spawn_worker(full).unwrap();
            dispatcher.spawn_worker(WorkerCommand::from(command()).socket_kind(kind)).unwrap();
            started(&dispatcher, 2).await;
            let served = serve(&dispatcher, 200, 10).await;
            for (worker, answer) in &served {
                assert!(!answer.is_empty(), "worker {worker} has destroyed a connection");
            }
            assert!(served.iter().filter(|(worker, _)| *worker == full).count() < 20);
        });
    }
}

fn may_trace(strace: &Path) -> bool {
    let probe =
        std::process::Command::new(strace).args(["-qq", "-o", "/dev/null", "true"]).status();
    probe.is_ok_and(|status| status.success())
}
