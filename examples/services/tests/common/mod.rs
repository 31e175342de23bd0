//! Runs the services that share `front.rs`.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

/// The time limit for anything that should happen soon. It is long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} should have come by now"))
}

/// A running service, which is killed when this is dropped. Its workers end with it.
pub(crate) struct Front {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    pub(crate) address: String,
}

impl Front {
    /// Starts a service whose workers have this number of seconds to finish.
    pub(crate) async fn start(program: &str, limit: u32) -> Self {
        let mut command = Command::new(program);
        command.args(["--listen", "127.0.0.1:0", "--limit", &limit.to_string()]);
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut front = Self { child, lines, address: String::new() };
        front.address = front.line("listening on ").await;
        front
    }

    /// Waits for a line of the service that contains `beginning`. Returns the rest of the line.
    pub(crate) async fn line(&mut self, beginning: &str) -> String {
        loop {
            let line = soon(beginning, self.lines.next_line()).await.unwrap();
            let line = line.unwrap_or_else(|| panic!("the end instead of {beginning:?}"));
            if let Some((_, rest)) = line.split_once(beginning) {
                return rest.to_owned();
            }
        }
    }

    pub(crate) async fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    /// Sends a SIGTERM, and checks that the service ends with success.
    pub(crate) async fn end(mut self) {
        self.signal("-TERM").await;
        assert!(soon("the end", self.child.wait()).await.unwrap().success());
    }
}
