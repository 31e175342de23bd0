//! Programs that do not become workers, and the stats of workers that have left.

use std::{
    fs::Permissions,
    io::ErrorKind,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    sync::{Arc, Mutex},
    time::Duration,
};

use fdwire::{
    SocketKind,
    handoff::{
        Dispatcher, RetireCause, WorkerCommand, WorkerExit, WorkerState, WorkerStats,
        protocol::{FromWorker, RejectReason},
    },
};
use futures::FutureExt;
use nix::{
    libc::SIGKILL,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Command;
use tracing::{Event, Level, subscriber::set_default};

use crate::{
    both,
    common::{Events, KINDS, run},
    descriptors::alone,
    log::write_to,
    raw_worker::{Point, Raw, connections, until, worker_command},
};

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).kill_on_drop(true);
    command
}

/// Returns the stats of the first worker, which may have departed.
fn first(dispatcher: &Dispatcher) -> WorkerStats {
    let stats = dispatcher.stats();
    stats.departed.into_iter().chain(stats.workers).next().expect("a worker was started")
}

/// Waits until the process of the first worker has ended. Returns how it has ended.
async fn exit_of(dispatcher: &Dispatcher) -> WorkerExit {
    until("its process has ended", || {
        first(dispatcher).last_exit.is_some_and(|exit| exit.status.is_some())
    })
    .await;
    first(dispatcher).last_exit.unwrap()
}

/// Runs a test that reads its own log of warnings. The test has a process of its own, because
/// subscribers of other threads influence what is logged.
fn with_log(name: &str, test: impl AsyncFnOnce(&Mutex<String>)) {
    alone(name, async {
        let log = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&log);
        let _guard =
            set_default(Events(Level::WARN, move |event: &Event<'_>| write_to(&kept, event)));
        test(&log).await;
    });
}

#[test]
fn a_program_that_cannot_be_started_is_an_error_with_its_name() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (missing, text) = (directory.path().join("missing"), directory.path().join("text"));
        std::fs::write(&text, "hello").unwrap();
        let dispatcher = Dispatcher::builder().build();
        for (program, kind) in [(missing, ErrorKind::NotFound), (text, ErrorKind::PermissionDenied)]
        {
            let error = dispatcher.spawn_worker(Command::new(&program)).unwrap_err();
            assert_eq!(error.kind(), kind);
            let expected = format!("cannot start {}: ", program.display());
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        assert!(dispatcher.stats().workers.is_empty() && dispatcher.stats().departed.is_empty());
    });
}

#[test]
fn stats_and_log_show_how_a_program_has_ended_that_exits_at_once() {
    const NAME: &str = "startup::stats_and_log_show_how_a_program_has_ended_that_exits_at_once";
    with_log(NAME, async |log| {
        for (script, code, signal, text) in [
            ("exit 3", Some(3), None, "(exit status: 3); starting it again in 0.01 s"),
            (
                "kill -KILL $$",
                None,
                Some(SIGKILL),
                "(signal: 9 (SIGKILL)); starting it again in 0.01 s",
            ),
        ] {
            // A program exits at once. The stats show how.
            log.lock().unwrap().clear();
            let dispatcher = Dispatcher::builder().build();
            let id =
                dispatcher.spawn_worker(WorkerCommand::from(shell(script)).restart(true)).unwrap();
            let pid = dispatcher.stats().workers[0].pid.unwrap();
            let exit = exit_of(&dispatcher).await;
            let status = exit.status.unwrap();
            assert_eq!(
                (status.code(), status.signal(), &exit.cause),
                (code, signal, &RetireCause::Ended)
            );
            assert!(exit.pid.is_some() && exit.lifetime < Duration::from_secs(60));
            // The log shows it too, and when the program is started again.
            until("the event is logged", || log.lock().unwrap().contains(text)).await;
            let line = log.lock().unwrap().lines().next().unwrap().to_owned();
            assert!(line.contains(&format!("worker={id} program=\"sh\" pid={pid} ")), "{line}");
            let waits = || first(&dispatcher).last_exit.and_then(|exit| exit.restart_in);
            until("the wait before a restart has grown", || {
                waits() >= Some(Duration::from_millis(40))
            })
            .await;
            dispatcher.drain(None).await;
        }
    });
}

/// The programs ignore their standard input, or read it, or write something else to it.
#[test]
fn a_program_that_is_no_worker_is_killed_and_its_connection_goes_to_another() {
    let silent = RetireCause::Misbehaved("it did not say hello in time".into());
    let garbage = RetireCause::Misbehaved("bad magic byte 0x68 where a frame should begin".into());
    const NAME: &str =
        "startup::a_program_that_is_no_worker_is_killed_and_its_connection_goes_to_another";
    with_log(NAME, async |log| {
        for kind in KINDS {
            let soon = Duration::from_secs(1);
            for (command, hello_timeout, cause) in [
                (Command::new("cat"), soon, &silent),
                (shell("exec sleep 100"), soon, &silent),
                (shell("echo hello; exec sleep 100"), soon, &silent),
                (shell("echo hello >&0; exec sleep 100"), Duration::MAX, &garbage),
            ] {
                // A connection waits while the program is started.
                log.lock().unwrap().clear();
                let dispatcher = Dispatcher::builder().hello_timeout(hello_timeout).build();
                let program = command.as_std().get_program().to_str().unwrap().to_owned();
                dispatcher.spawn_worker(WorkerCommand::from(command).socket_kind(kind)).unwrap();
                let (_client, accepted) = connections(1).await.pop().unwrap();
                let outcome = dispatcher.dispatch(accepted);
                // The program is killed. The stats and the log show why.
                let exit = exit_of(&dispatcher).await;
                assert_eq!((&exit.cause, exit.status.unwrap().signal()), (cause, Some(SIGKILL)));
                until("the worker has left", || dispatcher.stats().workers.is_empty()).await;
                let gone = first(&dispatcher);
                assert_eq!(
                    (gone.program.as_deref(), gone.state),
                    (Some(&*program), WorkerState::Gone)
                );
                assert_eq!((dispatcher.stats().refused_workers, gone.retired.misbehaved), (1, 1));
                let log = log.lock().unwrap().clone();
                assert!(log.contains(&program) && log.contains("signal: 9"), "{log}");

                // A worker gets the connection.
                let mut good = Raw::start(&dispatcher, kind, 1).await;
                good.offer().await.unwrap();
                good.adopt(1).await;
                assert_eq!(outcome.await.unwrap(), good.id);
            }
        }
    });
}

/// The program is missing for a moment, as during an update.
#[test]
fn a_worker_whose_program_has_gone_is_started_again_when_it_is_back() {
    const NAME: &str = "startup::a_worker_whose_program_has_gone_is_started_again_when_it_is_back";
    with_log(NAME, async |log| {
        // A worker runs a program that was installed.
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("worker");
        let install = || {
            std::fs::copy("/proc/self/exe", &program).unwrap();
            std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        };
        install();
        let like = worker_command(Point::Never, Signal::SIGKILL, &directory.path().join("log"));
        let mut command = Command::new(&program);
        command.args(like.as_std().get_args()).kill_on_drop(true);
        command.envs(like.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
        let dispatcher = Dispatcher::builder().build();
        let worker =
            WorkerCommand::from(command).restart(true).longest_wait(Duration::from_millis(50));
        let id = dispatcher.spawn_worker(worker).unwrap();
        until("the worker is ready", || dispatcher.stats().workers[0].credit > 0).await;

        // The program is removed, and the worker dies. It cannot be started again.
        std::fs::remove_file(&program).unwrap();
        kill(Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32), Signal::SIGKILL)
            .unwrap();
        let text = format!("cannot start {}: No such file", program.display());
        until("the event is logged", || log.lock().unwrap().contains(&text)).await;
        assert_eq!(dispatcher.stats().workers[0].state, WorkerState::Restarting);
        // When the program is back, it is started.
        install();
        let (_client, accepted) = connections(1).await.pop().unwrap();
        assert_eq!(dispatcher.dispatch(accepted).await.unwrap(), id);
        dispatcher.drain(Some(Duration::ZERO)).await;
    });
}

#[test]
fn the_numbers_of_workers_that_have_left_are_kept() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        for round in 0..40 {
            let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 2).await;
            let (_clients, accepted): (Vec<_>, Vec<_>) = connections(2).await.into_iter().unzip();
            let outcomes = Vec::from_iter(
                accepted.into_iter().map(|connection| dispatcher.dispatch(connection)),
            );
            worker.offers(2).await;
            worker.reject(1, RejectReason::Unusable).await;
            worker.adopt(1).await;
            worker.send(FromWorker::Goodbye).await;
            until("the worker has left", || dispatcher.stats().workers.is_empty()).await;
            let last = dispatcher.stats().departed.pop().unwrap();
            assert_eq!((last.id, last.adopted, last.rejected, last.active), (worker.id, 1, 1, 0));
            assert_eq!((last.state, last.retired.drained), (WorkerState::Gone, 1));
            assert_eq!(last.last_exit.unwrap().cause, RetireCause::Drained);
            assert_eq!(dispatcher.stats().departed.len(), usize::min(round + 1, 32));
            drop(outcomes);
        }
    });
}

#[test]
fn the_time_to_each_adoption_is_counted() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(3).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut worker = Raw::start(&dispatcher, kind, 3).await;
        worker.offers(3).await;
        worker.adopt(3).await;
        for outcome in outcomes {
            outcome.await.unwrap();
        }
        let times = dispatcher.stats().adoption_times;
        assert_eq!(times.buckets().map(|(_, count)| count).sum::<u64>(), 3);
        let less =
            |up_to: Option<Duration>| up_to.is_some_and(|up_to| up_to < Duration::from_millis(20));
        assert!(times.buckets().all(|(up_to, count)| count == 0 || !less(up_to)), "{times:?}");
    });
}

#[test]
fn stats_show_for_how_long_a_slot_has_been_waited_for() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        assert_eq!(dispatcher.stats().slot_wait, None);
        let mut waiting = Box::pin(dispatcher.reserve());
        assert!(waiting.as_mut().now_or_never().is_none());
        let before = dispatcher.stats().slot_wait.unwrap();
        until("time has passed", || dispatcher.stats().slot_wait.unwrap() > before).await;
        drop(waiting);
        assert_eq!(dispatcher.stats().slot_wait, None);
    });
}

#[test]
fn the_reason_why_a_worker_was_started_again_is_in_its_stats() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let id = dispatcher
            .spawn_worker(WorkerCommand::from(Command::new("true")).restart(true))
            .unwrap();
        until("the worker was started again", || dispatcher.stats().workers[0].restarts > 0).await;
        let worker = &dispatcher.stats().workers[0];
        assert_eq!(
            (worker.id, &worker.last_exit.as_ref().unwrap().cause),
            (id, &RetireCause::Ended)
        );
        dispatcher.drain(None).await;
    });
}
