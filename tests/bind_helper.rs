//! The example `bind_helper`, with services of another uid.

mod common;

use std::{
    fs::{Permissions, set_permissions},
    io::Read,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Output, Stdio},
};

use common::{example, other_uid};
use tempfile::TempDir;

/// A program in a directory of its own that every uid can run, and the helper's socket there.
struct Installed {
    directory: TempDir,
    /// The uid of the services.
    uid: u32,
}

impl Installed {
    /// Returns `None`, with the reason printed, if this process cannot change to another uid.
    fn new() -> Option<Self> {
        let installed = Self { uid: other_uid()?, directory: tempfile::tempdir().unwrap() };
        set_permissions(&installed.directory, Permissions::from_mode(0o755)).unwrap();
        let built = example("bind_helper");
        let mut install = Command::new("install");
        install.args(["-m", "755"]).arg(built.get_program()).arg(installed.at("bind_helper"));
        assert!(install.status().unwrap().success());
        Some(installed)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(self.at("bind_helper"));
        command.arg(action).arg("--path").arg(self.at("socket"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a helper with this allow-list. Returns when it listens.
    fn helper(&self, allow: &[String]) -> Running {
        let mut command = self.command("serve");
        command.args(allow.iter().map(|rule| format!("--allow={rule}")));
        let mut helper = Running::start(command);
        assert!(helper.line().starts_with("helper: listening on "));
        helper
    }

    /// Returns the command of a service of the other uid.
    fn service(&self, address: SocketAddr) -> Command {
        let mut command = self.command("run");
        command.arg(address.to_string()).args(["--clients", "2"]).uid(self.uid).gid(self.uid);
        command
    }

    /// Runs a service that gets no listener. Returns its standard error.
    fn refused(&self, address: SocketAddr) -> String {
        let Output { status, stderr, stdout } = self.service(address).output().unwrap();
        assert_eq!((status.code(), stdout), (Some(1), Vec::new()));
        String::from_utf8(stderr).unwrap()
    }
}

/// A process that is killed when it is dropped.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// Returns the next line of its output.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// Returns an address with a free port that only root may bind.
fn privileged() -> SocketAddr {
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = (512..1024).rev().find(free).expect("a free privileged port");
    ([127, 0, 0, 1], port).into()
}

fn hello(address: SocketAddr) -> String {
    let mut text = String::new();
    TcpStream::connect(address).unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_service_that_is_not_root_serves_at_a_privileged_port_even_without_its_helper() {
    let Some(installed) = Installed::new() else { return };
    let (address, uid) = (privileged(), installed.uid);
    let mut helper = installed.helper(&[format!("{uid}:{}", address.port())]);
    let mut service = Running::start(installed.service(address));
    assert_eq!(service.line(), format!("service: uid {uid} listens on {address}"));
    assert_eq!(helper.line(), format!("helper: uid {uid} asks for {address}: granted"));
    assert_eq!(hello(address), format!("hello from uid {uid}\n"));
    drop(helper);
    assert_eq!(hello(address), format!("hello from uid {uid}\n"));
    assert!(service.child.wait().unwrap().success());
    // Nobody has kept a copy, so the port is free again.
    assert!(TcpListener::bind(address).is_ok());
}

#[test]
fn a_port_or_a_uid_that_is_not_listed_gets_the_reason_and_no_listener() {
    let Some(installed) = Installed::new() else { return };
    let (address, uid) = (privileged(), installed.uid);
    let port = address.port();
    let helper = installed
        .helper(&[format!("{uid}:{}-{}", port + 1, port + 1000), format!("{}:{port}", uid + 1)]);
    let denied = format!("error: cannot listen on {address}: Permission denied (os error 13)\n");
    assert_eq!(installed.refused(address), denied);
    drop(helper);

    let helper = installed.helper(&[format!("{}:{port}", uid + 1)]);
    let path = installed.at("socket");
    let not_served =
        format!("error: the helper at {} serves no request of this uid\n", path.display());
    assert_eq!(installed.refused(address), not_served);
    drop(helper);

    let missing = format!("error: cannot connect to {}: ", path.display());
    assert!(installed.refused(address).starts_with(&missing));
}

#[test]
fn a_service_gets_the_errno_of_the_helpers_bind_if_the_port_is_in_use() {
    let Some(installed) = Installed::new() else { return };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let _helper = installed.helper(&[format!("{}:1-65535", installed.uid)]);
    let in_use =
        format!("error: cannot listen on {address}: Address already in use (os error 98)\n");
    assert_eq!(installed.refused(address), in_use);
}
