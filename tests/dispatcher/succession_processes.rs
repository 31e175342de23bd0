//! Dispatchers in processes of their own, which replace each other under load while their workers
//! go on. The test sends them commands, and passes the frames of one to the other.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use fdwire::{
    Frame, FrameCodec, Framed, Socket, SocketKind,
    handoff::{Dispatcher, Succession, WorkerCommand},
};
use futures::{SinkExt, StreamExt};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    common::run,
    end_to_end::command as worker_command,
    raw_worker::{served, served_by, stop, until},
};

const ROLE: &str = "succession_processes::front_process";
const WORKERS: usize = 2;

/// The environment variable with the time in milliseconds after which a worker counts as hung.
const HANG_TIMEOUT: &str = "FDWIRE_HANG_TIMEOUT";

/// A dispatcher in a process of its own. It answers each command of the test with frames, the last
/// of which is empty.
struct Front {
    process: Child,
    framed: Framed<FrameCodec>,
}

impl Front {
    async fn start(setup: &Setup) -> Self {
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut command = Command::new("/proc/self/exe");
        command
            .args([ROLE, "--exact", "--nocapture"])
            .env("FDWIRE_ROLE", ROLE)
            .env("FDWIRE_LOG", &setup.log)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .kill_on_drop(true);
        if let Some(timeout) = setup.hang_timeout {
            command.env(HANG_TIMEOUT, timeout.as_millis().to_string());
        }
        let process = command.spawn().unwrap();
        drop(command); // the command has the other end of the pair
        let mut this = Self { process, framed: Framed::new(ours, FrameCodec::default()) };
        let listener = setup.listener.try_clone().unwrap();
        this.send_frame(Frame::new("listen").with_fd(OwnedFd::from(listener))).await.unwrap();
        this
    }

    /// Sends a command. Returns the answers of the process, or `None` if it has died.
    async fn send(&mut self, command: &'static str) -> Option<Vec<Frame>> {
        self.send_frame(Frame::new(command)).await
    }

    async fn send_frame(&mut self, command: Frame) -> Option<Vec<Frame>> {
        self.framed.send(command).await.ok()?;
        let mut answers = Vec::new();
        loop {
            let answer = self.framed.next().await?.ok()?;
            if answer.payload.is_empty() {
                return Some(answers);
            }
            answers.push(answer);
        }
    }

    async fn take(&mut self, frames: Vec<Frame>) -> Option<()> {
        for frame in frames {
            self.framed.send(frame).await.ok()?;
        }
        self.send("take").await.map(drop)
    }

    async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().expect("it runs") as i32)
    }
}

#[test]
fn front_process() {
    if std::env::var("FDWIRE_ROLE").as_deref() != Ok(ROLE) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(front());
    drop(runtime);
    std::process::exit(0);
}

/// The accept loop, while this process serves.
struct Accepting {
    dispatcher: Dispatcher,
    listener: std::net::TcpListener,
    task: Option<JoinHandle<()>>,
}

impl Accepting {
    fn start(&mut self) {
        let (dispatcher, listener) = (self.dispatcher.clone(), self.listener.try_clone().unwrap());
        self.task = Some(tokio::spawn(async move { dispatcher.serve(listener).await.unwrap() }));
    }

    async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

/// Runs each command of the test, until the test closes the socket.
async fn front() {
    let mut framed = Framed::new(Socket::from_stdin().unwrap(), FrameCodec::default());
    let log = PathBuf::from(std::env::var_os("FDWIRE_LOG").unwrap());
    let command = || WorkerCommand::from(worker_command(&log)).restart(true);
    let hang_timeout = std::env::var(HANG_TIMEOUT)
        .map_or(Duration::MAX, |milliseconds| Duration::from_millis(milliseconds.parse().unwrap()));
    let dispatcher = Dispatcher::builder()
        .ping_interval(Duration::from_millis(200))
        .hang_timeout(hang_timeout)
        .build();
    // Each command is a frame. A frame that is no command is one of a succession, and is kept for
    // the command "take".
    let mut accepting: Option<Accepting> = None;
    let mut succession: Option<Succession> = None;
    let mut frames = Vec::new();
    while let Some(Ok(mut frame)) = framed.next().await {
        let command_name = String::from_utf8_lossy(&frame.payload).into_owned();
        match command_name.as_str() {
            "listen" => {
                let listener = frame.fds.pop().unwrap().into();
                let dispatcher = dispatcher.clone();
                accepting = Some(Accepting { dispatcher, listener, task: None });
            }
            "spawn" => {
                for _ in 0..WORKERS {
                    dispatcher.spawn_worker(command()).unwrap();
                }
                accepting.as_mut().unwrap().start();
            }
            "prepare" => {
                let (prepared, frames) = dispatcher.prepare_succession().unwrap();
                succession = Some(prepared);
                for frame in frames {
                    framed.send(frame).await.unwrap();
                }
            }
            "begin" => {
                accepting.as_mut().unwrap().stop().await;
                succession.as_mut().unwrap().begin();
            }
            "undo" => {
                succession.as_mut().unwrap().undo();
                accepting.as_mut().unwrap().start();
            }
            "take" => {
                let frames = std::mem::take(&mut frames);
                dispatcher.take_workers(frames, |_| Some(command())).unwrap();
                accepting.as_mut().unwrap().start();
            }
            "leave" => {
                drop(accepting.take());
                dispatcher.drain(Some(Duration::from_secs(10))).await;
                let stats = dispatcher.stats();
                assert_eq!((stats.lost, stats.given_back), (0, 0), "{stats:?}");
            }
            "pids" => {
                for worker in dispatcher.stats().workers {
                    let pid = worker.pid.unwrap_or(0);
                    let answer = format!("{:?} {pid} {:?}", worker.state, worker.retired);
                    framed.send(Frame::new(answer)).await.unwrap();
                }
            }
            _ => {
                frames.push(frame);
                continue;
            }
        }
        framed.send(Frame::new("")).await.unwrap();
        if command_name == "leave" {
            break;
        }
    }
}

/// Returns the process ids of a dispatcher's workers that are ready.
async fn pids(front: &mut Front) -> BTreeSet<u32> {
    let answers = front.send("pids").await.unwrap();
    let ready = answers.iter().filter_map(|answer| {
        let answer = std::str::from_utf8(&answer.payload).unwrap();
        let mut words = answer.split(' ');
        let is_ready = words.next() == Some("Ready");
        is_ready.then(|| words.next().unwrap().parse().unwrap())
    });
    ready.collect()
}

/// Waits until all workers are ready. Returns their process ids.
async fn ready_pids(front: &mut Front) -> BTreeSet<u32> {
    loop {
        let pids = pids(front).await;
        if pids.len() == WORKERS {
            return pids;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

/// Sixteen clients, each of which sends one request after the other until they are stopped.
struct Load {
    stops: Arc<AtomicBool>,
    answered: Arc<AtomicU32>,
    failed: Arc<AtomicU32>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (stops, serial) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (answered, failed) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let client = |_| {
            let (stops, serial) = (Arc::clone(&stops), Arc::clone(&serial));
            let (answered, failed) = (Arc::clone(&answered), Arc::clone(&failed));
            tokio::spawn(async move {
                while !stops.load(Relaxed) {
                    let serial = serial.fetch_add(1, Relaxed);
                    let is_answered = request(address, serial).await;
                    let count = if is_answered { &answered } else { &failed };
                    count.fetch_add(1, Relaxed);
                }
            })
        };
        let tasks = (0..16).map(client).collect();
        Self { stops, answered, failed, tasks }
    }

    /// Waits until this many more requests were answered.
    async fn goes_on(&self, requests: u32) {
        let before = self.answered.load(Relaxed);
        until("requests are answered", || self.answered.load(Relaxed) >= before + requests).await;
    }

    /// Stops the clients. Returns how many requests were answered, and how many have failed.
    async fn stop(self) -> (u32, u32) {
        self.stops.store(true, Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        (self.answered.load(Relaxed), self.failed.load(Relaxed))
    }
}

/// Sends a request. Returns true if it is answered. A connection that does not end counts as failed
/// after a while.
async fn request(address: SocketAddr, serial: u32) -> bool {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.write_all(&serial.to_be_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        (!answer.is_empty()).then_some(())
    };
    timeout(Duration::from_secs(20), exchange).await.is_ok_and(|answer| answer.is_some())
}

/// The parts of a test that all its dispatchers share.
struct Setup {
    _directory: TempDir,
    /// The file where the workers log what they have served.
    log: PathBuf,
    listener: std::net::TcpListener,
    address: SocketAddr,
    /// If it is not set, no worker counts as hung, however busy the machine is.
    hang_timeout: Option<Duration>,
}

impl Setup {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("served");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap().into_std().unwrap();
        let address = listener.local_addr().unwrap();
        Self { _directory: directory, log, listener, address, hang_timeout: None }
    }

    /// Starts the first dispatcher, with its workers. Returns their process ids as well.
    async fn first(&self) -> (Front, BTreeSet<u32>) {
        let mut front = Front::start(self).await;
        front.send("spawn").await.unwrap();
        let workers = ready_pids(&mut front).await;
        (front, workers)
    }

    /// Starts another dispatcher, which takes the workers of `front`. The workers move only when
    /// `front` gets "begin".
    async fn next(&self, front: &mut Front) -> Front {
        let mut next = Front::start(self).await;
        let frames = front.send("prepare").await.unwrap();
        assert_eq!(frames.len(), 1 + WORKERS);
        next.take(frames).await.unwrap();
        next
    }
}

/// A worker's command kills its process when the dispatcher is dropped. That must not happen to a
/// worker that has moved.
///
/// Rules: D-MOVED, W-MOVE, W-STAY.
#[test]
fn a_dispatcher_is_replaced_again_and_again_under_load_and_its_workers_notice_nothing() {
    run(async {
        let setup = Setup::new().await;
        let (mut front, workers) = setup.first().await;
        let load = Load::start(setup.address);
        for _ in 0..10 {
            load.goes_on(50).await;
            let mut next = setup.next(&mut front).await;
            front.send("begin").await.unwrap();
            load.goes_on(50).await;
            assert_eq!(ready_pids(&mut next).await, workers);
            front.send("leave").await.unwrap();
            assert!(front.process.wait().await.unwrap().success());
            front = next;
        }
        let (answered, failed) = load.stop().await;
        assert_eq!(failed, 0, "of {}", answered + failed);
        assert_eq!(ready_pids(&mut front).await, workers);
        front.send("leave").await.unwrap();
        assert_eq!(served_by(&setup.log).len(), answered as usize);
    });
}

/// Only connections that no worker has adopted end with the dispatcher. No connection is served
/// twice.
#[test]
fn a_dispatcher_that_is_killed_while_it_is_replaced_takes_no_worker_along() {
    run(async {
        let setup = Setup::new().await;
        let (mut front, _) = setup.first().await;
        let load = Load::start(setup.address);
        for _ in 0..20 {
            // During a replacement, one of the two dispatchers is killed at a random moment.
            load.goes_on(20).await;
            let workers = ready_pids(&mut front).await;
            let mut next = setup.next(&mut front).await;
            let (kills_old, moment) = (fastrand::bool(), fastrand::u64(..3000));
            let victim = if kills_old { front.pid() } else { next.pid() };
            let killer = tokio::spawn(async move {
                sleep(Duration::from_micros(moment)).await;
                kill(victim, Signal::SIGKILL).unwrap();
            });
            // When the old one answers the command after "begin", its tasks have sent everything.
            let has_begun =
                front.send("begin").await.is_some() && front.send("pids").await.is_some();
            killer.await.unwrap();
            // The other one has the workers and goes on.
            if kills_old {
                front.process.wait().await.unwrap();
                front = next;
                let now = ready_pids(&mut front).await;
                assert!(
                    !has_begun || now == workers,
                    "{now:?} instead of {workers:?}: {:?}",
                    front.send("pids").await
                );
            } else {
                next.process.wait().await.unwrap();
                front.send("undo").await.unwrap();
                assert_eq!(ready_pids(&mut front).await, workers);
            }
            load.goes_on(20).await;
        }
        // Each request was served once, if at all.
        let (answered, failed) = load.stop().await;
        println!("{answered} answered, {failed} failed with a dispatcher that was killed");
        assert!(failed < answered);
        front.send("leave").await.unwrap();
        let by_serial = served_by(&setup.log);
        assert!(by_serial.len() >= answered as usize);
        assert_eq!(served(&setup.log).len(), by_serial.len());
    });
}

/// The dispatcher that kills the worker is not its parent.
#[test]
fn a_worker_that_hangs_after_it_has_moved_is_killed_and_started_again() {
    run(async {
        let setup = Setup { hang_timeout: Some(Duration::from_secs(2)), ..Setup::new().await };
        let (mut front, _) = setup.first().await;
        let mut next = setup.next(&mut front).await;
        front.send("begin").await.unwrap();
        let workers = ready_pids(&mut next).await;
        front.kill().await;
        let hung = *workers.first().unwrap();
        stop(Pid::from_raw(hung as i32)).await;
        until("the worker is killed", || !Path::new(&format!("/proc/{hung}/status")).exists())
            .await;
        let now = ready_pids(&mut next).await;
        assert_eq!(now.intersection(&workers).count(), WORKERS - 1, "{now:?}");
        for serial in 0..20 {
            assert!(request(setup.address, serial).await);
        }
        next.send("leave").await.unwrap();
    });
}
