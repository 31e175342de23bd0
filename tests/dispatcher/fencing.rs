//! Workers that are cut off (fenced): the time when that happens, and how one that goes on learns
//! of it.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::Stdio,
    time::Duration,
};

use fdwire::{
    Framed, Listener, Socket, SocketKind,
    handoff::{
        Dispatcher, Incoming, IncomingEnd,
        protocol::{FromWorker, ToWorker, WorkerCodec},
    },
};
use futures::{SinkExt, StreamExt};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Command;

use crate::{
    both,
    common::{KINDS, one_thread, run},
    raw_worker::{Raw, connections, greet, serve, until},
};

/// Rules: D-FENCED.
#[test]
fn the_last_message_to_a_worker_that_is_cut_off_is_fenced() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        worker.send(FromWorker::Pong { nonce: 99 }).await; // no ping has this number
        let mut last = None;
        while let Some(message) = worker.step().await {
            last = Some(message);
        }
        assert!(matches!(last, Some(ToWorker::Fenced)), "{last:?}");
    });
}

/// The worker learns at once that it gets nothing more. It finishes what it has adopted.
#[test]
fn a_worker_that_was_fenced_and_goes_on_learns_that() {
    for kind in KINDS {
        run(async {
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(20))
                .hang_timeout(Duration::from_secs(1))
                .build();
            let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
            dispatcher.add_worker(dispatcher_end);
            // The worker adopts a connection, and then blocks its runtime until it is released.
            let worker_end = OwnedFd::from(worker_end);
            let (release, released) = std::sync::mpsc::channel::<()>();
            let worker = std::thread::spawn(move || {
                one_thread().block_on(async move {
                    let mut incoming = Incoming::new(Socket::try_from(worker_end).unwrap());
                    let handle = incoming.handle();
                    let connection = incoming.next().await.unwrap();
                    released.recv().unwrap(); // blocks the only thread of its runtime
                    assert!(incoming.next().await.is_none());
                    let end = handle.link_ended().await;
                    drop(connection);
                    handle.ended().await;
                    end
                })
            });
            // The worker is fenced meanwhile, and learns that when it goes on.
            let (_client, connection) = connections(1).await.pop().unwrap();
            dispatcher.dispatch(connection).await.unwrap();
            until("the worker is fenced", || dispatcher.stats().retired.hung == 1).await;
            release.send(()).unwrap();
            let end = tokio::task::spawn_blocking(|| worker.join().unwrap()).await.unwrap();
            assert!(matches!(end, IncomingEnd::Fenced), "{end:?}");
        });
    }
}

/// The link does not end with the worker, because another process has its socket open. As far as
/// the dispatcher knows, that process could be the worker.
///
/// Rules: W-SOCKET-END.
#[test]
fn the_death_of_a_connected_worker_is_noticed_by_silence_if_its_socket_stays_open() {
    const ROLE: &str =
        "fencing::the_death_of_a_connected_worker_is_noticed_by_silence_if_its_socket_stays_open";
    // The worker's process starts another one, which has the socket open, and then answers pings.
    if let Some(path) = std::env::var_os("FDWIRE_CONNECT") {
        return run(async {
            let socket = Socket::connect(path, SocketKind::SeqPacket).await.unwrap();
            let copy = socket.as_fd().try_clone_to_owned().unwrap();
            // The test ends this process by its pid.
            let holder = Command::new("sleep").arg("600").stdin(Stdio::from(copy)).spawn().unwrap();
            let mut framed = Framed::new(socket, WorkerCodec::default());
            greet(&mut framed, 1).await;
            std::fs::write(
                std::env::var_os("FDWIRE_LOG").unwrap(),
                holder.id().unwrap().to_string(),
            )
            .unwrap();
            while let Some(Ok(message)) = framed.next().await {
                if let ToWorker::Ping { nonce } = message {
                    framed.send(FromWorker::Pong { nonce }).await.unwrap();
                }
            }
        });
    }
    run(async {
        // A worker connects, and gets an offer that it does not answer.
        let directory = tempfile::tempdir().unwrap();
        let (path, log) = (directory.path().join("front.sock"), directory.path().join("holder"));
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(50))
            .hang_timeout(Duration::from_secs(2))
            .recall_after(Duration::MAX)
            .build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve_workers(listener).await }
        });
        let mut command = Command::new("/proc/self/exe");
        command
            .args([ROLE, "--exact", "--nocapture"])
            .env("FDWIRE_CONNECT", &path)
            .env("FDWIRE_LOG", &log);
        let mut worker = command.stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        until("the worker has started a process", || {
            std::fs::read_to_string(&log).is_ok_and(|pid| !pid.is_empty())
        })
        .await;
        let holder: i32 = std::fs::read_to_string(&log).unwrap().parse().unwrap();
        let (client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        until("the connection was offered", || {
            dispatcher.stats().workers.iter().any(|worker| worker.unanswered == 1)
        })
        .await;

        // The worker is killed, and cut off after the hang timeout. Another gets the connection.
        worker.start_kill().unwrap();
        until("the death of the worker is noticed", || dispatcher.stats().retired.hung == 1).await;
        assert!(kill(Pid::from_raw(holder), None).is_ok(), "the holder lives");
        let mut other = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let offer = other.offer().await.unwrap();
        other.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), other.id);
        drop(serve(offer, "served").unwrap());
        kill(Pid::from_raw(holder), Signal::SIGKILL).unwrap();
        let mut client = client;
        assert_eq!(client.first().await, "served");
        accepting.abort();
    });
}

#[test]
fn a_dispatcher_whose_times_have_no_end_hands_over_and_drains() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::MAX)
            .hang_timeout(Duration::MAX)
            .recall_after(Duration::MAX)
            .max_fences(1, Duration::MAX)
            .build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap();
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), worker.id);

        let mut other = Raw::start(&dispatcher, kind, 1).await;
        let (removed, ()) =
            tokio::join!(dispatcher.remove_worker(other.id, Some(Duration::MAX)), other.leave());
        assert!(removed);
        tokio::join!(dispatcher.drain(Some(Duration::MAX)), worker.leave());
        assert_eq!(dispatcher.stats().retired.drained, 2);
    });
}
