//! Processes of workers that go on without their link, connect again, or crash again and again.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Stdio,
    time::{Duration, Instant},
};

use fdwire::{
    Framed, Listener, Socket, SocketKind,
    handoff::{
        Dispatcher, Incoming, NotDispatched, WorkerCommand,
        protocol::{ToWorker, WorkerCodec},
    },
};
use futures::StreamExt;
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{Shutdown, shutdown},
    },
    unistd::Pid,
};
use tokio::process::Command;

use crate::{
    common::run,
    descriptors::alone,
    raw_worker::{connections, greet, until},
};

/// Returns the command that runs this test again, as a process of its own.
fn role(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([name, "--exact", "--nocapture"])
        .env("FDWIRE_ROLE", name)
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
}

fn is_role(name: &str) -> bool {
    std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == name)
}

/// Counts the descriptors of this process that stand for processes.
fn pidfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|fd| std::fs::read_link(fd.unwrap().path()));
    links
        .filter(|link| link.as_ref().is_ok_and(|link| link.to_string_lossy().contains("pidfd")))
        .count()
}

/// The process leaves an offer unanswered each time. So the dispatcher has to learn when it ends.
#[test]
fn a_worker_process_takes_one_descriptor_however_often_it_connects() {
    const ROLE: &str = "processes::a_worker_process_takes_one_descriptor_however_often_it_connects";
    const ROUNDS: u64 = 50;
    // The process connects, gets an offer, and leaves, over and over.
    if let Some(path) = std::env::var_os("FDWIRE_CONNECT") {
        return run(async {
            loop {
                let socket = Socket::connect(&path, SocketKind::SeqPacket).await.unwrap();
                let mut framed = Framed::new(socket, WorkerCodec::default());
                greet(&mut framed, 1).await;
                while !matches!(framed.next().await, Some(Ok(ToWorker::Offer { .. })) | None) {}
            }
        });
    }
    // The dispatcher offers that process one connection each time.
    alone(ROLE, async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("front.sock");
        let dispatcher = Dispatcher::builder().max_offers(1).build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = async { dispatcher.serve_workers(listener).await.unwrap() };
        let mut process = role(ROLE).env("FDWIRE_CONNECT", &path).spawn().unwrap();
        let work = async {
            while dispatcher.stats().retired.ended < ROUNDS {
                let (_client, accepted) = connections(1).await.pop().unwrap();
                let failed = dispatcher.dispatch(accepted).await.unwrap_err();
                assert!(matches!(failed.reason, NotDispatched::TooManyOffers { .. }));
            }
        };
        tokio::select! {
            () = accepting => unreachable!(),
            () = work => {}
        }
        assert_eq!(pidfds(), 2, "the dispatcher has one for the process, and this test has one");
        process.kill().await.unwrap();
        until("the end of the process is noticed", || pidfds() == 0).await;
    });
}

/// The process that connects starts another one, which serves, as a program does that daemonizes.
#[test]
fn a_worker_goes_on_after_the_process_that_connected_it_ends() {
    const ROLE: &str = "processes::a_worker_goes_on_after_the_process_that_connected_it_ends";
    // The first process connects, gives its socket to the second one, and ends.
    if let Some(path) = std::env::var_os("FDWIRE_CONNECT") {
        return run(async {
            let socket = OwnedFd::from(Socket::connect(path, SocketKind::SeqPacket).await.unwrap());
            let mut serving = role(ROLE);
            serving.env_remove("FDWIRE_CONNECT").stdin(socket).kill_on_drop(false).spawn().unwrap();
        });
    }
    // The second process serves.
    if is_role(ROLE) {
        run(async {
            let mut incoming = Incoming::from_stdin().unwrap();
            while let Some(connection) = incoming.next().await {
                drop(connection);
            }
        });
        std::process::exit(0);
    }
    // The dispatcher hands over connections after the first process has ended.
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("front.sock");
        let dispatcher = Dispatcher::builder().build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve_workers(listener).await }
        });
        assert!(role(ROLE).env("FDWIRE_CONNECT", &path).status().await.unwrap().success());
        for (client, accepted) in connections(20).await {
            dispatcher.dispatch(accepted).await.unwrap();
            assert_eq!(client.answer().await, "");
        }
        assert_eq!(dispatcher.stats().retired, Default::default());
        dispatcher.drain(None).await;
        assert_eq!(dispatcher.stats().retired.drained, 1);
        accepting.await.unwrap().unwrap();
    });
}

/// Is a worker that adopts one connection, ends its link, and lives on, as one does whose socket
/// has failed.
fn lives_on() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    run(async {
        let mut incoming = Incoming::from_stdin().unwrap();
        drop(incoming.next().await);
        shutdown(socket.as_raw_fd(), Shutdown::Both).unwrap();
        std::future::pending::<()>().await
    });
}

/// Rules: W-EXIT-TIME.
#[test]
fn a_process_that_has_left_and_lives_on_is_killed_and_few_are_started_meanwhile() {
    const ROLE: &str =
        "processes::a_process_that_has_left_and_lives_on_is_killed_and_few_are_started_meanwhile";
    if is_role(ROLE) {
        return lives_on();
    }
    run(async {
        let dispatcher = Dispatcher::builder().exit_timeout(Duration::from_millis(500)).build();
        dispatcher.spawn_worker(WorkerCommand::from(role(ROLE)).restart(true)).unwrap();
        let mut most = 0;
        while dispatcher.stats().workers[0].restarts < 5 {
            let (_client, accepted) = connections(1).await.pop().unwrap();
            dispatcher.dispatch(accepted).await.unwrap();
            let stats = dispatcher.stats();
            assert_eq!(stats.leftover, stats.workers[0].leftover);
            most = most.max(stats.leftover);
        }
        assert!((1..=2).contains(&most), "{most}");
        // The drain has no limit. It ends because the processes are killed.
        dispatcher.drain(None).await;
        assert_eq!(dispatcher.stats().leftover, 0);
    });
}

#[test]
fn a_drain_does_not_wait_for_a_process_that_is_not_to_be_killed() {
    const ROLE: &str = "processes::a_drain_does_not_wait_for_a_process_that_is_not_to_be_killed";
    if is_role(ROLE) {
        return lives_on();
    }
    run(async {
        let dispatcher =
            Dispatcher::builder().exit_timeout(Duration::from_millis(100)).kill_hung(false).build();
        dispatcher.spawn_worker(role(ROLE)).unwrap();
        until("the worker has sent its hello", || dispatcher.stats().workers[0].credit > 0).await;
        let pid = Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32);
        let (_client, accepted) = connections(1).await.pop().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("the worker has left", || dispatcher.stats().workers.is_empty()).await;
        dispatcher.drain(None).await;
        assert_eq!(dispatcher.stats().leftover, 1);
        kill(pid, Signal::SIGKILL).unwrap();
        until("the process was reaped", || dispatcher.stats().leftover == 0).await;
    });
}

/// The worker has adopted the request each time, so no other worker gets it.
#[test]
fn a_request_that_crashes_the_application_does_not_start_a_storm_of_processes() {
    const ROLE: &str =
        "processes::a_request_that_crashes_the_application_does_not_start_a_storm_of_processes";
    const RESTARTS: u32 = 7;
    if is_role(ROLE) {
        run(async {
            let mut incoming = Incoming::from_stdin().unwrap();
            let _crashes = incoming.next().await;
        });
        std::process::abort();
    }
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let begin = Instant::now();
        dispatcher.spawn_worker(WorkerCommand::from(role(ROLE)).restart(true)).unwrap();
        while dispatcher.stats().workers[0].restarts < RESTARTS.into() {
            let (_client, accepted) = connections(1).await.pop().unwrap();
            dispatcher.dispatch(accepted).await.unwrap();
        }
        let waits =
            (0..RESTARTS).map(|restart| Duration::from_millis(10) * 2u32.pow(restart)).sum();
        assert!(begin.elapsed() >= waits, "{:?}", begin.elapsed());
        dispatcher.drain(Some(Duration::ZERO)).await;
    });
}

/// The process is a program that ignores its standard input.
#[test]
fn a_process_that_sends_no_hello_does_not_outlive_its_removal() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("600").kill_on_drop(true);
            command
        };
        let id = dispatcher.spawn_worker(sleep()).unwrap();
        let pid = Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32);
        assert!(dispatcher.remove_worker(id, None).await);
        until("the worker was killed and reaped", || kill(pid, None).is_err()).await;
        dispatcher.spawn_worker(sleep()).unwrap();
        dispatcher.drain(None).await;
    });
}
