//! Servers that are processes of their own, under load and killed.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
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

use crate::{common::*, place};

const ROLE: &str = "processes::a_restart_under_load_fails_no_request";

/// A server process, which answers each line with its process id.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// What it reports: "requested", "ready", "confirmed", "left", or why it could not take over.
    reports: BufReader<UnixStream>,
}

impl Process {
    pub(crate) fn start(path: &Path, address: SocketAddr) -> Self {
        Self::start_by(Command::new("/proc/self/exe"), path, address)
    }

    /// The same with a command that executes this binary and passes on its arguments.
    fn start_by(mut command: Command, path: &Path, address: SocketAddr) -> Self {
        command.env("FDWIRE_PATH", path).env("FDWIRE_ADDRESS", address.to_string());
        Self::start_role(command, ROLE)
    }

    /// A process that runs the test with this name.
    pub(crate) fn start_role(command: Command, role: &str) -> Self {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { child: spawn_role_by(command, role, there.into()), reports: BufReader::new(here) }
    }

    /// One that serves.
    pub(crate) fn serving(path: &Path, address: SocketAddr) -> Self {
        Self::serving_by(Command::new("/proc/self/exe"), path, address)
    }

    pub(crate) fn serving_by(command: Command, path: &Path, address: SocketAddr) -> Self {
        let mut process = Self::start_by(command, path, address);
        process.go();
        process.expect("requested");
        process.go();
        process.expect("ready");
        process.expect("confirmed");
        process
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

    pub(crate) fn expect(&mut self, report: &str) {
        assert_eq!(self.report(), report);
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
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
async fn serve(socket: OwnedFd) {
    let mut parent = UnixStream::from(socket);
    let mut go = |report: &str| {
        parent.write_all(format!("{report}\n").as_bytes()).unwrap();
    };
    let mut wait = {
        let mut parent = std::io::stdin();
        move || parent.read_exact(&mut [0]).unwrap()
    };
    wait();
    let path = PathBuf::from(std::env::var_os("FDWIRE_PATH").unwrap());
    let address = std::env::var("FDWIRE_ADDRESS").unwrap();
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.add("http", TcpListener::bind(&address)?)?;
        if std::env::var_os("FDWIRE_UDP").is_some() {
            listeners.add("udp", UdpSocket::bind(&address)?)?;
        }
        Ok(listeners)
    };
    let options = Options::default().ready_timeout(Duration::from_millis(300));
    let pending = match takeover::bind_or_take(&path, options, bind).await {
        Ok(pending) => pending,
        Err(error) => return go(&format!("failed: {error}")),
    };
    go("requested");
    wait();
    let server = match pending.ready().await {
        Ok(server) => server,
        Err(error) => return go(&format!("failed: {error}")),
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
        while let Ok((mut connection, _)) = http.accept().await {
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

/// Asks again and again. One-shot clients connect for each request, others when they are told to.
fn ask(
    address: SocketAddr,
    one_shot: bool,
    stop: &AtomicBool,
    answers: &AtomicUsize,
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut connection = None;
    while !stop.load(Ordering::SeqCst) {
        let mut request = || -> std::io::Result<bool> {
            let open = match connection.take() {
                Some(open) => open,
                None => BufReader::new(TcpStream::connect(address)?),
            };
            let open: &mut BufReader<TcpStream> = connection.insert(open);
            open.get_mut().write_all(b"who\n")?;
            let mut answer = String::new();
            if open.read_line(&mut answer)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            Ok(answer.ends_with("close\n"))
        };
        match request() {
            Ok(closes) => {
                answers.fetch_add(1, Ordering::SeqCst);
                if closes || one_shot {
                    connection = None;
                }
            }
            Err(error) => {
                failures.push(error.to_string());
                connection = None;
            }
        }
    }
    failures
}

#[test]
fn a_restart_under_load_fails_no_request() {
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(serve(socket));
    }
    let (_directory, path) = place();
    let address = free_address();
    let mut process = Process::serving(&path, address);
    let stop = Arc::new(AtomicBool::new(false));
    let answers = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            thread::spawn(move || ask(address, number % 2 == 0, &stop, &answers))
        })
        .collect();
    for _ in 0..10 {
        let before = answers.load(Ordering::SeqCst);
        let next = Process::serving(&path, address);
        process.expect("left");
        assert!(process.child.wait().unwrap().success());
        process = next;
        while answers.load(Ordering::SeqCst) < before + 100 {
            thread::yield_now(); // the new one answers
        }
    }
    stop.store(true, Ordering::SeqCst);
    let failures: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    println!(
        "10 restarts, {} answers, {} failures",
        answers.load(Ordering::SeqCst),
        failures.len()
    );
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn a_process_that_dies_before_it_is_ready_changes_nothing_and_one_that_dies_later_is_undone() {
    let (_directory, path) = place();
    let address = free_address();
    let old = Process::serving(&path, address);

    let mut new = Process::start(&path, address);
    new.go();
    new.expect("requested");
    drop(new);
    assert_eq!(who_serves(address), Some(old.child.id()));

    // A client keeps the old one from leaving.
    let _idle = keep_open(address);
    let new = Process::serving(&path, address);
    while who_serves(address) != Some(new.child.id()) {}
    drop(new);
    assert_eq!(who_serves(address), Some(old.child.id()));
}

/// A connection that was accepted, and that no further request ends.
pub(crate) fn keep_open(address: SocketAddr) -> BufReader<TcpStream> {
    let mut connection = BufReader::new(TcpStream::connect(address).unwrap());
    connection.get_mut().write_all(b"who\n").unwrap();
    connection.read_line(&mut String::new()).unwrap();
    connection
}

#[test]
fn a_new_process_serves_if_the_old_one_dies_before_it_is_ready() {
    let (_directory, path) = place();
    let address = free_address();
    let old = Process::serving(&path, address);
    let mut new = Process::start(&path, address);
    new.go();
    new.expect("requested");
    drop(old);
    new.go();
    new.expect("ready");
    new.expect("confirmed");
    assert_eq!(who_serves(address), Some(new.child.id()));
    // It can be replaced as any other.
    let third = Process::serving(&path, address);
    new.expect("left");
    assert_eq!(who_serves(address), Some(third.child.id()));
}

#[test]
fn a_process_that_hangs_before_it_is_ready_does_not_serve_when_it_wakes_up() {
    let (_directory, path) = place();
    let address = free_address();
    let old = Process::serving(&path, address);
    let mut hung = Process::start(&path, address);
    hung.go();
    hung.expect("requested");
    hung.signal(Signal::SIGSTOP);
    // The old one calls it off by itself, and the next one takes over.
    let next = loop {
        let mut next = Process::start(&path, address);
        next.go();
        match next.report().as_str() {
            "requested" => break next,
            busy => assert!(busy.contains("another process is taking over"), "{busy}"),
        }
    };
    assert_eq!(who_serves(address), Some(old.child.id()));
    hung.go();
    hung.signal(Signal::SIGCONT);
    let report = hung.report();
    assert!(report.contains("not ready in time"), "{report}");
    assert!(hung.child.wait().unwrap().success());
    drop(next);
}

/// A duplicate of a socket that stays in an event loop takes connections' wake-ups from the process
/// that serves (HAProxy lost 87 % of its accept rate to that).
#[test]
fn a_server_that_drains_has_taken_its_listeners_out_of_its_event_loop() {
    let (_directory, path) = place();
    let address = free_address();
    let old = Process::serving(&path, address);
    let _open = keep_open(address);
    assert!(is_watched(&old, address));
    let new = Process::serving(&path, address);
    assert_eq!(who_serves(address), Some(new.child.id()));
    let begin = Instant::now();
    while is_watched(&old, address) {
        // It has read READY by now, and is about to do so.
        assert!(begin.elapsed() < Duration::from_secs(20), "its listener stays in its event loop");
    }
    assert!(is_watched(&new, address));
}

/// Whatever clients do, nothing wakes a process whose own connections are silent.
#[test]
fn ten_generations_that_drain_are_not_woken_by_clients_of_the_newest() {
    let (_directory, path) = place();
    let address = free_address();
    let serving_udp = || {
        let mut command = Command::new("/proc/self/exe");
        command.env("FDWIRE_UDP", "1");
        Process::serving_by(command, &path, address)
    };
    let mut newest = serving_udp();
    let (mut draining, mut open) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        open.push(keep_open(address));
        draining.push(std::mem::replace(&mut newest, serving_udp()));
    }
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(address).unwrap();
    let clients_come = || {
        let before: Vec<_> = draining.iter().map(switches).collect();
        for _ in 0..100 {
            assert_eq!(who_serves(address), Some(newest.child.id()));
            client.send(b"who").unwrap();
            let mut answer = [0; 100];
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], *newest.child.id().to_string().as_bytes());
        }
        draining
            .iter()
            .map(switches)
            .zip(before)
            .map(|(after, before)| after - before)
            .collect::<Vec<_>>()
    };
    // The first ones may still be busy with the last takeover.
    let mut wakes = clients_come();
    for _ in 0..50 {
        if wakes.iter().all(|&wakes| wakes == 0) {
            assert!(draining.iter().all(|process| !is_watched(process, address)));
            return;
        }
        wakes = clients_come();
    }
    panic!(
        "100 connections and datagrams have woken the generations that drain so often: {wakes:?}"
    );
}

/// The number of times that a thread of a process was switched to.
fn switches(process: &Process) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    let status = threads
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let number = |line: &str| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap();
    status
        .map(|status| {
            status.lines().filter(|line| line.contains("ctxt_switches")).map(number).sum::<u64>()
        })
        .sum()
}

/// Looks for the listener with this address in the event loops of a process.
fn is_watched(process: &Process, address: SocketAddr) -> bool {
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listens = row
        .filter(|row| row[1].ends_with(&port) && row[3] == "0A")
        .map(|row| row[9].to_owned())
        .next();
    let inode: u64 = listens.expect("somebody listens").parse().unwrap();
    let watched = format!("ino:{inode:x} ");
    let files = std::fs::read_dir(format!("/proc/{}/fdinfo", process.child.id())).unwrap();
    let infos = files.filter_map(|file| std::fs::read_to_string(file.unwrap().path()).ok());
    infos
        .into_iter()
        .any(|info| info.lines().any(|line| line.starts_with("tfd:") && line.contains(&watched)))
}

/// Attaches strace to all threads of a process.
fn trace(strace: &Path, process: &Process, arguments: &[&str]) -> Child {
    let mut tracer = Command::new(strace)
        .args(["-f", "-p", &process.child.id().to_string()])
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(tracer.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("attached"), "{line}");
    tracer
}

/// Lets a new process take over from an old one while one of them is traced, and checks that one
/// serves in the end. Returns true if the traced one was killed. A client whose connection is open
/// keeps the old one from leaving before the takeover is complete.
fn take_over(strace: &Path, traces_old: bool, arguments: &[&str]) -> bool {
    let (_directory, path) = place();
    let address = free_address();
    let mut old = Process::serving(&path, address);
    let open = keep_open(address);
    let mut new = Process::start(&path, address);
    let mut tracer = trace(strace, if traces_old { &old } else { &new }, arguments);
    let mut was_killed = false;
    for report in ["requested", "ready", "confirmed"] {
        new.go();
        let found = new.report();
        if found != report {
            assert!(!traces_old && found.is_empty(), "{found:?}, expected {report}");
            was_killed = true;
            break;
        }
    }
    if traces_old {
        // The last calls of the old process are those after its last client has gone.
        drop(open);
        let status = old.child.wait().unwrap();
        was_killed = status.signal().is_some();
        assert!(was_killed || status.success(), "{status}");
    }
    check_one_serves(address, &[&old, &new]);
    drop((old, new));
    tracer.wait().unwrap();
    was_killed
}

/// Kills one side at each of its system calls. strace counts each kind of call for itself, and the
/// calls of each thread.
fn kill_at_each_call(kills_old: bool) {
    let Some(strace) = installed("strace") else { return };
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: needs root to attach strace to a process");
    }
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    assert!(!take_over(&strace, kills_old, &["-o", log.to_str().unwrap()]));
    let log = std::fs::read_to_string(log).unwrap();
    let name =
        |line: &str| Some(line.split_once(' ')?.1.trim_start().split_once('(')?.0.to_owned());
    let is_name =
        |name: &String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let names: BTreeSet<_> = log.lines().filter_map(name).filter(is_name).collect();

    let mut kills = 0;
    for name in &names {
        for call in 1.. {
            let inject = format!("--inject={name}:signal=SIGKILL:when={call}");
            if !take_over(&strace, kills_old, &["-o", "/dev/null", &inject]) {
                break;
            }
            kills += 1;
        }
    }
    let side = if kills_old { "old" } else { "new" };
    println!(
        "SIGKILL of the {side} process at {kills} of {kills} system calls of {} kinds: one serves",
        names.len()
    );
    assert!(kills > 30, "it was not killed in the takeover");
}

/// Those that are alive answer, and nobody else.
fn check_one_serves(address: SocketAddr, processes: &[&Process]) {
    let begin = Instant::now();
    loop {
        let answer = who_serves(address);
        let is_alive = |process: &&&Process| !is_dead(process);
        if processes.iter().filter(is_alive).any(|process| answer == Some(process.child.id())) {
            return;
        }
        // It may be killed while it answers.
        assert!(begin.elapsed() < Duration::from_secs(20), "nobody serves: {answer:?}");
    }
}

fn is_dead(process: &Process) -> bool {
    let status =
        std::fs::read_to_string(format!("/proc/{}/stat", process.child.id())).unwrap_or_default();
    status.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
}

#[test]
fn a_new_process_that_is_killed_at_any_system_call_leaves_one_that_serves() {
    kill_at_each_call(false);
}

#[test]
fn an_old_process_that_is_killed_at_any_system_call_leaves_one_that_serves() {
    kill_at_each_call(true);
}
