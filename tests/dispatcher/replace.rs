//! Replacements of the workers of a group, and those that fail without the old workers noticing.

use std::{
    collections::BTreeSet,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use fdwire::{
    SocketKind,
    handoff::{Dispatcher, NotReplaced, RetireCause, WorkerCommand, WorkerId, WorkerState},
};
use futures::{FutureExt, future::join_all};
use nix::{
    libc::SIGKILL,
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    common::{KINDS, open_fds, run},
    descriptors::alone,
    end_to_end::{command, started},
    raw_worker::{Raw, connections, until},
};

fn worker(log: &Path) -> WorkerCommand {
    WorkerCommand::from(command(log)).restart(true)
}

/// Returns a dispatcher with a worker that is ready, and the path of the worker's log.
async fn one_worker() -> (TempDir, PathBuf, Dispatcher) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let dispatcher = Dispatcher::builder().build();
    dispatcher.spawn_worker(worker(&log)).unwrap();
    started(&dispatcher, 1).await;
    (directory, log, dispatcher)
}

/// Returns the command of a program that never sends a HELLO.
fn sleep() -> Command {
    let mut sleep = Command::new("sleep");
    sleep.arg("3600").kill_on_drop(true);
    sleep
}

fn ids(dispatcher: &Dispatcher) -> Vec<WorkerId> {
    dispatcher.stats().workers.iter().map(|worker| worker.id).collect()
}

fn pids(dispatcher: &Dispatcher) -> BTreeSet<u32> {
    dispatcher.stats().workers.iter().filter_map(|worker| worker.pid).collect()
}

fn lives(pid: u32) -> bool {
    kill(Pid::from_raw(pid as i32), None).is_ok()
}

/// Dispatches `count` new connections. Returns the process ids of the workers that have answered.
async fn answers(dispatcher: &Dispatcher, count: u32) -> BTreeSet<u32> {
    let answers = connections(count).await.into_iter().map(|(client, accepted)| async {
        dispatcher.dispatch(accepted).await.unwrap();
        client.answer().await.parse::<u32>().unwrap()
    });
    join_all(answers).await.into_iter().collect()
}

#[test]
fn new_workers_take_over_when_all_are_ready_and_the_old_ones_finish() {
    for kind in KINDS {
        run(async {
            // Two old workers serve.
            let directory = tempfile::tempdir().unwrap();
            let log = directory.path().join("log");
            let dispatcher = Dispatcher::builder().build();
            for _ in 0..2 {
                dispatcher.spawn_worker(worker(&log).socket_kind(kind)).unwrap();
            }
            started(&dispatcher, 2).await;
            let (old, old_pids) = (ids(&dispatcher), pids(&dispatcher));
            assert_eq!(answers(&dispatcher, 20).await, old_pids);

            // Three new ones replace them. The old ones drain.
            let new = (0..3).map(|_| worker(&log).socket_kind(kind));
            let replaced = dispatcher.replace_workers(new, None).await.unwrap();
            assert_eq!(replaced.new, ids(&dispatcher));
            let mut left = Vec::from_iter(replaced.old.iter().map(|worker| worker.id));
            left.sort();
            assert_eq!((left, replaced.unfinished()), (old, 0));
            for worker in &replaced.old {
                assert_eq!(worker.state, WorkerState::Gone);
                assert_eq!(worker.last_exit.as_ref().unwrap().cause, RetireCause::Drained);
            }
            // The new ones serve.
            started(&dispatcher, 3).await;
            assert_eq!(answers(&dispatcher, 30).await, pids(&dispatcher));
            until("the old processes have ended", || !old_pids.iter().any(|pid| lives(*pid))).await;
            assert_eq!(dispatcher.stats().lost, 0);
            dispatcher.drain(None).await;
        });
    }
}

/// One new worker is ready, and another never will be. So the old worker gets all connections.
#[test]
fn until_all_new_workers_are_ready_the_old_ones_get_everything() {
    run(async {
        // The replacement does not end, because one of its programs never sends a HELLO.
        let (_directory, log, dispatcher) = one_worker().await;
        let old = pids(&dispatcher);
        let sleep = sleep();
        let new = [worker(&log), sleep.into()];
        {
            let mut replacing = pin!(dispatcher.replace_workers(new, None));
            let checking = async {
                // The old worker serves, although a new one has sent its HELLO.
                until("two new ones are there", || dispatcher.stats().workers.len() == 3).await;
                let ready = dispatcher.stats().workers[1].id;
                for _ in 0..5 {
                    assert_eq!(answers(&dispatcher, 10).await, old);
                }
                let stats = dispatcher.stats();
                let new = stats.workers.iter().find(|worker| worker.id == ready).unwrap();
                assert_eq!((new.state, new.credit, new.adopted), (WorkerState::Starting, 0, 0));
            };
            tokio::select! {
                ended = replacing.as_mut() => panic!("{ended:?}"),
                () = checking => {}
            }
            // A second replacement cannot begin meanwhile.
            let second = dispatcher.replace_workers([worker(&log)], None).await;
            assert!(matches!(second, Err(NotReplaced::InProgress)), "{second:?}");
        }
        // The replacement was dropped before the switch, so its workers end.
        until("the new ones have left", || dispatcher.stats().workers.len() == 1).await;
        until("their processes have ended", || dispatcher.stats().leftover == 0).await;
        assert_eq!(pids(&dispatcher), old);
        assert_eq!(answers(&dispatcher, 10).await, old);
        // The next replacement can begin.
        dispatcher.replace_workers([worker(&log)], None).await.unwrap();
        assert!(answers(&dispatcher, 10).await.is_disjoint(&old));
        dispatcher.drain(None).await;
    });
}

#[test]
fn new_workers_that_fail_are_stopped_and_the_old_ones_go_on() {
    run(async {
        // Two groups have a worker each.
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let dispatcher = Dispatcher::builder().hello_timeout(Duration::from_secs(5)).build();
        let others = dispatcher.in_group("others");
        for group in [&dispatcher, &others] {
            group.spawn_worker(worker(&log)).unwrap();
        }
        started(&dispatcher, 2).await;
        let old = pids(&dispatcher);
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).kill_on_drop(true);
            command
        };
        // One of three new workers fails, in several ways. The error describes that worker.
        for (program, broken, code, signal, text) in [
            ("sh", shell("exit 3"), Some(3), None, "its process or its socket ended"),
            ("sh", shell("kill -KILL $$"), None, Some(SIGKILL), "its process or its socket ended"),
            ("cat", Command::new("cat"), None, Some(SIGKILL), "it did not say hello in time"),
            ("sh", shell("exec sleep 100"), None, Some(SIGKILL), "it did not say hello in time"),
            ("sh", shell("echo hello >&0; sleep 100"), None, Some(SIGKILL), "bad magic byte"),
        ] {
            let broken = WorkerCommand::from(broken).restart(true);
            let new = [worker(&log), broken, worker(&log)];
            let error = dispatcher.replace_workers(new, None).await.unwrap_err();
            let NotReplaced::Failed(failed) = &error else { panic!("{error:?}") };
            let exit = failed.last_exit.as_ref().unwrap();
            let status = exit.status.unwrap();
            assert_eq!((status.code(), status.signal()), (code, signal), "{error}");
            assert_eq!(failed.program.as_deref(), Some(program));
            let pid = exit.pid.unwrap();
            let begin = format!("new worker {} ({program}, pid {pid}) is gone: ", failed.id);
            let message = error.to_string();
            assert!(message.starts_with(&begin) && message.contains(text), "{message}");
            assert_eq!(pids(&dispatcher), old);
            assert_eq!(answers(&dispatcher, 10).await.len(), 1);
        }
        // A program cannot be started, or no command is given.
        let missing = Command::new(directory.path().join("missing"));
        let new = [worker(&log), missing.into()];
        let error = dispatcher.replace_workers(new, None).await.unwrap_err();
        let expected = format!("cannot start {}", directory.path().join("missing").display());
        assert!(matches!(error, NotReplaced::NotStarted(_)));
        assert!(error.to_string().starts_with(&expected), "{error}");
        let nothing = dispatcher.replace_workers(Vec::<Command>::new(), None).await;
        assert!(matches!(nothing, Err(NotReplaced::NoCommand)));

        // The old workers are the same as before.
        assert_eq!(pids(&dispatcher), old);
        until("their processes have ended", || dispatcher.stats().leftover == 0).await;
        let stats = dispatcher.stats();
        assert!(stats.workers.iter().all(|worker| worker.restarts == 0));
        dispatcher.drain(None).await;
    });
}

#[test]
fn only_the_workers_of_the_group_are_replaced() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let dispatcher = Dispatcher::builder().build();
        let (a, b) = (dispatcher.in_group("a"), dispatcher.in_group("b"));
        let old_a = a.spawn_worker(worker(&log)).unwrap();
        let old_b = b.spawn_worker(worker(&log)).unwrap();
        started(&dispatcher, 2).await;
        let (replaced_a, replaced_b) = tokio::join!(
            a.replace_workers([worker(&log)], None),
            b.replace_workers([worker(&log), worker(&log)], None)
        );
        for (replaced, old, group) in [(replaced_a, old_a, "a"), (replaced_b, old_b, "b")] {
            let replaced = replaced.unwrap();
            assert_eq!(replaced.old.iter().map(|worker| worker.id).collect::<Vec<_>>(), [old]);
            for worker in dispatcher.stats().workers {
                assert_eq!(worker.group == group.into(), replaced.new.contains(&worker.id));
            }
        }
        dispatcher.drain(None).await;
    });
}

/// A worker in this process adopts connections, and does not leave.
#[test]
fn a_replacement_counts_the_connections_that_are_left_at_its_deadline() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let dispatcher = Dispatcher::builder().build();
        let mut old = Raw::start(&dispatcher, SocketKind::SeqPacket, 10).await;
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(3).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        old.offers(3).await;
        old.adopt(2).await;
        until("two are adopted", || dispatcher.stats().adopted == 2).await;
        let replacing = dispatcher.replace_workers([worker(&log)], Some(Duration::from_secs(1)));
        let (replaced, ()) = tokio::join!(replacing, old.ended());
        let replaced = replaced.unwrap();
        assert_eq!(replaced.unfinished(), 2);
        let exit = replaced.old[0].last_exit.as_ref().unwrap();
        assert_eq!((&exit.cause, exit.active, exit.unanswered), (&RetireCause::Overdue, 2, 1));
        let adopters = join_all(outcomes).await;
        assert_eq!(adopters.into_iter().map(Result::unwrap).last().unwrap(), replaced.new[0]);
        dispatcher.drain(None).await;
    });
}

/// Before the switch an old worker is started again, and after it a new one is.
#[test]
fn a_worker_that_dies_during_a_replacement_is_started_again() {
    run(async {
        // The command of the new worker waits until the test opens a gate.
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let dispatcher = Dispatcher::builder().build();
        let old = dispatcher.spawn_worker(worker(&log)).unwrap();
        started(&dispatcher, 1).await;
        let gate = directory.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let like = command(&log);
        let mut late = Command::new("sh");
        late.args(["-c", "read _ < \"$GATE\"; exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(like.as_std().get_args())
            .envs(like.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("GATE", &gate)
            .kill_on_drop(true);
        // Before it is open, the old worker is killed. It is started again.
        let mut replacing =
            pin!(dispatcher.replace_workers([WorkerCommand::from(late).restart(true)], None));
        let killing = async {
            until("the new one is there", || dispatcher.stats().workers.len() == 2).await;
            let restarts = || dispatcher.stats().workers[0].restarts;
            let pid = dispatcher.stats().workers[0].pid.unwrap();
            kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
            until("the old one is started again", || restarts() == 1).await;
            assert_eq!(dispatcher.stats().workers[0].id, old);
        };
        tokio::select! {
            ended = replacing.as_mut() => panic!("{ended:?}"),
            () = killing => {}
        }
        // The gate opens, and the new worker replaces the old one.
        let open = || {
            let gate = gate.clone();
            tokio::task::spawn_blocking(move || std::fs::write(gate, "\n").unwrap())
        };
        let opening = open();
        let replaced = replacing.await.unwrap();
        opening.await.unwrap();
        assert_eq!(replaced.old[0].restarts, 1);

        // Now the new worker is killed. It is started again, too.
        let new = dispatcher.stats().workers[0].clone();
        kill(Pid::from_raw(new.pid.unwrap() as i32), Signal::SIGKILL).unwrap();
        let opening = open();
        until("the new one is started again", || dispatcher.stats().workers[0].restarts == 1).await;
        opening.await.unwrap();
        assert_eq!(answers(&dispatcher, 5).await, pids(&dispatcher));
        dispatcher.drain(None).await;
    });
}

#[test]
fn a_drain_before_the_switch_stops_the_new_workers() {
    run(async {
        let (_directory, log, dispatcher) = one_worker().await;
        let sleep = sleep();
        let mut replacing = pin!(dispatcher.replace_workers([sleep], None));
        assert!(replacing.as_mut().now_or_never().is_none());
        let (replaced, ()) = tokio::join!(replacing, dispatcher.drain(None));
        assert!(matches!(replaced, Err(NotReplaced::Draining)), "{replaced:?}");
        let late = dispatcher.replace_workers([worker(&log)], None).await;
        assert!(matches!(late, Err(NotReplaced::Draining)), "{late:?}");
        assert_eq!((dispatcher.stats().workers.len(), dispatcher.stats().leftover), (0, 0));
    });
}

/// The old worker has a connection that does not end.
#[test]
fn a_replacement_dropped_after_the_switch_lets_the_old_workers_go_on_leaving() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let dispatcher = Dispatcher::builder().build();
        let mut old = Raw::start(&dispatcher, SocketKind::SeqPacket, 10).await;
        {
            let replacing = dispatcher.replace_workers([worker(&log)], None);
            tokio::select! {
                ended = replacing => panic!("{ended:?}"),
                () = old.wait_for_drain() => {}
            }
        }
        // The workers of the first replacement are replaced in turn.
        let first = Vec::from_iter(pids(&dispatcher));
        let replaced = dispatcher.replace_workers([worker(&log)], None).await.unwrap();
        assert_eq!(replaced.old.len(), 1);
        assert!(answers(&dispatcher, 5).await.iter().all(|pid| !first.contains(pid)));
        assert!(ids(&dispatcher).contains(&old.id), "the worker with a connection has left");
        old.leave().await;
        until("the worker has left", || dispatcher.stats().workers.len() == 1).await;
        dispatcher.drain(None).await;
    });
}

/// There are enough descriptors for some of the new workers, and not for all.
#[test]
fn without_descriptors_for_the_new_workers_the_old_ones_go_on() {
    const NAME: &str = "replace::without_descriptors_for_the_new_workers_the_old_ones_go_on";
    alone(NAME, async {
        let (_directory, log, dispatcher) = one_worker().await;
        let old = pids(&dispatcher);
        let mut pairs = connections(5).await;
        let before = open_fds();
        setrlimit(Resource::RLIMIT_NOFILE, before as u64 + 6, 1 << 12).unwrap();
        let new = (0..8).map(|_| worker(&log));
        let error = dispatcher.replace_workers(new, None).await.unwrap_err();
        assert!(matches!(error, NotReplaced::NotStarted(_)), "{error}");
        assert!(error.to_string().starts_with("cannot start /proc/self/exe: "), "{error}");
        until("their processes have ended", || dispatcher.stats().leftover == 0).await;
        until("their descriptors are closed", || open_fds() <= before).await;
        while let Some((client, accepted)) = pairs.pop() {
            dispatcher.dispatch(accepted).await.unwrap();
            assert_eq!(client.answer().await.parse(), Ok(*old.first().unwrap()));
        }
        assert_eq!(pids(&dispatcher), old);
        setrlimit(Resource::RLIMIT_NOFILE, 1 << 12, 1 << 12).unwrap();
        dispatcher.drain(None).await;
    });
}
