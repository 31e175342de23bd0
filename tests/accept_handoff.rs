//! Runs the example `accept_handoff` as its user would: real processes, real signals, HTTP over TCP.

mod common;

use std::{
    collections::HashSet,
    io,
    net::SocketAddr,
    process::{Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
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

/// For anything that should happen soon, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const KINDS: [&str; 2] = ["seqpacket", "stream"];

#[tokio::test]
async fn demo_is_answered_by_every_worker() {
    for kind in KINDS {
        let output = run(&["--demo", "300", "--socket", kind]).await;
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{kind}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
        let workers = stdout.lines().filter_map(ready_worker).collect::<Vec<_>>();
        assert_eq!(workers.len(), 2, "{kind}: {stdout}");
        let table = stdout.lines().filter(|line| line.starts_with('│')).collect::<Vec<_>>();
        let rows = table.iter().map(|row| row.split(['│', '┆']).map(str::trim).collect::<Vec<_>>()).collect::<Vec<_>>();
        for worker in workers {
            let row = rows.iter().find(|row| row[1] == worker.to_string()).expect("a row for each worker");
            assert!(row[2].parse::<u32>().unwrap() > 0, "{kind}: {stdout}");
        }
        let all = rows.iter().find(|row| row[1] == "all").expect("a row for all workers");
        assert_eq!(all[2..4], ["300", "0"], "{kind}: {stdout}");
    }
}

#[tokio::test]
async fn requests_reach_every_worker_and_connections_end() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        let answers = join_all((0..20).map(|_| get(front.address))).await;
        let answered_by = answers.into_iter().map(|worker| worker.unwrap()).collect::<HashSet<_>>();
        assert_eq!(answered_by, HashSet::from_iter(front.workers.iter().copied()), "{kind}");
        front.stop(Signal::SIGTERM).await;
    }
}

/// As Ctrl-C does, the signal goes to the workers too.
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
        // This one may have been in the backlog still, and is reset then.
        let _ = soon("the end of the connection", unused.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn workers_end_by_themselves_when_the_front_is_killed() {
    for kind in KINDS {
        let mut front = Front::start(&["--socket", kind]).await;
        get(front.address).await.unwrap();
        kill(front.pid(), Signal::SIGKILL).unwrap();
        front.all_ended().await;
        assert!(!front.child.wait().await.unwrap().success());
        for worker in &front.workers {
            gone(*worker).await;
        }
    }
}

#[tokio::test]
async fn requests_after_the_death_of_a_worker_are_answered() {
    for kind in KINDS {
        let mut front = Front::start(&["--socket", kind]).await;
        let (victim, survivor) = (front.workers[0], front.workers[1]);

        let enough = AtomicBool::new(false);
        let background = join_all((0..8).map(async |_| {
            while !enough.load(Ordering::Relaxed) {
                let _ = get(front.address).await; // those which the victim had adopted may fail
            }
        }));
        let after_the_death = async {
            let mut seen = HashSet::new();
            while seen.len() < 2 {
                seen.insert(get(front.address).await.unwrap());
            }
            kill(victim, Signal::SIGKILL).unwrap();
            for _ in 0..100 {
                assert_eq!(get(front.address).await.unwrap(), survivor, "{kind}");
            }
            enough.store(true, Ordering::Relaxed);
        };
        tokio::join!(background, after_the_death);

        front.line(|line| line.starts_with(&format!("worker {victim} ended"))).await;
        gone(victim).await;
        front.stop(Signal::SIGINT).await;
    }
}

#[tokio::test]
async fn connections_that_a_dead_worker_did_not_take_go_to_another() {
    for kind in KINDS {
        let front = Front::start(&["--socket", kind]).await;
        let (victim, survivor) = (front.workers[0], front.workers[1]);
        kill(victim, Signal::SIGSTOP).unwrap();
        until("the worker has stopped", || state(victim) == Some('T')).await;

        // One goes to each worker: the first by turns, the second to the worker with fewer unanswered ones.
        let mut answers = FuturesUnordered::from_iter([get(front.address), get(front.address)]);
        assert_eq!(answers.next().await.unwrap().unwrap(), survivor, "{kind}");
        kill(victim, Signal::SIGKILL).unwrap();
        assert_eq!(answers.next().await.unwrap().unwrap(), survivor, "{kind}");
        drop(answers);
        front.stop(Signal::SIGINT).await;
    }
}

#[tokio::test]
async fn front_fails_when_its_last_worker_died() {
    let mut front = Front::start(&["--workers", "1"]).await;
    kill(front.workers[0], Signal::SIGKILL).unwrap();
    front.all_ended().await;
    assert_eq!(front.child.wait().await.unwrap().code(), Some(1));
}

#[tokio::test]
async fn a_worker_that_hangs_is_killed_at_the_end() {
    let mut front = Front::start(&[]).await;
    kill(front.workers[0], Signal::SIGSTOP).unwrap();
    kill(front.pid(), Signal::SIGINT).unwrap();
    front.all_ended().await;
    assert_eq!(front.child.wait().await.unwrap().code(), Some(1));
    for worker in &front.workers {
        gone(*worker).await;
    }
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
async fn nonsense_arguments_are_one_clear_line() {
    for (arguments, named) in [
        (&["--socket", "pigeon"][..], "pigeon"),
        (&["--workers", "0"], "--workers"),
        (&["--workers", "many"], "many"),
        (&["--listen", "nowhere"], "nowhere"),
        (&["--demo", "-1"], "-1"),
        (&["--no-such-thing"], "--no-such-thing"),
    ] {
        let output = run(arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let line = only_line(&output);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

/// A running example. Dropped, it is killed with its workers.
struct Front {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
    workers: Vec<Pid>,
}

impl Front {
    /// In a process group of its own, as a shell starts it.
    async fn start(arguments: &[&str]) -> Self {
        let mut child = example()
            .args(["--listen", "127.0.0.1:0"])
            .args(arguments)
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut workers = Vec::new();
        let address = loop {
            let line = soon("a line", stdout.next_line()).await.unwrap().expect("an address");
            workers.extend(ready_worker(&line));
            if let Some((_, url)) = line.split_once("http://") {
                break url.trim_end_matches('/').parse().unwrap();
            }
        };
        assert!(!workers.is_empty());
        Self { child, stdout, address, workers }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().expect("not waited for yet") as i32)
    }

    async fn line(&mut self, wanted: impl Fn(&str) -> bool) {
        while let Some(line) = soon("a line", self.stdout.next_line()).await.unwrap() {
            if wanted(&line) {
                return;
            }
        }
        panic!("the line never came");
    }

    /// The workers have the same standard output: its end says that no process is left to write to it.
    async fn all_ended(&mut self) {
        while let Some(_line) = soon("the end of all processes", self.stdout.next_line()).await.unwrap() {}
    }

    /// Signals the whole process group, and expects that the front has waited for every worker.
    async fn stop(mut self, signal: Signal) {
        killpg(self.pid(), signal).unwrap();
        let status = soon("the end of the front", self.child.wait()).await.unwrap();
        assert_eq!(status.code(), Some(0));
        for &worker in &self.workers {
            assert_eq!(state(worker), None, "worker {worker} remains");
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if self.child.id().is_some() {
            let _ = killpg(self.pid(), Signal::SIGKILL); // a test failed
        }
    }
}

/// Runs it to its end.
async fn run(arguments: &[&str]) -> Output {
    soon("the end of the example", example().args(arguments).output()).await.unwrap()
}

fn example() -> Command {
    let mut command = Command::from(common::example("accept_handoff"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

fn ready_worker(line: &str) -> Option<Pid> {
    let pid = line.strip_prefix("worker ")?.strip_suffix(" is ready")?;
    Some(Pid::from_raw(pid.parse().unwrap()))
}

fn only_line(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// A request on a connection of its own, read to the end of that connection. Returns the worker that answered.
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

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} should have come by now"))
}

/// State of a process as proc(5) has it; `None` if there is none. The state is what follows the command in parentheses.
fn state(process: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A process of which nobody waits for the end stays behind as a zombie.
async fn gone(process: Pid) {
    until("the process is gone", || matches!(state(process), None | Some('Z' | 'X'))).await;
}

/// For what no event tells.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    soon(what, wait).await;
}
