//! The processes of a test: one victim, and one with all attackers.

use std::{
    fs,
    io::Read,
    os::unix::{net::UnixStream as StdUnixStream, process::CommandExt},
    path::PathBuf,
    process::{Child, Command},
};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::{attackers, victim};
use crate::{
    common::{role_socket, spawn_role_by},
    soon,
};

/// The user that a process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Identity {
    /// The uid of the test.
    Own,
    Uid(u32),
    /// The uid of the test, in a user namespace that maps no uid.
    UserNamespace,
}

/// The role of a process in a test, with its settings.
#[derive(Serialize, Deserialize)]
pub(super) enum Role {
    Victim(victim::Settings),
    Attackers(attackers::Settings),
}

/// A process with a role in a test. It is killed when this is dropped, and when the test ends.
pub(super) struct Process {
    child: Child,
    control: BufReader<UnixStream>,
}

/// The test that is started again for a role.
const ROLE: &str = "crowd::process::a_process_of_these_tests";

#[test]
fn a_process_of_these_tests() {
    let Some(socket) = role_socket(ROLE) else { return };
    set_pdeathsig(Signal::SIGKILL).unwrap();
    let mut control = StdUnixStream::from(socket);
    let role = read_line(&mut control);
    match serde_json::from_str(&role).expect("the test has ended") {
        Role::Victim(settings) => victim::run(control, &settings),
        Role::Attackers(settings) => attackers::run(control, settings),
    }
}

/// Reads a line, and nothing that follows it.
fn read_line(control: &mut StdUnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while control.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

impl Process {
    pub(super) async fn start(identity: Identity, role: &Role) -> Self {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        // Another uid may have no access to the path of this executable.
        let mut command = Command::new("/proc/self/exe");
        match identity {
            Identity::Own => {}
            Identity::Uid(uid) => {
                command.uid(uid).gid(uid);
            }
            Identity::UserNamespace => {
                command = Command::new("unshare");
                command.arg("--user").arg(std::env::current_exe().unwrap());
            }
        }
        // Otherwise the allocator keeps large buffers that were freed.
        command.env("MALLOC_MMAP_THRESHOLD_", (64 << 10).to_string());
        let child = spawn_role_by(command, ROLE, theirs.into());
        ours.set_nonblocking(true).unwrap();
        let mut process =
            Self { child, control: BufReader::new(UnixStream::from_std(ours).unwrap()) };
        process.send(role).await;
        process
    }

    async fn send(&mut self, message: &impl Serialize) {
        let line = serde_json::to_string(message).unwrap() + "\n";
        self.control.write_all(line.as_bytes()).await.unwrap();
    }

    /// Waits for a message of the process.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> T {
        let mut line = String::new();
        soon("a message of a process", self.control.read_line(&mut line)).await.unwrap();
        serde_json::from_str(&line).expect("the process has ended")
    }

    /// Requests a report from the process, and waits for it.
    pub(super) async fn report<T: DeserializeOwned>(&mut self) -> T {
        self.send(&()).await;
        self.next().await
    }

    /// Returns the number of threads.
    pub(super) fn threads(&self) -> usize {
        fs::read_dir(self.proc("task")).unwrap().count()
    }

    /// Returns the number of open descriptors.
    pub(super) fn fds(&self) -> usize {
        // Since Linux 6.2 the size of the directory is its number of entries. Counting twenty
        // thousand of them takes too long.
        match fs::metadata(self.proc("fd")).unwrap().len() {
            0 => fs::read_dir(self.proc("fd")).unwrap().count(),
            entries => entries as usize,
        }
    }

    fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.child.id()).into()
    }

    /// Returns the most memory that the process has had, in bytes.
    pub(super) fn peak_bytes(&self) -> usize {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("the process has ended");
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib << 10
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
