//! A server that is a process of its own.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::{Child, Command},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::common::spawn_role_by;

/// A process that runs a test of this binary in another role, and reports a line for each step.
pub(crate) struct Process {
    pub(crate) child: Child,
    reports: BufReader<UnixStream>,
}

impl Process {
    /// Starts the test with this name.
    pub(crate) fn start(role: &str, variables: &[(&str, String)]) -> Self {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut command = Command::new("/proc/self/exe");
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Self { child: spawn_role_by(command, role, there.into()), reports: BufReader::new(here) }
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
