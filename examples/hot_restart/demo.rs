//! Restarts a server under load, and prints what its clients see.

use std::{
    env, io,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::{sleep, timeout},
};

use crate::{load::Load, other};

const RESTARTS: usize = 20;
const CLIENTS: usize = 8;

/// The time between two restarts. The baseline without restarts takes `RESTARTS` times as long.
const QUIET: Duration = Duration::from_millis(250);

/// The latest moment of a kill, in milliseconds after the new process has its listeners. The old
/// process stays for longer, so it can serve again.
const LATEST_KILL: u64 = 60;

/// The spread in milliseconds. A replaced process may close a connection that has been silent for a
/// tenth of it.
const SPREAD: &str = "3000";

/// The longest time for anything that should happen soon.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server process.
struct Process {
    child: Child,
    reports: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(address: SocketAddr, path: &Path, front: bool) -> io::Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(["--listen", &address.to_string(), "--spread", SPREAD, "--path"])
            .arg(path)
            .args(front.then_some("--front"))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| other("no standard output"))?;
        Ok(Self { child, reports: BufReader::new(stdout).lines() })
    }

    /// Waits for a report.
    async fn wait_for(&mut self, report: &str) -> io::Result<()> {
        let found = timeout(PATIENCE, async {
            while let Some(line) = self.reports.next_line().await? {
                if line == report {
                    return Ok(());
                }
            }
            Err(other(format!("a server ended before it was {report:?}")))
        });
        found.await?
    }
}

/// Runs the demo. If `kill` is true, a process is killed in most restarts. If `front` is true, the
/// servers have workers.
pub(crate) async fn run(kill: bool, front: bool) -> io::Result<()> {
    // Start a server and its clients, and measure the longest gap without a restart.
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("takeover");
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut serving = Process::start(address, &path, front)?;
    serving.wait_for("ready").await?;

    let load = Load::start(address, CLIENTS, kill);
    sleep(QUIET).await;
    load.take_longest_gap();
    sleep(QUIET * RESTARTS as u32).await;
    let gap_without = load.take_longest_gap();

    // Restart it again and again. Old processes finish their connections meanwhile.
    let mut leaving = Vec::new();
    let mut kills = 0;
    for number in 1..=RESTARTS {
        let mut new = Process::start(address, &path, front)?;
        new.wait_for("offered").await?;
        match kill.then(|| fastrand::u8(..3)) {
            Some(0) => {
                // Kill the new process, before or after it is ready. The old one serves.
                sleep(Duration::from_millis(fastrand::u64(..LATEST_KILL))).await;
                new.child.kill().await?;
                kills += 1;
            }
            Some(1) => {
                // Kill the old process. The new one serves.
                sleep(Duration::from_millis(fastrand::u64(..LATEST_KILL))).await;
                serving.child.kill().await?;
                kills += 1;
                new.wait_for("ready").await?;
                serving = new;
            }
            _ => {
                new.wait_for("ready").await?;
                leaving.push(std::mem::replace(&mut serving, new));
            }
        }
        let (answered, failed) = load.counts();
        println!("restart {number} of {RESTARTS}: {answered} answered, {failed} failed");
        sleep(QUIET).await;
    }
    for mut process in leaving {
        process.wait_for("left").await?;
    }
    sleep(QUIET).await;

    // Report what the clients have seen.
    let gap_with = load.take_longest_gap();
    let seen = load.seen.lock().unwrap();
    println!("answered {}", seen.answered);
    println!("failed {}", seen.failed.len());
    println!("processes that answered {}", seen.processes.len());
    if kill {
        println!("kills {kills}");
        println!("cut by a kill and answered when repeated {}", seen.repeated);
    }
    println!("longest gap between two accepted connections {:.1} ms", gap_with.as_secs_f64() * 1e3);
    println!("the same without a restart {:.1} ms", gap_without.as_secs_f64() * 1e3);
    match seen.failed.first() {
        None => Ok(()),
        Some(failure) => Err(other(format!("a request failed: {failure}"))),
    }
}
