//! A worker built from the codec, whose every message is up to the test, and clients with serial
//! numbers.

use std::{
    collections::BTreeMap,
    fs::{DirEntry, OpenOptions},
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Stdio,
    time::Duration,
};

use fdwire::{
    Framed, Socket, SocketKind,
    handoff::{
        Dispatcher, WorkerId, WorkerState,
        protocol::{FromWorker, Offer, RejectReason, ToWorker, VERSION, WorkerCodec},
    },
};
use futures::{SinkExt, StreamExt};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill, raise},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    time::sleep,
};

use crate::common::{encoded, raw_send, role_socket, run};

/// A worker in this process.
pub(crate) struct Raw {
    pub(crate) id: WorkerId,
    pub(crate) framed: Framed<WorkerCodec>,
    pub(crate) recalled: u64,
    /// The number of offers that it has answered.
    pub(crate) answered: u64,
    /// True after a DRAIN has come.
    pub(crate) drain_requested: bool,
    answer_pings: bool,
}

impl Raw {
    /// Adds a worker that sends HELLO and asks for `demand` offers. Waits until the dispatcher has
    /// received both messages.
    pub(crate) async fn start(dispatcher: &Dispatcher, kind: SocketKind, demand: u64) -> Self {
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        let id = dispatcher.add_worker(dispatcher_end);
        let mut framed = Framed::new(worker_end, WorkerCodec::default());
        greet(&mut framed, demand).await;
        let raw = Self::after_greeting(id, framed);
        until("the demand was received", || {
            let workers = dispatcher.stats().workers;
            let worker =
                workers.iter().find(|worker| worker.id == id).expect("the worker is listed");
            match worker.state {
                // On a busy machine it may be late with its first PONG already.
                WorkerState::Silent => true,
                WorkerState::Ready => worker.credit + worker.unanswered > 0 || demand == 0,
                _ => demand == 0,
            }
        })
        .await;
        raw
    }

    /// Makes a worker of a link whose greeting is done.
    pub(crate) fn after_greeting(id: WorkerId, framed: Framed<WorkerCodec>) -> Self {
        Self { id, framed, recalled: 0, answered: 0, drain_requested: false, answer_pings: true }
    }

    pub(crate) async fn send(&mut self, message: FromWorker) {
        self.framed.send(message).await.unwrap();
    }

    pub(crate) async fn adopt(&mut self, count: u32) {
        let first = self.take_numbers(count);
        self.send(FromWorker::Adopted { first, count }).await;
    }

    pub(crate) async fn reject(&mut self, count: u32, reason: RejectReason) {
        let first = self.take_numbers(count);
        self.send(FromWorker::Rejected { first, count, reason }).await;
    }

    /// Counts the next `count` offers as answered. Returns the number of the first.
    pub(crate) fn take_numbers(&mut self, count: u32) -> u64 {
        self.answered += u64::from(count);
        self.answered - u64::from(count)
    }

    /// Receives until the next offer, as [`step`](Self::step) does. Returns `None` at the end of
    /// the link.
    pub(crate) async fn offer(&mut self) -> Option<Offer> {
        loop {
            if let ToWorker::Offer { offer, .. } = self.step().await? {
                return Some(offer);
            }
        }
    }

    /// Receives the next message. Answers a PING, unless the worker is to be silent, and notes a
    /// RECALL or DRAIN. Returns `None` at the end of the link.
    pub(crate) async fn step(&mut self) -> Option<ToWorker> {
        let message = self.framed.next().await?.ok()?;
        match message {
            ToWorker::Ping { nonce } if self.answer_pings => {
                let _ = self.framed.send(FromWorker::Pong { nonce }).await;
            }
            ToWorker::Recall { before } => self.recalled = before,
            ToWorker::Drain { .. } => self.drain_requested = true,
            _ => {}
        }
        Some(message)
    }

    pub(crate) async fn offers(&mut self, count: usize) -> Vec<Offer> {
        let mut offers = Vec::new();
        while offers.len() < count {
            offers.push(self.offer().await.expect("an offer"));
        }
        offers
    }

    /// Receives until a DRAIN has come.
    pub(crate) async fn wait_for_drain(&mut self) {
        while !self.drain_requested {
            self.step().await.unwrap();
        }
    }

    /// Waits for a DRAIN, and then leaves in order.
    pub(crate) async fn leave(&mut self) {
        self.wait_for_drain().await;
        self.send(FromWorker::Goodbye).await;
        self.ended().await;
    }

    /// Waits until the dispatcher has closed the link.
    pub(crate) async fn ended(&mut self) {
        while self.step().await.is_some() {}
    }
}

/// Greets as a worker does, and asks for `demand` offers.
pub(crate) async fn greet(framed: &mut Framed<WorkerCodec>, demand: u64) {
    let hello = FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 1, open: None };
    framed.send(hello).await.unwrap();
    assert!(matches!(framed.next().await, Some(Ok(ToWorker::Welcome { version: VERSION }))));
    framed.send(FromWorker::Demand { total: demand }).await.unwrap();
}

/// The payload of a HELLO frame.
pub(crate) const HELLO: &[u8] = b"\x01FDHO\x01\x01\x01";

/// Returns the frame of an ADOPTED.
pub(crate) fn adopted(first: u64, count: u32) -> Vec<u8> {
    encoded(&[&[3][..], &first.to_be_bytes(), &count.to_be_bytes()].concat(), 0)
}

/// Serves a connection as the application of a worker: reads the client's serial number and answers
/// with a name. Returns both the number and the connection, which is still open.
pub(crate) fn serve(offer: Offer, name: &str) -> io::Result<(u32, std::net::TcpStream)> {
    let mut stream = std::net::TcpStream::from(offer.fd);
    stream.set_nonblocking(false)?;
    let mut serial = [0; 4];
    let (read, rest) = serial.split_at_mut(offer.prefix.len().min(4));
    read.copy_from_slice(&offer.prefix);
    stream.read_exact(rest)?;
    stream.write_all(name.as_bytes())?;
    Ok((u32::from_be_bytes(serial), stream))
}

/// A client that has sent its serial number.
pub(crate) struct Client(pub(crate) TcpStream);

impl Client {
    pub(crate) async fn connect(address: SocketAddr, serial: u32) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&serial.to_be_bytes()).await.unwrap();
        Self(stream)
    }

    /// Reads the answer until the connection ends or is reset.
    pub(crate) async fn answer(mut self) -> String {
        let mut answer = Vec::new();
        let _ = self.0.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    /// Reads the first part of the answer.
    pub(crate) async fn first(&mut self) -> String {
        let mut answer = [0; 64];
        let count = self.0.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..count]).into_owned()
    }
}

/// Connects clients with serial numbers from 0. Returns them with their accepted connections.
pub(crate) async fn connections(count: u32) -> Vec<(Client, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut connections = Vec::new();
    for serial in 0..count {
        let (client, accepted) = tokio::join!(Client::connect(address, serial), listener.accept());
        connections.push((client, accepted.unwrap().0));
    }
    connections
}

/// Waits until a condition is true of which no event informs the test. If it does not become true,
/// fails with `what`, a sentence that should be true by then.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(30), wait).await.is_err() {
        panic!("by now, {what}");
    }
}

/// Stops a process and waits until all its threads have stopped. Each stops when it gets to run
/// next, and `kill` does not wait for that.
pub(crate) async fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let is_stopped = |task: io::Result<DirEntry>| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        status.contains("State:\tT")
    };
    until("the process has stopped", || {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(is_stopped)
    })
    .await;
}

/// The point at which a worker process stops, after it has asked for [`DEMAND`] connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    BeforeReading,
    BeforeAnswering,
    /// Half of the frame that adopts [`ADOPTED`] connections is written. Only for STREAM.
    InAnswer,
    AfterAnswering,
    /// The process serves everything.
    Never,
    /// The process goes on, but can open no descriptor.
    OutOfDescriptors,
}

pub(crate) const DEMAND: u64 = 4;
pub(crate) const ADOPTED: u32 = 2;

const ROLE: &str = "raw_worker::worker_process";

/// Returns the command of a worker process. The process sends itself `signal` at `point`, and logs
/// the serial numbers that it serves.
pub(crate) fn worker_command(point: Point, signal: Signal, log: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([ROLE, "--exact", "--nocapture"])
        .env("FDWIRE_ROLE", ROLE)
        .env("FDWIRE_POINT", format!("{point:?}"));
    command
        .env("FDWIRE_SIGNAL", signal.as_str())
        .env("FDWIRE_LOG", log)
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Reads the log: the serial numbers, and the process that has served each, in their order.
pub(crate) fn served(log: &Path) -> Vec<(u32, u32)> {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let numbers = |line: &str| {
        line.split_once(' ').map(|(serial, pid)| (serial.parse().unwrap(), pid.parse().unwrap()))
    };
    log.lines().filter_map(numbers).collect()
}

/// Reads the log as a map from serial number to process. Fails if a number was served twice.
pub(crate) fn served_by(log: &Path) -> BTreeMap<u32, u32> {
    let served = served(log);
    let by_serial = BTreeMap::from_iter(served.iter().copied());
    assert_eq!(by_serial.len(), served.len(), "served twice: {served:?}");
    by_serial
}

/// Is the worker process, which a dispatcher starts with [`worker_command`].
#[test]
fn worker_process() {
    let Some(socket) = role_socket(ROLE) else { return };
    let point = std::env::var("FDWIRE_POINT").unwrap();
    let point = [
        Point::BeforeReading,
        Point::BeforeAnswering,
        Point::InAnswer,
        Point::AfterAnswering,
        Point::Never,
        Point::OutOfDescriptors,
    ]
    .into_iter()
    .find(|candidate| format!("{candidate:?}") == point)
    .unwrap();
    let signal: Signal = std::env::var("FDWIRE_SIGNAL").unwrap().parse().unwrap();
    run(work(socket, point, signal));
    std::process::exit(0);
}

async fn work(socket: OwnedFd, point: Point, signal: Signal) {
    // The worker greets, and stops here if its point is before reading.
    let raw = socket.try_clone().unwrap();
    let mut framed = Framed::new(Socket::try_from(socket).unwrap(), WorkerCodec::default());
    let demand = if point == Point::Never { 1000 } else { DEMAND };
    greet(&mut framed, demand).await;
    match point {
        Point::BeforeReading => {
            poll(&mut [PollFd::new(raw.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            raise(signal).unwrap();
        }
        Point::OutOfDescriptors => setrlimit(Resource::RLIMIT_NOFILE, 3, 3).unwrap(),
        _ => {}
    }

    // Messages are received until the dispatcher closes the link.
    let mut offers = Vec::new();
    let mut serving = Vec::new();
    while let Some(Ok(message)) = framed.next().await {
        match message {
            ToWorker::Ping { nonce } => {
                // After a stop, the dispatcher may have fenced this worker.
                let _ = framed.send(FromWorker::Pong { nonce }).await;
            }
            ToWorker::Offer { offer, .. } => offers.push(offer),
            _ => {}
        }
        // The worker serves each offer, or stops when all its offers have come.
        match point {
            Point::Never => {
                for offer in offers.drain(..) {
                    // The answer comes first: without it, another worker gets the connection.
                    let first = serving.len() as u64;
                    if framed.send(FromWorker::Adopted { first, count: 1 }).await.is_ok() {
                        serving.push(application(offer));
                    }
                }
            }
            _ if offers.len() as u64 == DEMAND => {
                let answer = adopted(0, ADOPTED);
                match point {
                    Point::InAnswer => raw_send(&raw, &answer[..answer.len() / 2], &[]),
                    Point::AfterAnswering => raw_send(&raw, &answer, &[]),
                    _ => {}
                }
                if point != Point::BeforeReading {
                    raise(signal).unwrap();
                }
                // A process that was only stopped goes on like any worker: the answer comes first.
                let mine = if point == Point::AfterAnswering { ADOPTED as usize } else { 0 };
                let adopt = FromWorker::Adopted { first: mine as u64, count: ADOPTED };
                let answered = framed.send(adopt).await.is_ok();
                let mine = mine + if answered { ADOPTED as usize } else { 0 };
                serving.extend(offers.drain(..mine.min(offers.len())).map(application));
                offers.clear();
            }
            _ => {}
        }
    }
}

/// Logs and serves a connection. Returns it; with `FDWIRE_KEEP`, it is not shut down.
fn application(offer: Offer) -> io::Result<std::net::TcpStream> {
    let pid = std::process::id();
    let (serial, stream) = serve(offer, &pid.to_string())?;
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(std::env::var_os("FDWIRE_LOG").unwrap())?;
    log.write_all(format!("{serial} {pid}\n").as_bytes())?;
    if std::env::var_os("FDWIRE_KEEP").is_none() {
        stream.shutdown(Shutdown::Both)?;
    }
    Ok(stream)
}
