//! Runs the examples of the hand-off, `accept_handoff` and `axum_worker`, as their user would: with
//! real processes, real signals, and HTTP over TCP.

#[path = "../common/mod.rs"]
mod common;
mod foreign_workers;
mod watch;

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::SocketAddr,
    process::{Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
    time::{sleep, timeout},
};

/// The longest time for anything that should happen soon, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const KINDS: [&str; 2] = ["seqpacket", "stream"];

#[tokio::test]
async fn demo_is_answered_by_every_worker() {
    for kind in KINDS {
        let (workers, summary) = demo(&["--demo", "300", "--socket", kind]).await;
        assert_eq!(workers.len(), 3, "two workers and a row for all");
        let adopted = |row: &str| workers[row][1].parse::<u32>().unwrap();
        assert!(
            adopted("1") > 0 && adopted("2") > 0 && adopted("all") == 300,
            "{kind}: {workers:?}"
        );
        assert_eq!(
            (summary["answered"], summary["cut while being served"], summary["kills"]),
            (300, 0, 0),
            "{kind}"
        );
    }
}

#[tokio::test]
async fn demo_loses_nothing_while_workers_are_killed() {
    for kind in KINDS {
        let arguments =
            ["--demo", "3000", "--workers", "3", "--kill-every", "20", "--socket", kind];
        let (_, summary) = demo(&arguments).await;
        assert_eq!(
            summary["answered"] + summary["cut while being served"],
            3000,
            "{kind}: {summary:?}"
        );
        assert!(
            summary["answered"] > 0 && summary["kills"] > 0 && summary["restarts"] > 0,
            "{kind}: {summary:?}"
        );
        for none in ["failed", "lost before adoption", "given twice"] {
            assert_eq!(summary[none], 0, "{kind}: {none}");
        }
    }
}

#[tokio::test]
async fn requests_reach_every_worker_and_connections_end() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        assert_eq!(front.every_worker_answers().await.len(), 2);
        front.stop(Signal::SIGTERM).await;
    }
}

/// Clients connect again and again, so most of them wait in the kernel's backlog at any time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saturated_front_that_is_stopped_answers_the_clients_that_wait() {
    const CLIENTS: usize = 64;
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        front.every_worker_answers().await;
        let (address, answers) = (front.address, Arc::new(AtomicUsize::new(0)));
        let client = move |answers: Arc<AtomicUsize>| async move {
            loop {
                match get(address).await {
                    Ok(_) => drop(answers.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => return error.kind(),
                }
            }
        };
        let clients =
            Vec::from_iter((0..CLIENTS).map(|_| tokio::spawn(client(Arc::clone(&answers)))));
        until("all clients are busy", || answers.load(Ordering::Relaxed) > 10 * CLIENTS).await;
        front.stop(Signal::SIGTERM).await;

        let ends = join_all(clients).await.into_iter().map(Result::unwrap);
        let cut = ends.filter(|end| *end != io::ErrorKind::ConnectionRefused).count();
        // Only clients that connected right before the listener was closed may be cut.
        assert!(cut <= CLIENTS / 8, "{kind}: {cut} of {CLIENTS} clients were cut");
    }
}

#[tokio::test]
async fn a_signal_replaces_the_workers() {
    for kind in KINDS {
        let mut front = Front::start(&["--socket", kind]).await;
        let old = front.every_worker_answers().await;
        kill(front.pid(), Signal::SIGUSR2).unwrap();
        let line = soon("a line", front.stdout.next_line()).await.unwrap();
        assert_eq!(line.as_deref(), Some("replaced 2 workers"));
        until("the old ones have ended", || front.workers().is_disjoint(&old)).await;
        assert_eq!(front.every_worker_answers().await.len(), 2);
        front.stop(Signal::SIGTERM).await;
    }
}

/// The signal goes to the workers too, as that of Ctrl-C does.
#[tokio::test]
async fn ctrl_c_stops_all_processes() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        get(front.address).await.unwrap();
        let mut kept_alive = TcpStream::connect(front.address).await.unwrap();
        kept_alive.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        kept_alive.readable().await.unwrap();
        let mut unused = TcpStream::connect(front.address).await.unwrap();

        front.stop(Signal::SIGINT).await;
        let mut rest = Vec::new();
        soon("the end of the connection", kept_alive.read_to_end(&mut rest)).await.unwrap();
        // A connection without a request ends without an answer.
        let _ = soon("the end of the connection", unused.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn a_busy_client_learns_which_answer_is_the_last() {
    for kind in KINDS {
        check_last_answers(Front::start(&["--socket", kind]).await).await;
    }
}

/// Stops a front while clients send requests. Checks that each of them learns which answer is its
/// last, before its connection ends.
async fn check_last_answers(front: Front) {
    let clients = join_all((0..8).map(async |_| {
        let mut client = BufReader::new(TcpStream::connect(front.address).await.unwrap());
        assert!(!is_last_answer(&mut client).await);
        client
    }));
    let busy = join_all(clients.await.into_iter().map(async |mut client| {
        while !is_last_answer(&mut client).await {}
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }));
    tokio::join!(busy, front.stop(Signal::SIGINT));
}

/// Sends a request. Returns true if its answer is the last one on this connection.
async fn is_last_answer(client: &mut BufReader<TcpStream>) -> bool {
    client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let (mut line, mut last) = (String::new(), false);
    while !line.starts_with("worker ") {
        line.clear();
        assert!(
            soon("an answer", client.read_line(&mut line)).await.unwrap() > 0,
            "the connection was cut"
        );
        last |= line.eq_ignore_ascii_case("connection: close\r\n");
    }
    last
}

#[tokio::test]
async fn ctrl_c_stops_all_processes_while_workers_are_killed() {
    for kind in KINDS {
        let front = Front::start(&["--kill-every", "10", "--socket", kind]).await;
        let mut seen = HashSet::new();
        while seen.len() < 10 {
            seen.extend(get(front.address).await); // requests at a killed worker fail
        }
        front.stop(Signal::SIGINT).await;
    }
}

#[tokio::test]
async fn workers_end_by_themselves_when_the_front_is_killed() {
    for kind in KINDS {
        let mut front = Front::start(&["--socket", kind]).await;
        get(front.address).await.unwrap();
        let workers = front.workers();
        kill(front.pid(), Signal::SIGKILL).unwrap();
        front.all_ended().await;
        assert!(!front.child.wait().await.unwrap().success());
        for worker in workers {
            // A worker whose end no process waits for stays as a zombie.
            until("the worker is gone", || matches!(state(worker), None | Some('Z' | 'X'))).await;
        }
    }
}

#[tokio::test]
async fn requests_after_the_death_of_a_worker_are_answered() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        let before = front.workers();
        let enough = AtomicBool::new(false);
        let background = join_all((0..8).map(async |_| {
            while !enough.load(Ordering::Relaxed) {
                let _ = get(front.address).await; // requests that the victim had adopted may fail
            }
        }));
        let after_the_death = async {
            let victim = get(front.address).await.unwrap();
            kill(victim, Signal::SIGKILL).unwrap();
            for _ in 0..100 {
                assert_ne!(get(front.address).await.unwrap(), victim, "{kind}");
            }
            // The loop ends when a worker that was started again serves.
            while before.contains(&get(front.address).await.unwrap()) {}
            enough.store(true, Ordering::Relaxed);
        };
        tokio::join!(background, after_the_death);
        front.stop(Signal::SIGINT).await;
    }
}

#[tokio::test]
async fn connections_that_a_dead_worker_did_not_take_go_to_another() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        let victim = front.every_worker_answers().await.into_iter().next().unwrap();
        kill(victim, Signal::SIGSTOP).unwrap();
        until("the worker has stopped", || state(victim) == Some('T')).await;

        // Each worker gets one of two connections. The stopped one does not answer its own.
        let mut answers = FuturesUnordered::from_iter([get(front.address), get(front.address)]);
        assert_ne!(answers.next().await.unwrap().unwrap(), victim, "{kind}");
        kill(victim, Signal::SIGKILL).unwrap();
        assert_ne!(answers.next().await.unwrap().unwrap(), victim, "{kind}");
        drop(answers);
        front.stop(Signal::SIGINT).await;
    }
}

#[tokio::test]
async fn the_only_worker_is_started_again() {
    let front = Front::start(&["--workers", "1"]).await;
    let first = get(front.address).await.unwrap();
    kill(first, Signal::SIGKILL).unwrap();
    assert_ne!(get(front.address).await.unwrap(), first);
    front.stop(Signal::SIGTERM).await;
}

#[tokio::test]
async fn a_worker_that_hangs_is_killed_at_the_end() {
    let mut front = Front::start(&[]).await;
    let workers = front.workers();
    let hanging = get(front.address).await.unwrap();
    kill(hanging, Signal::SIGSTOP).unwrap();
    kill(front.pid(), Signal::SIGINT).unwrap();
    front.all_ended().await;
    assert_eq!(front.child.wait().await.unwrap().code(), Some(1));
    for worker in workers {
        assert_eq!(state(worker), None, "worker {worker} remains");
    }
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn axum_serves_connections_that_are_handed_over() {
    let mut command = Command::from(common::example("axum_worker"));
    command.arg("127.0.0.1:0");
    let front = Front::start_as(command).await;
    front.every_worker_answers().await;
    check_last_answers(front).await;
}

#[tokio::test]
async fn port_in_use_is_one_clear_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&["--listen", &address]).await;
    assert_eq!(output.status.code(), Some(1));
    let line = only_line(&output);
    assert!(line.contains(&address) && line.contains("in use"), "{line}");
}

#[tokio::test]
async fn demo_on_an_address_that_its_clients_cannot_reach_is_one_clear_line() {
    let output = run(&["--demo", "1", "--listen", "[::1]:0"]).await;
    assert_eq!(output.status.code(), Some(1));
    let line = only_line(&output);
    assert!(line.contains("--demo") && line.contains("IPv4"), "{line}");
}

#[tokio::test]
async fn wrong_arguments_are_one_clear_line() {
    for (arguments, named) in [
        (&["--socket", "pigeon"][..], "pigeon"),
        (&["--workers", "0"], "--workers"),
        (&["--workers", "many"], "many"),
        (&["--listen", "nowhere"], "nowhere"),
        (&["--demo", "-1"], "-1"),
        (&["--kill-every", "0"], "--kill-every"),
        (&["--kill-every", "soon"], "soon"),
        (&["--no-such-thing"], "--no-such-thing"),
    ] {
        let output = run(arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let line = only_line(&output);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

/// A running example. When it is dropped, it is killed with its workers.
struct Front {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
}

impl Front {
    async fn start(arguments: &[&str]) -> Self {
        let mut command = example();
        command.args(["--listen", "127.0.0.1:0"]).args(arguments).env("RUST_LOG", "error");
        Self::start_as(command).await
    }

    /// Starts a front in a process group of its own, as a shell does.
    async fn start_as(mut command: Command) -> Self {
        let mut child = command.process_group(0).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon("a line", stdout.next_line()).await.unwrap().expect("an address");
        let (_, url) = line.split_once("http://").expect("a line with the address");
        Self { child, stdout, address: url.trim_end_matches('/').parse().unwrap() }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().expect("nobody has waited for its end") as i32)
    }

    /// Returns the process ids of its children.
    fn workers(&self) -> HashSet<Pid> {
        let processes = std::fs::read_dir("/proc").unwrap();
        let pids = processes.filter_map(|entry| {
            entry.unwrap().file_name().to_str()?.parse().ok().map(Pid::from_raw)
        });
        pids.filter(|pid| stat(*pid).is_some_and(|(_, parent)| parent == self.pid())).collect()
    }

    /// Sends requests until every worker has answered one. The first requests may come before all
    /// workers are ready.
    async fn every_worker_answers(&self) -> HashSet<Pid> {
        let (workers, mut answered_by) = (self.workers(), HashSet::new());
        while answered_by != workers {
            answered_by.insert(get(self.address).await.unwrap());
        }
        workers
    }

    /// Waits until all processes have ended. They share standard output, which ends with the last
    /// of them.
    async fn all_ended(&mut self) {
        while let Some(_line) =
            soon("the end of all processes", self.stdout.next_line()).await.unwrap()
        {}
    }

    /// Signals the whole process group. Checks that the front ends only after every worker.
    async fn stop(mut self, signal: Signal) {
        let workers = self.workers();
        killpg(self.pid(), signal).unwrap();
        let status = soon("the end of the front", self.child.wait()).await.unwrap();
        assert_eq!(status.code(), Some(0));
        for worker in workers {
            assert_eq!(state(worker), None, "worker {worker} remains");
        }
        self.all_ended().await;
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if self.child.id().is_some() {
            let _ = killpg(self.pid(), Signal::SIGKILL); // a test failed
        }
    }
}

/// Runs the example with these arguments to its end.
async fn run(arguments: &[&str]) -> Output {
    soon("the end of the example", example().args(arguments).output()).await.unwrap()
}

fn example() -> Command {
    let mut command = Command::from(common::example("accept_handoff"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs the demo. Returns the cells of each worker's row by the first of them, and the numbers of
/// the summary.
async fn demo(arguments: &[&str]) -> (BTreeMap<String, Vec<String>>, BTreeMap<String, u64>) {
    let output = run(arguments).await;
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stdout}{stderr}");
    let (mut workers, mut summary) = (BTreeMap::new(), BTreeMap::new());
    for line in stdout.lines().filter(|line| line.starts_with('│')) {
        let mut cells = line.trim_matches('│').split('┆').map(|cell| cell.trim().to_owned());
        let name = cells.next().unwrap();
        match &cells.collect::<Vec<_>>()[..] {
            [count] => drop(summary.insert(name, count.parse().unwrap())),
            cells => drop(workers.insert(name, cells.to_vec())),
        }
    }
    workers.remove("worker"); // the header
    (workers, summary)
}

/// Checks that an example has written one line to standard error. Returns that line.
fn only_line(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// Sends a request on a connection of its own, and reads to the end of that connection. Returns the
/// worker that has answered.
async fn get(address: SocketAddr) -> io::Result<Pid> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let pid = body.strip_prefix("worker ").and_then(|rest| rest.split(' ').next());
        Ok(Pid::from_raw(pid.and_then(|pid| pid.parse().ok()).expect("a process id in the answer")))
    };
    soon("an answer", exchange).await
}

/// Waits for something that should happen soon.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} should have come by now"))
}

/// Returns the state and the parent of a process, or `None` if there is no such process. In
/// `/proc/PID/stat`, see proc(5), they are the fields after the command in parentheses.
fn stat(process: Pid) -> Option<(char, Pid)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, Pid::from_raw(fields.next()?.parse().ok()?)))
}

fn state(process: Pid) -> Option<char> {
    stat(process).map(|(state, _)| state)
}

/// Waits until a condition is true of which no event informs the test.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    soon(what, wait).await;
}
