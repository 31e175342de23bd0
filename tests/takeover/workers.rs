//! A server that is the dispatcher of a hand-off is replaced while its workers go on.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use fdwire::{
    Socket, SocketKind,
    handoff::{Dispatcher, Incoming, IncomingHandle, WorkerState},
    takeover::{Finished, Options, Pending, Phase, Server},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::{address, common::*, control_path, first_with, request};

/// A server whose connections are served by workers.
struct Front {
    server: Arc<Server>,
    dispatcher: Dispatcher,
    tasks: Vec<JoinHandle<()>>,
}

impl Front {
    fn new(server: Server) -> Self {
        let (server, dispatcher) = (Arc::new(server), Dispatcher::builder().build());
        server.keep_workers(&dispatcher, |_| None).unwrap();
        let http = server.gated::<TcpListener>("http", 0).unwrap();
        let accepting = dispatcher.clone();
        let accepting = tokio::spawn(async move { http.dispatch_to(&accepting).await.unwrap() });
        Self { server, dispatcher, tasks: vec![accepting] }
    }

    fn first(path: &Path) -> Self {
        Self::new(first_with(path, options()))
    }

    async fn next(path: &Path) -> Self {
        Self::new(request(path).await.ready().await.unwrap())
    }

    async fn has_workers(&self, workers: usize) {
        loop {
            let of = self.dispatcher.stats().workers;
            let is_ready = |state| state == WorkerState::Ready;
            let ready = of.iter().filter(|worker| is_ready(worker.state) && worker.credit > 0);
            if ready.count() == workers {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Leaves after it was replaced.
    async fn leave(self) -> Finished {
        let finished = self.server.finish().await;
        self.dispatcher.drain(None).await;
        for task in self.tasks {
            task.await.unwrap();
        }
        let stats = self.dispatcher.stats();
        assert_eq!((stats.lost, stats.given_back), (0, 0), "{stats:?}");
        finished
    }
}

fn options() -> Options {
    Options::default().drain(Duration::from_millis(300), Duration::from_secs(10))
}

/// A front with one worker, which is ready and answers "a".
struct WithWorker {
    _directory: TempDir,
    path: PathBuf,
    front: Front,
    address: SocketAddr,
    worker: IncomingHandle,
}

impl WithWorker {
    async fn start() -> Self {
        let (directory, path) = control_path();
        let front = Front::first(&path);
        let (address, worker) = (address(&front.server), worker(&front.dispatcher, "a"));
        front.has_workers(1).await;
        Self { _directory: directory, path, front, address, worker }
    }

    /// Checks that the worker serves with this front, and has got no DRAIN.
    async fn check_worker_serves(&self) {
        assert_eq!(answer(self.address).await, "a");
        assert!(!self.worker.is_draining());
    }
}

/// Adds a worker that answers each connection with its name.
fn worker(dispatcher: &Dispatcher, name: &'static str) -> IncomingHandle {
    let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
    dispatcher.add_worker(dispatcher_end);
    let mut incoming = Incoming::new(worker_end);
    let handle = incoming.handle();
    tokio::spawn(async move {
        while let Some(mut connection) = incoming.next().await {
            tokio::spawn(async move { connection.write_all(name.as_bytes()).await });
        }
    });
    handle
}

async fn answer(address: SocketAddr) -> String {
    let mut answer = String::new();
    let mut client = TcpStream::connect(address).await.unwrap();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Starts clients one after the other. The task ends when one of them is not answered.
fn load(address: SocketAddr) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            assert_ne!(answer(address).await, "");
        }
    })
}

#[test]
fn workers_go_on_through_many_generations_and_no_client_notices() {
    run(async {
        let (_directory, path) = control_path();
        let mut front = Front::first(&path);
        let address = address(&front.server);
        let workers = ["a", "b"].map(|name| worker(&front.dispatcher, name));
        front.has_workers(2).await;
        let loads = [(); 8].map(|()| load(address));
        let mut leaving = Vec::new();
        for _ in 0..5 {
            let next = Front::next(&path).await;
            next.has_workers(2).await;
            assert!(!answer(address).await.is_empty());
            leaving.push(tokio::spawn(std::mem::replace(&mut front, next).leave()));
        }
        for leaving in leaving {
            leaving.await.unwrap();
        }
        front.has_workers(2).await;
        for load in loads {
            assert!(!load.is_finished(), "a client was not answered");
            load.abort();
        }
        assert!(workers.iter().all(|worker| !worker.is_draining()));
        assert_eq!(front.dispatcher.stats().lost, 0);
    });
}

/// The new process ends after it has served for a moment.
#[test]
fn workers_come_back_when_the_takeover_is_undone() {
    run(async {
        let setup = WithWorker::start().await;
        let (path, front) = (&setup.path, &setup.front);
        for _ in 0..3 {
            let next = Front::next(path).await;
            next.has_workers(1).await;
            assert_eq!(answer(setup.address).await, "a");
            assert_eq!(front.server.phase(), Phase::Draining);
            next.tasks.iter().for_each(JoinHandle::abort);
            drop(next);
            assert!(front.server.undone().await);
            front.has_workers(1).await;
            setup.check_worker_serves().await;
        }
    });
}

#[test]
fn workers_are_given_back_together_with_the_listeners() {
    run(async {
        let setup = WithWorker::start().await;
        let (path, front) = (&setup.path, &setup.front);
        let load = load(setup.address);
        for _ in 0..3 {
            let next = Front::next(path).await;
            next.has_workers(1).await;
            next.server.hand_back(Bytes::new()).await.unwrap();
            front.has_workers(1).await;
            next.leave().await;
            setup.check_worker_serves().await;
        }
        assert!(!load.is_finished(), "a client was not answered");
        load.abort();
    });
}

/// Until a new process is ready, nothing has changed.
#[test]
fn a_process_that_is_never_ready_takes_no_worker() {
    run(async {
        let setup = WithWorker::start().await;
        let (path, front) = (&setup.path, &setup.front);
        let pending: Pending = request(path).await;
        assert_eq!(answer(setup.address).await, "a");
        drop(pending);
        front.has_workers(1).await;
        setup.check_worker_serves().await;
        assert_eq!(front.dispatcher.stats().workers.len(), 1);
    });
}
