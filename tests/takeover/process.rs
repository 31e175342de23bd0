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

/// The test that is such a process if it is started as one.
pub(crate) const ROLE: &str = "processes::a_restart_under_load_fails_no_request";

/// The longest time for a report.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server process, which answers each line with its process id.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// Its reports: "requested", "ready", "confirmed", "left", or the reason why it could not take
    /// over.
    reports: BufReader<UnixStream>,
}

impl Process {
    pub(crate) fn start(path: &Path, address: SocketAddr) -> Self {
        Self::start_by(Command::new("/proc/self/exe"), path, address)
    }

    /// The same with a command that executes this binary and passes on its arguments.
    pub(crate) fn start_by(mut command: Command, path: &Path, address: SocketAddr) -> Self {
        command.env("FDWIRE_PATH", path).env("FDWIRE_ADDRESS", address.to_string());
        let mut process = Self::start_role(command, ROLE);
        process.expect("started");
        process
    }

    /// A process that runs the test with this name.
    pub(crate) fn start_role(command: Command, role: &str) -> Self {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { child: spawn_role_by(command, role, there.into()), reports: BufReader::new(here) }
    }

    /// One that serves.
    pub(crate) fn serving(path: &Path, address: SocketAddr) -> Self {
        Self::serving_by(Command::new("/proc/self/exe"), path, address)
    }

    pub(crate) fn serving_by(command: Command, path: &Path, address: SocketAddr) -> Self {
        let mut process = Self::start_by(command, path, address);
        process.serve();
        process
    }

    /// Lets it take over, or start as the first one.
    pub(crate) fn serve(&mut self) {
        self.go();
        self.expect("requested");
        self.go();
        self.expect("ready");
        self.expect("confirmed");
    }

    /// Lets it take its next step.
    pub(crate) fn go(&mut self) {
        let _ = self.reports.get_mut().write_all(b"\n"); // it may be dead
    }

    /// The next report, or the empty string if it is dead.
    pub(crate) fn report(&mut self) -> String {
        let mut report = String::new();
        let _ = self.reports.read_line(&mut report);
        report.trim().to_owned()
    }

    /// The next report, if there is one within a moment.
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

/// In a server process: waits for a byte, requests, waits for a byte, serves.
pub(crate) async fn serve(socket: OwnedFd) {
    let mut parent = UnixStream::from(socket);
    let mut go = |report: &str| {
        parent.write_all(format!("{report}\n").as_bytes()).unwrap();
    };
    let mut wait = {
        let mut parent = std::io::stdin();
        move || parent.read_exact(&mut [0]).unwrap()
    };
    go("started");
    wait();
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
        Err(error) => return go(&failed(error)),
    };
    go("requested");
    wait();
    let server = match pending.ready().await {
        Ok(server) => server,
        Err(error) => return go(&failed(error)),
    };
    go("ready");
    server.confirmed().await;
    if let Ok(datagrams) = server.datagrams("udp", 0) {
        tokio::spawn(answer_datagrams(datagrams));
    }
    go("confirmed");
    answer(&server).await;
    go("left");
}

/// The options of a server process. `FDWIRE_VERSIONS`: the lowest and the highest version that it
/// speaks. `FDWIRE_ANSWER`: its limit for answers in milliseconds.
fn options() -> Options {
    let numbers = |name| -> Option<Vec<u64>> {
        let text = std::env::var(name).ok()?;
        Some(text.split(' ').map(|number| number.parse().unwrap()).collect())
    };
    let mut options = Options::default().ready_timeout(Duration::from_millis(300));
    if let Some(versions) = numbers("FDWIRE_VERSIONS") {
        options = options.versions(versions[0] as u8, versions[1] as u8);
    }
    if let Some(answer) = numbers("FDWIRE_ANSWER") {
        options = options.answer_timeout(Duration::from_millis(answer[0]));
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

/// Asks who serves. `None` if nobody does.
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

/// A connection that was accepted, and that no further request ends.
pub(crate) fn keep_open(address: SocketAddr) -> BufReader<TcpStream> {
    let mut connection = BufReader::new(TcpStream::connect(address).unwrap());
    connection.get_mut().write_all(b"who\n").unwrap();
    connection.read_line(&mut String::new()).unwrap();
    connection
}
