//! The descriptors that a dispatcher has open. Each test runs in a process of its own.

use std::{
    io::{Read, Write},
    net::{self, Shutdown},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::RecvTimeoutError,
    },
    time::Duration,
};

use fdwire::{
    Listener, SocketKind,
    handoff::{
        Dispatcher, Incoming, WorkerCommand,
        protocol::{FromWorker, RejectReason},
    },
};
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
        socket::{setsockopt, sockopt},
    },
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpSocket},
    time::sleep,
};

use crate::{
    common::{one_thread, open_fds, run},
    raw_worker::{Client, Point, Raw, connections, serve, stop, until, worker_command},
};

/// Runs a test in a process of its own, because it counts descriptors or changes the whole process.
pub(crate) fn alone(name: &str, test: impl Future<Output = ()>) {
    if std::env::var("FDWIRE_ROLE").as_deref() == Ok(name) {
        return run(test);
    }
    let mut command = std::process::Command::new("/proc/self/exe");
    let output =
        command.args([name, "--exact", "--nocapture"]).env("FDWIRE_ROLE", name).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn clients_of_full_workers_wait_in_the_backlog() {
    alone("descriptors::clients_of_full_workers_wait_in_the_backlog", full());
}

async fn full() {
    const CLIENTS: u32 = 1000;
    // Each of two workers asks for one connection, and gets it.
    let dispatcher =
        Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
    let mut a = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
    let mut b = Raw::start(&dispatcher, SocketKind::Stream, 1).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(2 * CLIENTS).unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn({
        let dispatcher = dispatcher.clone();
        async move { dispatcher.serve(listener).await }
    });
    let mut clients = vec![Client::connect(address, 0).await, Client::connect(address, 1).await];
    let mut held = vec![a.offer().await.unwrap(), b.offer().await.unwrap()];
    a.adopt(1).await;
    b.adopt(1).await;
    until("both are full", || dispatcher.stats().adopted == 2).await;

    // The other clients connect. None of them is accepted.
    let before = open_fds();
    for serial in 2..CLIENTS {
        clients.push(Client::connect(address, serial).await);
    }
    // A connection that could be accepted would be, before two pings are answered.
    for _ in 0..2 {
        a.step().await.unwrap();
    }
    assert!(open_fds() - before <= clients.len() - 2, "only the clients' own were opened");
    assert_eq!(dispatcher.stats().dispatched, 2);

    // The workers ask for more, and all clients are served.
    for worker in [&mut a, &mut b] {
        worker.send(FromWorker::Demand { total: u64::from(CLIENTS) }).await;
    }
    let work = async |mut worker: Raw| {
        while let Some(offer) = worker.offer().await {
            worker.adopt(1).await;
            serve(offer, "served").unwrap();
        }
    };
    for offer in held.drain(..) {
        serve(offer, "served").unwrap();
    }
    let answers = tokio::select! {
        answers = join_all(clients.into_iter().map(Client::answer)) => answers,
        _ = async { tokio::join!(work(a), work(b)) } => unreachable!(),
    };
    assert!(answers.iter().all(|answer| answer == "served"));
    assert_eq!(dispatcher.stats().adopted, u64::from(CLIENTS));
    serving.abort();
}

#[test]
fn accepting_goes_on_after_descriptors_ran_out() {
    alone("descriptors::accepting_goes_on_after_descriptors_ran_out", emfile());
}

async fn emfile() {
    let (_directory, dispatcher) = with_worker().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    for serial in 0..20 {
        clients.push(Client::connect(address, serial).await);
    }
    limit_fds(open_fds() as u64 + 2);
    tokio::select! {
        outcome = dispatcher.serve(listener) => outcome.unwrap(),
        answers = join_all(clients.into_iter().map(Client::answer)) => {
            assert!(answers.iter().all(|answer| !answer.is_empty()));
        }
    }
}

#[test]
fn stats_show_that_accepting_pauses_without_descriptors() {
    const NAME: &str = "descriptors::stats_show_that_accepting_pauses_without_descriptors";
    alone(NAME, async {
        let (_directory, dispatcher) = with_worker().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::connect(listener.local_addr().unwrap(), 0).await;
        let stats = || (dispatcher.stats().accept_pauses, dispatcher.stats().accept_paused_for);
        let checking = async {
            assert_eq!(stats(), (0, None));
            limit_fds(3);
            until("the accept loop pauses", || stats().1 > Some(Duration::from_millis(50))).await;
            assert_eq!((stats().0, dispatcher.stats().slot_wait), (1, None));
            limit_fds(1000);
            assert_ne!(client.answer().await, "");
            assert_eq!(stats(), (1, None));
        };
        tokio::select! {
            biased;
            () = checking => {}
            outcome = dispatcher.serve(listener) => panic!("{outcome:?}"),
        }
    });
}

/// If an offer needed another descriptor, connections that hold all of the process's descriptors
/// would wait for each other.
#[test]
fn a_dispatch_opens_no_descriptor() {
    alone("descriptors::a_dispatch_opens_no_descriptor", async {
        let (_directory, dispatcher) = with_worker().await;
        let (clients, accepted): (Vec<_>, Vec<_>) = connections(20).await.into_iter().unzip();
        limit_fds(3);
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok()));
        for client in clients {
            assert_ne!(client.answer().await, "");
        }
        limit_fds(1000); // the removal of the directory needs one
    });
}

/// The application holds nearly all descriptors, and one worker does not answer. The clients of the
/// other worker are served all the same.
#[test]
fn accepting_goes_on_although_few_descriptors_are_left() {
    alone("descriptors::accepting_goes_on_although_few_descriptors_are_left", async {
        let (_directory, dispatcher) = with_worker().await;
        let mut silent = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        for serial in 0..40 {
            clients.push(Client::connect(address, serial).await);
        }
        limit_fds(open_fds() as u64 + 3);
        let answer = async |mut client: Client| (client.first().await, client);
        let mut answers = FuturesUnordered::from_iter(clients.into_iter().map(answer));
        let mut served = Vec::new(); // their descriptors stay in use
        let some = async {
            for _ in 0..39 {
                served.push(answers.next().await.unwrap());
            }
        };
        tokio::select! {
            outcome = dispatcher.serve(listener) => outcome.unwrap(),
            () = some => {}
        }
        limit_fds(1000);
        assert!(served.iter().all(|(answer, _)| !answer.is_empty()));
        drop(silent.offer().await.unwrap());
    });
}

/// Connections that no worker takes for the moment do not use up the descriptors. The worker that
/// will take them needs one to be started.
#[test]
fn a_worker_is_started_again_though_clients_wait() {
    const NAME: &str = "descriptors::a_worker_is_started_again_though_clients_wait";
    const CLIENTS: u32 = 100;
    alone(NAME, async {
        // There is a worker process, and a worker in this process that answers nothing yet.
        let directory = tempfile::tempdir().unwrap();
        let dispatcher =
            Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
        let command = worker_command(Point::Never, Signal::SIGKILL, &directory.path().join("log"));
        let restarted =
            dispatcher.spawn_worker(WorkerCommand::from(command).restart(true)).unwrap();
        let worker = || {
            dispatcher.stats().workers.into_iter().find(|worker| worker.id == restarted).unwrap()
        };
        until("the worker is ready", || worker().credit > 0).await;
        let pid = Pid::from_raw(worker().pid.unwrap() as i32);
        let mut busy = Raw::start(&dispatcher, SocketKind::SeqPacket, CLIENTS.into()).await;
        // Clients connect while the worker process is stopped.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        for serial in 0..CLIENTS {
            clients.push(Client::connect(address, serial).await);
        }
        stop(pid).await;
        // 10 descriptors are left for connections, and 16 for other purposes.
        limit_fds(open_fds() as u64 + 26);
        let serving = dispatcher.serve(listener);
        let work = async {
            until("the reserve is reached", || dispatcher.stats().dispatched > 5).await;
            sleep(Duration::from_millis(200)).await; // more would be accepted within this time
            // The process dies, and its successor serves all clients.
            kill(pid, Signal::SIGKILL).unwrap();
            let offers = dispatcher
                .stats()
                .workers
                .iter()
                .find(|worker| worker.id == busy.id)
                .unwrap()
                .unanswered;
            busy.reject(offers as u32, RejectReason::Recalled).await;
            join_all(clients.into_iter().map(Client::answer)).await
        };
        tokio::select! {
            outcome = serving => outcome.unwrap(),
            answers = work => assert!(answers.iter().all(|answer| !answer.is_empty())),
        }
        assert!(worker().restarts > 0);
    });
}

/// With a thread for each close, there would be as many threads as connections.
#[test]
fn connections_that_nobody_takes_are_closed_by_few_threads() {
    const CONNECTIONS: usize = 3000;
    alone("descriptors::connections_that_nobody_takes_are_closed_by_few_threads", async {
        // There is no worker, so all connections wait.
        let dispatcher = Dispatcher::builder().build();
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let (client, connection) = UnixStream::pair().unwrap();
            clients.push(client);
            drop(dispatcher.dispatch(connection)); // nobody waits for the outcome
        }
        // While a drain closes the connections, a thread counts the threads of this process.
        let is_done = Arc::new(AtomicBool::new(false));
        let counting = std::thread::spawn({
            let is_done = Arc::clone(&is_done);
            move || {
                let mut most = 0;
                while !is_done.load(Ordering::Relaxed) {
                    most = std::fs::read_dir("/proc/self/task").unwrap().count().max(most);
                }
                most
            }
        });
        dispatcher.drain(Some(Duration::ZERO)).await;
        for mut client in clients {
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
        is_done.store(true, Ordering::Relaxed);
        let most = counting.join().unwrap();
        assert!(most < 16, "{most} threads");
        assert_eq!(dispatcher.stats().lost, CONNECTIONS as u64);
    });
}

/// The connection lingers (`SO_LINGER`), so its last close waits for the client.
#[test]
fn the_end_of_the_runtime_waits_for_no_connection_to_close() {
    const NAME: &str = "descriptors::the_end_of_the_runtime_waits_for_no_connection_to_close";
    if std::env::var("FDWIRE_ROLE").as_deref() != Ok(NAME) {
        return alone(NAME, async {});
    }
    for offered in [false, true] {
        // The connection has a full send queue. It waits at the dispatcher, or is offered.
        let runtime = one_thread();
        let (client, worker) = runtime.block_on(async {
            let dispatcher = Dispatcher::builder().build();
            let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, offered.into()).await;
            let (client, accepted) = connections(1).await.pop().unwrap();
            let mut accepted = accepted.into_std().unwrap();
            accepted.set_nonblocking(false).unwrap();
            accepted.read_exact(&mut [0; 4]).unwrap(); // a close with unread bytes would reset it
            accepted.set_nonblocking(true).unwrap();
            setsockopt(&accepted, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 600 })
                .unwrap();
            while accepted.write(&[0; 65536]).is_ok() {}
            let _handed_over = dispatcher.dispatch(accepted);
            if offered {
                drop(worker.offer().await.unwrap());
            }
            tokio::spawn(async move {
                let _dispatcher = dispatcher;
                std::future::pending::<()>().await;
            });
            (client.0.into_std().unwrap(), worker)
        });
        // The client reads only after the runtime has ended.
        let go_on = late_reader(client);
        drop(runtime);
        go_on().expect("a close blocked the end of the runtime");
        drop(worker);
    }
}

/// Starts a client that reads nothing until the returned function is called. If that takes long, a
/// close has blocked: then the client reads too, and the function returns an error.
fn late_reader(mut client: net::TcpStream) -> impl FnOnce() -> Result<(), RecvTimeoutError> {
    client.set_nonblocking(false).unwrap();
    let (go_on, called) = std::sync::mpsc::channel();
    let client = std::thread::spawn(move || {
        let was_called = called.recv_timeout(Duration::from_secs(10));
        let _ = client.shutdown(Shutdown::Write);
        let _ = client.read_to_end(&mut Vec::new());
        was_called
    });
    move || {
        let _ = go_on.send(());
        client.join().unwrap()
    }
}

/// The worker has room for one connection at a time. A listener that cannot accept, because no
/// descriptor is free, does not keep that slot while it waits.
#[test]
fn a_listener_without_descriptors_leaves_its_slot_to_others() {
    const NAME: &str = "descriptors::a_listener_without_descriptors_leaves_its_slot_to_others";
    // The worker's process.
    if std::env::var_os("FDWIRE_WORKER").is_some() {
        return run(async {
            let mut incoming = Incoming::builder().window(1).from_stdin().unwrap();
            while let Some(connection) = incoming.next().await {
                drop(connection);
            }
        });
    }
    alone(NAME, async {
        let dispatcher =
            Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args([NAME, "--exact", "--nocapture"]).env("FDWIRE_WORKER", "1").kill_on_drop(true);
        dispatcher.spawn_worker(command).unwrap();
        until("the worker is ready", || dispatcher.stats().workers[0].credit == 1).await;
        // A client waits at the listener, which can accept nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = Client::connect(listener.local_addr().unwrap(), 0).await;
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(10).await.into_iter().unzip();
        limit_fds(3);
        let serving = dispatcher.serve(listener);
        let work = async {
            sleep(Duration::from_millis(100)).await; // the listener tries within this time
            // Other connections are handed over all the same.
            join_all(accepted.into_iter().map(|connection| dispatcher.dispatch(connection))).await
        };
        tokio::select! {
            outcome = serving => outcome.unwrap(),
            outcomes = work => assert!(outcomes.into_iter().all(|outcome| outcome.is_ok())),
        }
        limit_fds(1000);
    });
}

/// Returns a dispatcher with a worker in a process of its own, which has descriptors even when the
/// dispatcher has none.
async fn with_worker() -> (TempDir, Dispatcher) {
    let directory = tempfile::tempdir().unwrap();
    let dispatcher =
        Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
    let command = worker_command(Point::Never, Signal::SIGKILL, &directory.path().join("log"));
    dispatcher.spawn_worker(WorkerCommand::from(command)).unwrap();
    until("the worker is ready", || dispatcher.stats().workers[0].credit > 0).await;
    (directory, dispatcher)
}

/// Sets the limit of descriptors: numbers from `limit` on can no longer be opened.
fn limit_fds(limit: u64) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
}

/// A worker that was cut off, and may live on, holds stale copies of connections that another
/// worker serves. The dispatcher keeps its own copies as long as these connections are served.
#[test]
fn stale_copies_are_kept_only_as_long_as_they_are_needed() {
    alone("descriptors::stale_copies_are_kept_only_as_long_as_they_are_needed", async {
        // A worker gets three offers, and is cut off because it answers four.
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut bad = Raw::start(&dispatcher, SocketKind::SeqPacket, 3).await;
        let (clients, accepted): (Vec<_>, Vec<_>) = connections(3).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let copies = bad.offers(3).await;
        bad.send(FromWorker::Adopted { first: 0, count: 4 }).await;
        bad.ended().await;

        // Another worker adopts the connections. The dispatcher keeps a copy of each.
        let mut good = Raw::start(&dispatcher, SocketKind::SeqPacket, 3).await;
        let before = open_fds();
        let offers = good.offers(3).await;
        good.adopt(3).await;
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok()));
        assert_eq!(open_fds(), before + 3, "the good worker has three, and none was closed");
        // The worker ends the connections, and the dispatcher closes its copies.
        for offer in offers {
            let (_, stream) = serve(offer, "good").unwrap();
            stream.shutdown(Shutdown::Both).unwrap();
        }
        while open_fds() > before - 3 {
            good.step().await.unwrap(); // pings
        }
        for client in clients {
            assert_eq!(client.answer().await, "good");
        }
        drop(copies);
    });
}

/// A process that connects, leaves, and connects again is watched only as long as a worker needs
/// it.
#[test]
fn a_process_that_connects_again_and_again_leaves_nothing_behind() {
    const ROLE: &str = "descriptors::a_process_that_connects_again_and_again_leaves_nothing_behind";
    // The process gets one connection each time that it is connected.
    if let Some(path) = std::env::var_os("FDWIRE_CONNECT") {
        return run(async {
            for _ in 0..20 {
                let mut incoming = Incoming::connect(&path).await.unwrap();
                incoming.next().await.unwrap();
                let handle = incoming.handle();
                drop(incoming);
                handle.ended().await;
            }
            std::future::pending().await
        });
    }
    // The dispatcher has no more descriptors afterwards than before.
    alone(ROLE, async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("front.sock");
        let dispatcher = Dispatcher::builder().build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = async { dispatcher.serve_workers(listener).await.unwrap() };
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command
            .args([ROLE, "--exact", "--nocapture"])
            .env("FDWIRE_CONNECT", &path)
            .kill_on_drop(true);
        let _process = command.spawn().unwrap();
        let before = open_fds();
        let work = async {
            for round in 1..=20 {
                let (_client, accepted) = connections(1).await.pop().unwrap();
                dispatcher.dispatch(accepted).await.unwrap();
                until("the worker has left", || dispatcher.stats().retired.drained == round).await;
            }
            // The descriptors of the listener and its lock stay open.
            until("no descriptor of the worker is left", || open_fds() <= before + 2).await;
        };
        tokio::select! {
            () = accepting => unreachable!(),
            () = work => {}
        }
    });
}

/// The connection lingers (`SO_LINGER`), so its last close waits for the client.
#[test]
fn stale_copies_without_use_are_closed_without_blocking() {
    alone("descriptors::stale_copies_without_use_are_closed_without_blocking", async {
        // A worker is cut off, and another one adopts its connection. The dispatcher has a copy.
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut bad = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let (client, accepted) = connections(1).await.pop().unwrap();
        let linger = libc::linger { l_onoff: 1, l_linger: 600 };
        setsockopt(&accepted, sockopt::Linger, &linger).unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let copies = bad.offers(1).await;
        bad.send(FromWorker::Adopted { first: 0, count: 2 }).await;
        bad.ended().await;
        let mut good = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let offer = good.offer().await.unwrap();
        good.adopt(1).await;
        outcome.await.unwrap();

        // The connection ends with unsent data. The client reads it when `go_on` is called, or
        // when a close has blocked this thread for long.
        let (_, mut stream) = serve(offer, "good").unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        stream.shutdown(Shutdown::Write).unwrap();
        let client = client.0.into_std().unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let has_ended = || {
            poll(&mut [PollFd::new(stream.as_fd(), PollFlags::empty())], PollTimeout::ZERO).unwrap()
                > 0
        };
        while !has_ended() {
            std::thread::yield_now();
        }
        drop((stream, copies));
        let go_on = late_reader(client);
        for _ in 0..5 {
            good.step().await.unwrap(); // pings
        }
        go_on().expect("the close blocked the runtime");
    });
}
