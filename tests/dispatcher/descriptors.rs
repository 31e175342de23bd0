//! How many descriptors a dispatcher has open. Each test runs in a process of its own.

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

/// Runs a test in a process of its own, since it counts descriptors or is about the whole process.
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

    let before = open_fds();
    for serial in 2..CLIENTS {
        clients.push(Client::connect(address, serial).await);
    }
    // Whatever could be accepted would have been by the time that pings have gone to and fro.
    for _ in 0..2 {
        a.step().await.unwrap();
    }
    assert!(open_fds() - before <= clients.len() - 2, "none but the clients' own");
    assert_eq!(dispatcher.stats().dispatched, 2);

    for worker in [&mut a, &mut b] {
        worker.say(FromWorker::Demand { total: u64::from(CLIENTS) }).await;
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
fn it_is_known_that_nothing_is_accepted_without_descriptors() {
    const NAME: &str = "descriptors::it_is_known_that_nothing_is_accepted_without_descriptors";
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

/// If an offer took a descriptor, connections that hold all that there are would wait for each
/// other.
#[test]
fn a_hand_over_takes_no_descriptor() {
    alone("descriptors::a_hand_over_takes_no_descriptor", async {
        let (_directory, dispatcher) = with_worker().await;
        let (clients, accepted): (Vec<_>, Vec<_>) = connections(20).await.into_iter().unzip();
        limit_fds(3);
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok()));
        for client in clients {
            assert_ne!(client.answer().await, "");
        }
        limit_fds(1000); // to remove the directory takes one
    });
}

/// The application holds nearly all descriptors, and a worker does not answer: the others are
/// served all the same.
#[test]
fn accepting_goes_on_where_few_descriptors_are_left() {
    alone("descriptors::accepting_goes_on_where_few_descriptors_are_left", async {
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

/// Connections that nobody takes for the moment do not hold all descriptors: one is free for the
/// worker that will take them.
#[test]
fn a_worker_is_started_again_though_clients_wait() {
    const NAME: &str = "descriptors::a_worker_is_started_again_though_clients_wait";
    const CLIENTS: u32 = 100;
    alone(NAME, async {
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        for serial in 0..CLIENTS {
            clients.push(Client::connect(address, serial).await);
        }
        stop(pid).await;
        // A few are left to connections, and 16 to others.
        limit_fds(open_fds() as u64 + 26);
        let serving = dispatcher.serve(listener);
        let work = async {
            until("the reserve is reached", || dispatcher.stats().dispatched > 5).await;
            sleep(Duration::from_millis(200)).await; // for all that would be accepted
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

/// A thread for each would be as many as connections.
#[test]
fn connections_that_nobody_takes_are_closed_by_few_threads() {
    const CONNECTIONS: usize = 3000;
    alone("descriptors::connections_that_nobody_takes_are_closed_by_few_threads", async {
        let dispatcher = Dispatcher::builder().build();
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let (client, connection) = UnixStream::pair().unwrap();
            clients.push(client);
            drop(dispatcher.dispatch(connection)); // nobody waits for the outcome
        }
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

/// Of a connection that lingers: the last close would wait for its client.
#[test]
fn the_end_of_the_runtime_waits_for_no_connection() {
    const NAME: &str = "descriptors::the_end_of_the_runtime_waits_for_no_connection";
    if std::env::var("FDWIRE_ROLE").as_deref() != Ok(NAME) {
        return alone(NAME, async {});
    }
    for offered in [false, true] {
        let runtime = one_thread();
        let (client, worker) = runtime.block_on(async {
            let dispatcher = Dispatcher::builder().build();
            let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, offered.into()).await;
            let (client, accepted) = connections(1).await.pop().unwrap();
            let mut accepted = accepted.into_std().unwrap();
            accepted.set_nonblocking(false).unwrap();
            accepted.read_exact(&mut [0; 4]).unwrap(); // or it would be reset, and not linger
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
        let go_on = late_reader(client);
        drop(runtime);
        go_on().expect("a close blocked the end of the runtime");
        drop(worker);
    }
}

/// A client that reads nothing until the returned function is called, or until a close has blocked
/// for long, which is an error.
fn late_reader(mut client: net::TcpStream) -> impl FnOnce() -> Result<(), RecvTimeoutError> {
    client.set_nonblocking(false).unwrap();
    let (go_on, told) = std::sync::mpsc::channel();
    let client = std::thread::spawn(move || {
        let told = told.recv_timeout(Duration::from_secs(10));
        let _ = client.shutdown(Shutdown::Write);
        let _ = client.read_to_end(&mut Vec::new());
        told
    });
    move || {
        let _ = go_on.send(());
        client.join().unwrap()
    }
}

/// The worker has room for one at a time, and a listener that can't accept waits for a descriptor:
/// not in that place.
#[test]
fn a_listener_without_descriptors_leaves_its_place_to_others() {
    const NAME: &str = "descriptors::a_listener_without_descriptors_leaves_its_place_to_others";
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = Client::connect(listener.local_addr().unwrap(), 0).await;
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(10).await.into_iter().unzip();
        limit_fds(3);
        let serving = dispatcher.serve(listener);
        let work = async {
            sleep(Duration::from_millis(100)).await; // for the listener to try
            join_all(accepted.into_iter().map(|connection| dispatcher.dispatch(connection))).await
        };
        tokio::select! {
            outcome = serving => outcome.unwrap(),
            outcomes = work => assert!(outcomes.into_iter().all(|outcome| outcome.is_ok())),
        }
        limit_fds(1000);
    });
}

/// A dispatcher with a worker that is a process of its own, and so has descriptors when the
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

/// None can be opened with a number from this on.
fn limit_fds(limit: u64) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
}

/// A worker that was cut off, and may live on, holds copies of connections that another one serves.
/// The dispatcher's own are needed as long as these are served, and no longer.
#[test]
fn copies_are_kept_as_long_as_they_are_of_use() {
    alone("descriptors::copies_are_kept_as_long_as_they_are_of_use", async {
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut bad = Raw::start(&dispatcher, SocketKind::SeqPacket, 3).await;
        let (clients, accepted): (Vec<_>, Vec<_>) = connections(3).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let copies = bad.offers(3).await;
        bad.say(FromWorker::Adopted { first: 0, count: 4 }).await;
        bad.ended().await;

        let mut good = Raw::start(&dispatcher, SocketKind::SeqPacket, 3).await;
        let before = open_fds();
        let offers = good.offers(3).await;
        good.adopt(3).await;
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok()));
        assert_eq!(open_fds(), before + 3, "the good worker's; the dispatcher's own are kept");
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

/// A process that connects, leaves, and connects again is watched no longer than is of use.
#[test]
fn a_process_that_connects_again_and_again_leaves_nothing_behind() {
    const ROLE: &str = "descriptors::a_process_that_connects_again_and_again_leaves_nothing_behind";
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
                until("it has left", || dispatcher.stats().retired.drained == round).await;
            }
            // The listener's, and its lock.
            until("nothing is left of it", || open_fds() <= before + 2).await;
        };
        tokio::select! {
            () = accepting => unreachable!(),
            () = work => {}
        }
    });
}

/// Of a connection that lingers: the last close would wait for its client.
#[test]
fn copies_of_no_use_are_closed_without_blocking() {
    alone("descriptors::copies_of_no_use_are_closed_without_blocking", async {
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut bad = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let (client, accepted) = connections(1).await.pop().unwrap();
        let linger = libc::linger { l_onoff: 1, l_linger: 600 };
        setsockopt(&accepted, sockopt::Linger, &linger).unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let copies = bad.offers(1).await;
        bad.say(FromWorker::Adopted { first: 0, count: 2 }).await;
        bad.ended().await;
        let mut good = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let offer = good.offer().await.unwrap();
        good.adopt(1).await;
        outcome.await.unwrap();

        // It ends with unsent data, which the client takes when it is told to, or when the close
        // has blocked this thread.
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
