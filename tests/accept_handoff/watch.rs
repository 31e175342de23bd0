//! The option `--watch`: the picture on a terminal, and the lines without one.

use std::{
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use tokio::{io::AsyncBufReadExt, io::BufReader, process::Child};

use crate::{PATIENCE, example, get, soon, until};

/// A running example on a terminal of its own. When it is dropped, it is killed.
struct Watched {
    child: Child,
    written: Arc<Mutex<String>>,
}

/// A row of the picture: the worker's process, its state, the connections it has adopted, how often
/// it was started again, and how its last process has ended.
#[derive(Debug)]
struct Row {
    pid: i32,
    state: String,
    adopted: u64,
    restarts: u32,
    last_exit: String,
}

impl Watched {
    fn start() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let path = ptsname(&ours, Vec::new()).unwrap();
        let terminal: OwnedFd = open(&path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let mut command = example();
        command.args(["--watch", "--listen", "127.0.0.1:0"]).stdout(Stdio::from(terminal));
        let child = command.spawn().unwrap();

        let written = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&written);
        thread::spawn(move || {
            // A read may end within a character, so all bytes are decoded each time.
            let (mut ours, mut bytes) = (File::from(ours), Vec::new());
            let mut more = [0; 4096];
            while let Ok(count @ 1..) = ours.read(&mut more) {
                bytes.extend_from_slice(&more[..count]);
                *kept.lock().unwrap() = String::from_utf8_lossy(&bytes).into_owned();
            }
        });
        Self { child, written }
    }

    /// Returns the last picture that is complete.
    fn picture(&self) -> String {
        let written = self.written.lock().unwrap();
        let whole = written.rsplit_once("\x1b[J").map_or("", |(whole, _)| whole);
        whole.rsplit_once("\x1b[H").map_or("", |(_, picture)| picture).replace("\x1b[K", "")
    }

    fn rows(&self) -> Vec<Row> {
        let picture = self.picture();
        let rows = picture.lines().filter(|line| line.starts_with('│'));
        let rows = rows.filter_map(|row| {
            let cells = row.trim_end().trim_matches('│').split('┆').map(str::trim);
            let [_, pid, state, _, _, adopted, _, restarts, last_exit] =
                Vec::from_iter(cells).try_into().unwrap();
            Some(Row {
                pid: pid.parse().ok()?, // fails for the header, and while a worker is restarting
                state: state.to_owned(),
                adopted: adopted.parse().unwrap(),
                restarts: restarts.parse().unwrap(),
                last_exit: last_exit.to_owned(),
            })
        });
        rows.collect()
    }
}

#[tokio::test]
async fn a_picture_on_a_terminal_shows_the_workers_and_changes_after_a_kill() {
    // Both workers are ready, and have done nothing yet.
    let mut watched = Watched::start();
    let is_ready = |row: &Row| row.state == "ready";
    until("both workers are ready", || {
        let rows = watched.rows();
        rows.len() == 2 && rows.iter().all(is_ready)
    })
    .await;
    let picture = watched.picture();
    let address = picture.split_once("http://").unwrap().1.split('/').next().unwrap();
    let (address, before) = (address.parse().unwrap(), watched.rows());
    assert!(before.iter().all(|row| row.restarts == 0 && row.last_exit.is_empty()), "{before:?}");
    assert!(before.iter().all(|row| row.adopted == 0), "{before:?}");

    // The picture shows an adoption, and a restart after a kill.
    let victim = get(address).await.unwrap();
    until("the adoption is shown", || {
        watched.rows().iter().any(|row| row.pid == victim.as_raw() && row.adopted == 1)
    })
    .await;
    assert!(watched.picture().contains(": adopted 1 ("), "{}", watched.picture());
    kill(victim, Signal::SIGKILL).unwrap();
    until("the restart is shown", || {
        let rows = watched.rows();
        let again = rows.iter().find(|row| row.restarts == 1);
        again.is_some_and(|row| {
            is_ready(row) && row.pid != victim.as_raw() && row.last_exit.contains("SIGKILL")
        })
    })
    .await;

    kill(Pid::from_raw(watched.child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    assert!(soon("the end", watched.child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn lines_without_a_terminal_show_the_numbers_and_a_demo_ends_with_its_report() {
    let mut command = example();
    command.args(["--watch", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut line = async || soon("a line", lines.next_line()).await.unwrap().unwrap();
    let first = line().await;
    let address = first.split_once("http://").unwrap().1.trim_end_matches('/').parse().unwrap();
    while !line().await.contains("ready 2 of 2") {}
    get(address).await.unwrap();
    let mut last = line().await;
    while !last.contains(": adopted 1 (") {
        last = line().await;
    }
    assert!(!last.contains('\x1b') && last.contains("p50 "), "{last:?}");
    kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    assert!(soon("the end", child.wait()).await.unwrap().success());

    let demo = example().args(["--watch", "--demo", "300"]).output();
    let output = tokio::time::timeout(PATIENCE, demo).await.unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("waiting 0, offered again"), "{text}");
    assert!(text.contains("│ answered"), "{text}");
}
