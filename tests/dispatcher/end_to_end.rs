//! Dispatcher and workers of this crate together, in processes of their own.

use std::{
    cell::Cell, collections::BTreeMap, convert::Infallible, fs::OpenOptions, io::Write,
    net::SocketAddr, path::Path, process::Stdio, time::Duration,
};

use fdwire::{
    Listener, SocketKind,
    handoff::{Connection, Dispatcher, Incoming, IncomingHandle, WorkerCommand, WorkerState},
};
use futures::{FutureExt, StreamExt, future::join_all, stream};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{
    Request, Response,
    body::Bytes,
    header::{CONNECTION, HOST, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    process::Command,
    time::{Instant, sleep_until},
};

use crate::{
    common::{KINDS, run},
    raw_worker::{Client, connections, served, served_by, stop, until},
};

const ROLE: &str = "end_to_end::worker_process";

/// Returns the command of a worker process, which logs the serial numbers that it serves.
pub(crate) fn command(log: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([ROLE, "--exact", "--nocapture"]).env("FDWIRE_ROLE", ROLE).env("FDWIRE_LOG", log);
    command.stdout(Stdio::null()).kill_on_drop(true);
    command
}

#[test]
fn worker_process() {
    if std::env::var("FDWIRE_ROLE").as_deref() != Ok(ROLE) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // The worker connects to a path, or has its link as standard input.
        let mut incoming = match std::env::var_os("FDWIRE_CONNECT") {
            Some(path) => Incoming::connect(path).await.unwrap(),
            None => Incoming::from_stdin().unwrap(),
        };
        if let Some(script) = std::env::var_os("FDWIRE_HELPER") {
            // The application starts a program, which by default inherits standard input.
            Command::new("sh").arg("-c").arg(script).spawn().unwrap();
        }
        // Each connection is served by a task. The worker ends when all of them have ended.
        let handle = incoming.handle();
        let is_http = std::env::var_os("FDWIRE_HTTP").is_some();
        while let Some(batch) = incoming.next_batch(16).await {
            for connection in batch {
                if is_http {
                    tokio::spawn(http_application(connection, handle.clone()));
                } else {
                    tokio::spawn(application(connection));
                }
            }
        }
        handle.ended().await;
    });
    std::process::exit(0);
}

/// Logs the client's serial number, and answers with the process id.
async fn application(mut connection: Connection) {
    let mut serial = [0; 4];
    if connection.read_exact(&mut serial).await.is_err() {
        return;
    }
    let pid = std::process::id();
    let log =
        OpenOptions::new().append(true).create(true).open(std::env::var_os("FDWIRE_LOG").unwrap());
    log.unwrap().write_all(format!("{} {pid}\n", u32::from_be_bytes(serial)).as_bytes()).unwrap();
    let _ = connection.write_all(pid.to_string().as_bytes()).await;
}

/// Answers requests with the process id. When the worker is to drain, it ends each connection with
/// its next answer.
async fn http_application(connection: Connection, handle: IncomingHandle) {
    let service = service_fn(|_request| {
        let is_draining = handle.drain_requested().now_or_never().is_some();
        let mut response = Response::new(Full::new(Bytes::from(std::process::id().to_string())));
        if is_draining {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        async { Ok::<_, Infallible>(response) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
}

/// Waits until this many workers are ready and have asked for connections.
pub(crate) async fn started(dispatcher: &Dispatcher, workers: usize) {
    until("the workers are ready", || {
        let stats = dispatcher.stats();
        stats
            .workers
            .iter()
            .filter(|worker| worker.state == WorkerState::Ready && worker.credit > 0)
            .count()
            == workers
    })
    .await;
}

#[test]
fn connections_are_served_and_the_workers_drain() {
    for kind in KINDS {
        run(async {
            // Two workers share the connections.
            let directory = tempfile::tempdir().unwrap();
            let log = directory.path().join("served");
            let dispatcher = Dispatcher::builder().build();
            for _ in 0..2 {
                dispatcher
                    .spawn_worker(WorkerCommand::from(command(&log)).socket_kind(kind))
                    .unwrap();
            }
            started(&dispatcher, 2).await;
            let (clients, accepted): (Vec<_>, Vec<_>) = connections(20).await.into_iter().unzip();
            let outcomes = Vec::from_iter(
                accepted.into_iter().map(|connection| dispatcher.dispatch(connection)),
            );
            for outcome in outcomes {
                outcome.await.unwrap();
            }
            let pids = BTreeMap::from_iter(
                dispatcher.stats().workers.iter().map(|worker| (worker.pid, worker.adopted)),
            );
            assert_eq!(Vec::from_iter(pids.values().copied()), [10, 10]);
            for client in clients {
                assert!(pids.contains_key(&client.answer().await.parse().ok()));
            }
            // A drain ends both, and each connection was served once.
            dispatcher.drain(None).await;
            assert_eq!(served_by(&log).len(), 20);
            assert_eq!(dispatcher.stats().retired.drained, 2);
        });
    }
}

#[test]
fn workers_may_connect_to_a_path() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (log, path) = (directory.path().join("served"), directory.path().join("front.sock"));
        let dispatcher = Dispatcher::builder().build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve_workers(listener).await }
        });
        let mut child = command(&log).env("FDWIRE_CONNECT", &path).spawn().unwrap();
        started(&dispatcher, 1).await;
        assert_eq!(dispatcher.stats().workers[0].pid, child.id());
        let (client, connection) = connections(1).await.pop().unwrap();
        dispatcher.dispatch(connection).await.unwrap();
        assert_eq!(client.answer().await, child.id().unwrap().to_string());
        dispatcher.drain(None).await;
        assert!(child.wait().await.unwrap().success());
        accepting.await.unwrap().unwrap();
    });
}

/// The numbers of the clients of a storm, by what became of them.
#[derive(Debug, Default)]
struct Storm {
    answered: Cell<u32>,
    cut: Cell<u32>,
}

/// Runs clients, 64 at a time, each of which has a connection and a serial number of its own.
async fn storm(address: SocketAddr, clients: u32) -> Storm {
    let storm = Storm::default();
    stream::iter(0..clients)
        .for_each_concurrent(64, |serial| {
            let storm = &storm;
            async move {
                let answer = Client::connect(address, serial).await.answer().await;
                let count = if answer.is_empty() { &storm.cut } else { &storm.answered };
                count.set(count.get() + 1);
            }
        })
        .await;
    storm
}

async fn listen() -> (TcpListener, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1024).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn a_storm_of_clients_loses_no_connection_while_workers_are_killed() {
    const CLIENTS: u32 = 20_000;
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        // All workers are killed, whatever they have. So many offers of a connection may fail.
        let dispatcher = Dispatcher::builder().max_offers(20).build();
        for kind in [SocketKind::SeqPacket, SocketKind::Stream, SocketKind::SeqPacket] {
            let worker = WorkerCommand::from(command(&log)).socket_kind(kind).restart(true);
            dispatcher.spawn_worker(worker.longest_wait(Duration::ZERO)).unwrap();
        }
        let (listener, address) = listen().await;
        let serving = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve(listener).await }
        });
        // One of the workers that are ready is killed every 50 ms.
        let mut random = std::num::Wrapping(std::process::id() as usize);
        let kills = Cell::new(0);
        let killing = async {
            let mut next = Instant::now();
            loop {
                next += Duration::from_millis(50);
                sleep_until(next).await;
                let ready = dispatcher
                    .stats()
                    .workers
                    .into_iter()
                    .filter(|worker| worker.state == WorkerState::Ready);
                let pids = Vec::from_iter(ready.filter_map(|worker| worker.pid));
                random = random * std::num::Wrapping(1_103_515_245) + std::num::Wrapping(12_345);
                if let Some(&pid) = pids.get((random.0 >> 16) % pids.len().max(1)) {
                    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
                    kills.set(kills.get() + 1);
                }
            }
        };
        let storm = tokio::select! {
            storm = storm(address, CLIENTS) => storm,
            () = killing => unreachable!(),
        };
        // Every connection is adopted once. A client may have its answer before the dispatcher has
        // received that of the worker.
        until("all are adopted", || dispatcher.stats().adopted == u64::from(CLIENTS)).await;
        let stats = dispatcher.stats();
        println!("{} kills, {storm:?}, {stats:?}", kills.get());
        assert_eq!(stats.dispatched, u64::from(CLIENTS));
        assert_eq!((stats.lost, stats.given_back), (0, 0));
        let served = served_by(&log); // fails if a client was served twice
        // A client without an answer was adopted by a worker that was killed.
        assert!(served.len() as u32 >= storm.answered.get());
        assert_eq!(storm.answered.get() + storm.cut.get(), CLIENTS);
        assert!(stats.retired.ended > 0);
        dispatcher.drain(None).await;
        serving.await.unwrap().unwrap();
    });
}

#[test]
fn every_worker_is_replaced_under_load_and_no_client_notices() {
    const CLIENTS: u32 = 3000;
    run(async {
        // Three workers serve.
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        let dispatcher = Dispatcher::builder().build();
        for _ in 0..3 {
            dispatcher.spawn_worker(command(&log)).unwrap();
        }
        started(&dispatcher, 3).await;
        let (listener, address) = listen().await;
        let serving = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve(listener).await }
        });
        // While clients connect, each of them is replaced by a new one.
        let replacing = async {
            let old = dispatcher.stats().workers;
            for worker in &old {
                let before = served(&log).len();
                dispatcher.spawn_worker(command(&log)).unwrap();
                assert!(dispatcher.remove_worker(worker.id, Some(Duration::from_secs(30))).await);
                until("the load goes on", || served(&log).len() > before).await;
            }
            old
        };
        // All clients were served, and none of the old workers is left.
        let (old, storm) = tokio::join!(replacing, storm(address, CLIENTS));
        assert_eq!((storm.answered.get(), storm.cut.get()), (CLIENTS, 0));
        assert_eq!(served_by(&log).len() as u32, CLIENTS);
        let stats = dispatcher.stats();
        assert_eq!(stats.retired.drained, 3);
        assert!(stats.workers.iter().all(|worker| old.iter().all(|old| old.id != worker.id)));
        dispatcher.drain(Some(Duration::from_secs(30))).await;
        serving.await.unwrap().unwrap();
    });
}

/// Sends requests one after the other, on one connection as long as the answers allow it, and then
/// on a new one.
async fn keep_alive_client(address: SocketAddr, requests: u32) {
    let mut left = requests;
    while left > 0 {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut client, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut last = false;
        while left > 0 && !last {
            client.ready().await.unwrap();
            let request =
                Request::get("/").header(HOST, "localhost").body(Empty::<Bytes>::new()).unwrap();
            let response = client.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            last = response.headers().get(CONNECTION).is_some_and(|value| value == "close");
            response.into_body().collect().await.unwrap();
            left -= 1;
        }
        drop(client);
        connection.await.unwrap().unwrap();
    }
}

#[test]
fn every_worker_is_replaced_while_clients_keep_their_connections_alive() {
    run(async {
        // Three workers serve HTTP.
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        let http = || {
            let mut command = command(&log);
            command.env("FDWIRE_HTTP", "1");
            command
        };
        let dispatcher = Dispatcher::builder().build();
        for _ in 0..3 {
            dispatcher.spawn_worker(http()).unwrap();
        }
        started(&dispatcher, 3).await;
        let (listener, address) = listen().await;
        let serving = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve(listener).await }
        });
        // Clients send requests until all workers are replaced.
        let done = Cell::new(false);
        let clients = join_all((0..16).map(async |_| {
            while !done.get() {
                keep_alive_client(address, 50).await;
            }
        }));
        let replacing = async {
            for worker in dispatcher.stats().workers {
                dispatcher.spawn_worker(http()).unwrap();
                assert!(dispatcher.remove_worker(worker.id, Some(Duration::from_secs(30))).await);
            }
            done.set(true);
        };
        tokio::join!(clients, replacing);
        // Each worker has drained in time.
        let retired = dispatcher.stats().retired;
        assert_eq!((retired.drained, retired.overdue, retired.ended), (3, 0, 0));
        dispatcher.drain(Some(Duration::from_secs(30))).await;
        serving.await.unwrap().unwrap();
    });
}

#[test]
fn a_stopped_worker_is_killed_and_started_again() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(100))
            .hang_timeout(Duration::from_secs(2))
            .build();
        dispatcher.spawn_worker(WorkerCommand::from(command(&log)).restart(true)).unwrap();
        started(&dispatcher, 1).await;
        let pid = dispatcher.stats().workers[0].pid.unwrap();
        stop(Pid::from_raw(pid as i32)).await;
        let (clients, accepted): (Vec<_>, Vec<_>) = connections(10).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        for outcome in outcomes {
            outcome.await.unwrap();
        }
        let other = dispatcher.stats().workers[0].pid.unwrap().to_string();
        assert_ne!(other, pid.to_string());
        for client in clients {
            assert_eq!(client.answer().await, other);
        }
        assert_eq!(dispatcher.stats().retired.hung, 1);
    });
}

#[test]
fn a_connection_kept_alive_is_cut_at_the_deadline_of_a_drain() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        let dispatcher = Dispatcher::builder().build();
        dispatcher.spawn_worker(command(&log)).unwrap();
        started(&dispatcher, 1).await;
        let (listener, address) = listen().await;
        // The application waits for the client's serial number, which does not come.
        let mut silent = TcpStream::connect(address).await.unwrap();
        dispatcher.dispatch(listener.accept().await.unwrap().0).await.unwrap();
        let pid = Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32);
        dispatcher.drain(Some(Duration::from_millis(300))).await;
        assert_eq!(dispatcher.stats().retired.overdue, 1);
        assert!(kill(pid, None).is_err(), "the worker was killed and reaped");
        assert_eq!(silent.read_to_end(&mut Vec::new()).await.unwrap_or(0), 0);
    });
}

/// The dispatcher does not kill the worker. The worker itself finds out that its link has ended.
#[test]
fn a_stopped_worker_that_goes_on_leaves_its_connections_to_others() {
    for kind in KINDS {
        run(async {
            // A worker is stopped, and gets offers.
            let directory = tempfile::tempdir().unwrap();
            let log = directory.path().join("served");
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(100))
                .hang_timeout(Duration::from_secs(2))
                .kill_hung(false)
                .build();
            let spawn = || {
                dispatcher
                    .spawn_worker(WorkerCommand::from(command(&log)).socket_kind(kind))
                    .unwrap()
            };
            spawn();
            started(&dispatcher, 1).await;
            let first = Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32);
            stop(first).await;
            let (listener, address) = listen().await;
            let (mut clients, mut outcomes) = (Vec::new(), Vec::new());
            for _ in 0..10 {
                clients.push(TcpStream::connect(address).await.unwrap());
                outcomes.push(dispatcher.dispatch(listener.accept().await.unwrap().0));
            }
            // The worker is cut off, and a second one adopts all connections.
            until("the worker was cut off", || dispatcher.stats().retired.hung == 1).await;
            let second = spawn();
            assert!(
                join_all(outcomes)
                    .await
                    .into_iter()
                    .all(|outcome| outcome.is_ok_and(|worker| worker == second))
            );
            let workers = dispatcher.stats().workers;
            let second = workers.iter().find(|worker| worker.id == second).unwrap().pid.unwrap();

            // The first worker goes on and ends, before the clients send their serial numbers.
            kill(first, Signal::SIGCONT).unwrap();
            until("the worker has ended", || kill(first, None).is_err()).await;
            for (serial, mut client) in clients.into_iter().enumerate() {
                client.write_all(&(serial as u32).to_be_bytes()).await.unwrap();
                assert_eq!(Client(client).answer().await, second.to_string());
            }
            assert_eq!(served_by(&log), (0..10).map(|serial| (serial, second)).collect());
        });
    }
}
