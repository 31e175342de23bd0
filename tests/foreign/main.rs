//! Protocols of other programs, tested against those programs. The codecs use only the public API,
//! as those of a user would.
//!
//! A test whose program is not installed skips itself and prints why; with
//! `FDWIRE_REQUIRE_FOREIGN=1` it fails instead.

#[path = "../common/mod.rs"]
mod common;

mod dbus;
mod haproxy;
mod kinds;
mod lines;
mod managers;
mod mux;
mod netcat;
mod node;
mod packets;
mod payload;
mod python;
mod sd_notify;
mod skopeo;
mod ssh;
mod switch;
mod systemd;
mod uwsgi;
mod wayland;

use std::{
    fs::File,
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use common::{installed, mark_of, skipped};
use nix::{
    cmsg_space,
    sys::{
        signal::{Signal, killpg},
        socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
    },
    unistd::{Pid, close},
};

/// Makes one `recvmsg` of at most `room` bytes, without the code under test. Returns the bytes, and
/// the marks of the descriptors that came with them.
fn raw_recv(socket: &impl AsFd, room: usize) -> (Vec<u8>, Vec<u32>) {
    let (mut bytes, mut control) = (vec![0; room], cmsg_space!([RawFd; 253]));
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received =
        recvmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &mut pieces, Some(&mut control), flags)
            .expect("recvmsg succeeds");
    let mut marks = Vec::new();
    for message in received.cmsgs().unwrap() {
        let ControlMessageOwned::ScmRights(fds) = message else { continue };
        for fd in fds {
            marks.push(mark_of(&File::open(format!("/proc/self/fd/{fd}")).unwrap()));
            close(fd).unwrap();
        }
    }
    let count = received.bytes;
    bytes.truncate(count);
    (bytes, marks)
}

/// A program that runs until this is dropped. Then it is killed with all processes that it started,
/// and if the test has failed, its standard error is printed.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the program with its standard error in a file of `directory`.
    fn start(command: &mut Command, directory: &Path) -> Self {
        let log = directory.join("log");
        command.stderr(File::create(&log).unwrap()).process_group(0);
        let child = command.spawn().unwrap();
        Self { child, log }
    }

    /// Repeats an attempt until it succeeds, because the program is ready. The time limit of the
    /// test ends it if it never does.
    async fn ready<T, E>(&mut self, attempt: impl AsyncFn() -> Result<T, E>) -> T {
        let mut interval = tokio::time::interval(Duration::from_millis(20));
        loop {
            interval.tick().await;
            if let Ok(ready) = attempt().await {
                return ready;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the program has ended");
        }
    }

    /// Waits until the program ends by itself.
    async fn ended(&mut self) -> ExitStatus {
        let mut interval = tokio::time::interval(Duration::from_millis(20));
        loop {
            interval.tick().await;
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}
