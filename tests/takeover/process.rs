//! A server that is a process of its own.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fdwire::takeover::{self, Datagrams, Listeners, Options, Server};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    sync::watch,
};

use crate::{common::*, path_and_address};

/// The test that is a server process if it is started as one.
pub(crate) const ROLE: &str = "processes::a_restart_under_load_fails_no_request";

/// The longest time for a report.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server process, which takes each step when the test lets it, and answers each line of a client
/// with its process id.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// The reports of the process: "requested", "ready", "confirmed", "left", or the reason why it
    /// could not take over.
    reports: BufReader<UnixStream>,
}

impl Process {
    pub(crate) fn start(path: &Path, address: SocketAddr) -> Self {
        Self::start_by(Command::new("/proc/self/exe"), path, address)
    }

    /// Does the same with a command that executes this binary with the arguments that it gets.
    pub(crate) fn start_by(mut command: Command, path: &Path, address: SocketAddr) -> Self {
        command.env("FDWIRE_PATH", path).env("FDWIRE_ADDRESS", address.to_string());
        let mut process = Self::start_role(command, ROLE);
        process.expect("started");
        process
    }

    /// Starts a process that runs the test with this name.
    pub(crate) fn start_role(command: Command, role: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { child: spawn_role_by(command, role, theirs.into()), reports: BufReader::new(ours) }
    }

    /// Starts a process and waits until it serves.
    pub(crate) fn serving(path: &Path, address: SocketAddr) -> Self {
        Self::serving_by(Command::new("/proc/self/exe"), path, address)
    }

    pub(crate) fn serving_by(command: Command, path: &Path, address: SocketAddr) -> Self {
        let mut process = Self::start_by(command, path, address);
        process.serve();
        process
    }

    /// Lets the process take over, or start as the first one.
    pub(crate) fn serve(&mut self) {
        self.go();
        self.expect("requested");
        self.go();
        self.expect("ready");
        self.expect("confirmed");
    }

    /// Lets the process take its next step.
    pub(crate) fn go(&mut self) {
        let _ = self.reports.get_mut().write_all(b"\n"); // the process may be dead
    }

    /// Waits for the next report. Returns the empty string if the process is dead.
    pub(crate) fn report(&mut self) -> String {
        let mut report = String::new();
        let _ = self.reports.read_line(&mut report);
        report.trim().to_owned()
    }

    /// Returns the next report, if there is one within a moment.
    pub(crate) fn try_report(&mut self) -> Option<String> {
        self.reports.get_ref().set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut report = String::new();
        let read = self.reports.read_line(&mut report);
        self.reports.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        read.is_ok().then(|| report.trim().to_owned())
    }

    pub(crate) fn expect(&mut self, report: &str) {
        assert_eq!(self.report(), report);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is a server process: waits for a byte, asks for a takeover, waits for a byte, and serves.
pub(crate) async fn serve(socket: OwnedFd) {
    // The test lets this process take a step with each byte, and gets a report of it.
    let mut parent = UnixStream::from(socket);
    let mut report = |text: &str| {
        parent.write_all(format!("{text}\n").as_bytes()).unwrap();
    };
    let mut wait = {
        let mut parent = std::io::stdin();
        move || parent.read_exact(&mut [0]).unwrap()
    };
    report("started");
    wait();
    // Take the listeners of the server at the path, or be the first.
    let (path, address) = path_and_address();
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.add("http", TcpListener::bind(address)?)?;
        if std::env::var_os("FDWIRE_UDP").is_some() {
            listeners.add("udp", UdpSocket::bind(address)?)?;
        }
        Ok(listeners)
    };
    let failed = |error: takeover::Error| format!("failed: {error:?}: {error}");
    let pending = match takeover::bind_or_take(&path, options(), bind).await {
        Ok(pending) => pending,
        Err(error) => return report(&failed(error)),
    };
    report("requested");
    wait();
    // Serve, and answer datagrams too if there is a socket for them.
    let server = match pending.ready().await {
        Ok(server) => server,
        Err(error) => return report(&failed(error)),
    };
    report("ready");
    server.confirmed().await;
    if let Ok(datagrams) = server.datagrams("udp", 0) {
        tokio::spawn(answer_datagrams(datagrams));
    }
    report("confirmed");
    answer(&server).await;
    report("left");
}

/// Returns the options of a server process, from environment variables: `FDWIRE_VERSIONS` has the
/// lowest and the highest version that it supports, `FDWIRE_ANSWER` its limit for answers in
/// milliseconds, and `FDWIRE_READY` its limit for another process to be ready.
fn options() -> Options {
    let numbers = |name| -> Option<Vec<u64>> {
        let text = std::env::var(name).ok()?;
        Some(text.split(' ').map(|number| number.parse().unwrap()).collect())
    };
    let mut options = Options::default();
    if let Some(versions) = numbers("FDWIRE_VERSIONS") {
        options = options.versions(versions[0] as u8, versions[1] as u8);
    }
    if let Some(answer) = numbers("FDWIRE_ANSWER") {
        options = options.answer_timeout(Duration::from_millis(answer[0]));
    }
    if let Some(ready) = numbers("FDWIRE_READY") {
        options = options.ready_timeout(Duration::from_millis(ready[0]));
    }
    options
}

async fn answer_datagrams(datagrams: Datagrams) {
    while let Ok(received) = datagrams.recv(&mut [0; 100]).await {
        let answer = std::process::id().to_string();
        datagrams.send_to(answer.as_bytes(), received.source).await.unwrap();
    }
}

/// Answers until this process may leave. A connection gets one more answer while it drains.
async fn answer(server: &Server) {
    // Each connection is served by a task, which counts it as open.
    let http = server.gated::<tokio::net::TcpListener>("http", 0).unwrap();
    let open = watch::Sender::new(0);
    let is_draining = Arc::new(AtomicBool::new(false));
    let accepting = async {
        loop {
            let mut connection = match http.accept().await {
                Ok((connection, _)) => connection,
                Err(error) if error.kind() == std::io::ErrorKind::NotConnected => break,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(1)).await; // no descriptor is left
                    continue;
                }
            };
            let (open, is_draining) = (open.clone(), Arc::clone(&is_draining));
            open.send_modify(|open| *open += 1);
            tokio::spawn(async move {
                let (read, mut write) = connection.split();
                let mut lines = tokio::io::BufReader::new(read).lines();
                while let Ok(Some(_)) = lines.next_line().await {
                    let last = is_draining.load(Ordering::SeqCst);
                    let answer =
                        format!("{} {}\n", std::process::id(), if last { "close" } else { "keep" });
                    if write.write_all(answer.as_bytes()).await.is_err() || last {
                        break;
                    }
                }
                open.send_modify(|open| *open -= 1);
            });
        }
    };
    // After it is replaced, the process leaves when no connection is open, unless that is undone.
    let draining = async {
        loop {
            server.replaced().await;
            is_draining.store(true, Ordering::SeqCst);
            let finished =
                || async { open.subscribe().wait_for(|&open| open == 0).await.map(drop).unwrap() };
            tokio::select! {
                () = finished() => if server.drained().await { break },
                undone = server.undone() => if !undone {
                    finished().await;
                    break;
                }
            }
            is_draining.store(false, Ordering::SeqCst);
        }
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(accepting, draining) } => {}
    }
}

/// Returns the process id of the server that answers a new client, or `None` if no server does.
pub(crate) fn who_serves(address: SocketAddr) -> Option<u32> {
    let mut connection = TcpStream::connect(address).ok()?;
    connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    connection.write_all(b"who\n").ok()?;
    let mut answer = String::new();
    BufReader::new(connection).read_line(&mut answer).ok()?;
    answer.split(' ').next()?.parse().ok()
}

pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Opens a connection that the server has accepted, and that stays open.
pub(crate) fn keep_open(address: SocketAddr) -> BufReader<TcpStream> {
    let mut connection = BufReader::new(TcpStream::connect(address).unwrap());
    connection.get_mut().write_all(b"who\n").unwrap();
    connection.read_line(&mut String::new()).unwrap();
    connection
}
