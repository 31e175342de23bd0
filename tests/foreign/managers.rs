//! Process managers that pass listeners to a service: systemd, Server::Starter and einhorn. The
//! service starts with `takeover::bind_or_take`, so a further process of it can replace it, with
//! the manager or without.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use fdwire::{
    systemd::take_stored,
    takeover::{self, Listeners, Options, Server, protocol::Kind},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};

use crate::{
    Daemon,
    common::{PASSED, descriptors_of_a_child, mark_of, marked, run, run_and_pass},
    installed,
};

const ROLE: &str = "managers::systemd_passes_named_listeners";

/// Runs the service, in a process of its own. Both listeners answer with its process id.
async fn serve(name: &str) {
    // Take the listeners: from the manager, from a running process, or by binding them.
    let variable = |name| std::env::var_os(name).unwrap();
    let address: SocketAddr = variable("FDWIRE_ADDRESS").to_str().unwrap().parse().unwrap();
    let admin = PathBuf::from(variable("FDWIRE_ADMIN"));
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.bind_tcp(name, address)?;
        listeners.bind_path("admin", &admin, Kind::Stream, 0o600)?;
        Ok(listeners)
    };
    let pending =
        takeover::bind_or_take(variable("FDWIRE_PATH"), Options::default(), bind).await.unwrap();
    assert!(!descriptors_of_a_child().contains("socket:"), "a child has a copy of a listener");

    // Serve until another process of the service has taken over.
    let server = pending.ready().await.unwrap();
    let serving = async {
        let tcp = server.gated::<TcpListener>(name, 0).unwrap();
        let unix = server.gated::<UnixListener>("admin", 0).unwrap();
        let answer = std::process::id().to_string();
        loop {
            tokio::select! {
                Ok((mut client, _)) = tcp.accept() => {
                    client.write_all(answer.as_bytes()).await.unwrap();
                }
                Ok((mut client, _)) = unix.accept() => {
                    client.write_all(answer.as_bytes()).await.unwrap();
                }
                else => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        () = serving => {}
        () = wait_for_replacement(&server) => {}
    }
}

async fn wait_for_replacement(server: &Server) {
    server.replaced().await;
    assert!(server.drained().await);
}

/// The directory and the addresses of one service.
struct Place {
    directory: tempfile::TempDir,
    address: SocketAddr,
}

impl Place {
    fn new() -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Self { directory: tempfile::tempdir().unwrap(), address: listener.local_addr().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn admin(&self) -> PathBuf {
        self.path("admin")
    }

    /// Adds the service to the arguments of a command, and its place to the environment.
    fn service(&self, mut command: Command) -> Command {
        command.arg(std::env::current_exe().unwrap()).args([ROLE, "--exact", "--nocapture"]);
        command.envs(self.environment());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn environment(&self) -> [(&'static str, PathBuf); 4] {
        let address = self.address.to_string().into();
        let path = self.path("takeover");
        [
            ("FDWIRE_ROLE", ROLE.into()),
            ("FDWIRE_ADDRESS", address),
            ("FDWIRE_ADMIN", self.admin()),
            ("FDWIRE_PATH", path),
        ]
    }

    fn start(&self, command: Command) -> Daemon {
        Daemon::start(&mut self.service(command), self.directory.path())
    }

    /// Starts a process of the service without a manager.
    fn start_alone(&self) -> Daemon {
        self.start(Command::new("env"))
    }

    /// Waits until a process that is not one of `others` answers on both listeners.
    async fn wait_for_another(&self, daemon: &mut Daemon, others: &[u32]) -> u32 {
        daemon
            .ready(async || -> io::Result<u32> {
                let tcp = pid_from(TcpStream::connect(self.address).await?).await?;
                let unix = pid_from(UnixStream::connect(self.admin()).await?).await?;
                if tcp == unix && !others.contains(&tcp) {
                    Ok(tcp)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                }
            })
            .await
    }
}

async fn pid_from(mut connection: impl tokio::io::AsyncRead + Unpin) -> io::Result<u32> {
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    answer.parse().map_err(io::Error::other)
}

/// Replaces a service that a manager has started by one without a manager, and that one by another.
async fn leave_the_manager(place: &Place, first: u32) {
    let mut second = place.start_alone();
    let pid = second.child.id();
    assert_eq!(place.wait_for_another(&mut second, &[first]).await, pid);
    let mut third = place.start_alone();
    place.wait_for_another(&mut third, &[first, pid]).await;
    assert_eq!(second.ended().await.code(), Some(PASSED));
}

#[test]
fn systemd_passes_named_listeners() {
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == ROLE) {
        return run_and_pass(serve("http"));
    }
    let Some(program) = installed("systemd-socket-activate") else { return };
    run(async {
        let place = Place::new();
        let mut command = Command::new(&program);
        command.args([
            "--fdname=http:admin",
            "-l",
            &place.address.to_string(),
            "-l",
            place.admin().to_str().unwrap(),
        ]);
        command.args(
            place.environment().map(|(name, value)| format!("--setenv={name}={}", value.display())),
        );
        let mut manager = place.start(command);
        let first = place.wait_for_another(&mut manager, &[]).await;
        assert_eq!(first, manager.child.id(), "the manager becomes the service by exec");
        leave_the_manager(&place, first).await;
        assert_eq!(manager.ended().await.code(), Some(PASSED));
    });
}

/// Without a name, a listener is recognized by its address.
#[test]
fn systemd_passes_listeners_without_names() {
    let Some(program) = installed("systemd-socket-activate") else { return };
    run(async {
        let place = Place::new();
        let mut command = Command::new(&program);
        command.args(["-l", place.admin().to_str().unwrap(), "-l", &place.address.to_string()]);
        command.args(
            place.environment().map(|(name, value)| format!("--setenv={name}={}", value.display())),
        );
        let mut manager = place.start(command);
        place.wait_for_another(&mut manager, &[]).await;
    });
}

#[test]
fn a_listener_of_the_right_name_at_another_address_is_refused() {
    let Some(program) = installed("systemd-socket-activate") else { return };
    run(async {
        let (place, elsewhere) = (Place::new(), Place::new());
        let mut command = Command::new(&program);
        command.args(["--fdname=http", "-l", &elsewhere.address.to_string()]);
        command.args(
            place.environment().map(|(name, value)| format!("--setenv={name}={}", value.display())),
        );
        let mut manager = place.start(command);
        manager.ready(async || TcpStream::connect(elsewhere.address).await).await;
        assert!(!manager.ended().await.success());
        let errors = std::fs::read_to_string(&manager.log).unwrap();
        let expected = format!(
            "Address {{ expected: Ip({}), found: Ip({}) }}",
            place.address, elsewhere.address
        );
        assert!(errors.contains(&expected), "{errors}");
    });
}

/// A worker that Server::Starter starts again (SIGHUP) takes over from the one before, although
/// both have the same listeners.
#[test]
fn server_starter_passes_its_listeners_to_each_generation() {
    let Some(program) = installed("start_server") else { return };
    run(async {
        let place = Place::new();
        let mut command = Command::new(&program);
        command
            .args([
                format!("--port={}", place.address),
                format!("--path={}", place.admin().display()),
            ])
            .arg("--");
        let mut manager = place.start(command);
        let first = place.wait_for_another(&mut manager, &[]).await;
        kill(Pid::from_raw(manager.child.id() as i32), Signal::SIGHUP).unwrap();
        let second = place.wait_for_another(&mut manager, &[first]).await;
        // The first worker leaves by itself.
        manager
            .ready(
                async || {
                    if Path::new(&format!("/proc/{first}/exe")).exists() { Err(()) } else { Ok(()) }
                },
            )
            .await;
        leave_the_manager(&place, second).await;
    });
}

/// Stands in for einhorn, which is not in Debian: binds as `einhorn -b ADDRESS` does, and sets the
/// variables that its `prepare_child_environment` sets. Its old versions set only `EINHORN_FDS`.
const EINHORN: &str = r#"
import os, socket, sys
host, port = sys.argv[1].rsplit(":", 1)
tcp = socket.create_server((host, int(port)))
tcp.set_inheritable(True)
if os.fork() == 0:
    environment = dict(os.environ)
    environment["EINHORN_MASTER_PID"] = str(os.getppid())
    environment["EINHORN_FDS"] = str(tcp.fileno())
    if sys.argv[2] == "new":
        environment["EINHORN_FD_COUNT"] = "1"
        environment["EINHORN_FD_0"] = str(tcp.fileno())
    os.execve(sys.argv[3], sys.argv[3:], environment)
os.wait()
"#;

#[test]
fn einhorn_passes_numbers_in_two_ways() {
    let Some(python) = installed("python3") else { return };
    for variables in ["new", "old"] {
        run(async {
            let place = Place::new();
            let mut command = Command::new(&python);
            command.args(["-c", EINHORN, &place.address.to_string(), variables]);
            let mut manager = place.start(command);
            // einhorn passes no Unix socket, so the service has bound that itself.
            let first = place.wait_for_another(&mut manager, &[]).await;
            leave_the_manager(&place, first).await;
        });
    }
}

/// A service that has left its descriptors with systemd finds them after a crash: a listener by its
/// name, and other files.
#[test]
fn stored_descriptors_come_back_by_their_names() {
    const TEST: &str = "managers::stored_descriptors_come_back_by_their_names";
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == TEST) {
        return run_and_pass(async {
            let address = std::env::var("FDWIRE_ADDRESS").unwrap().parse().unwrap();

            // A socket that a failed attempt has used is there for the next one.
            for _attempt in 0..3 {
                let mut listeners = Listeners::new();
                listeners.bind_tcp("http", address).unwrap();
                let refused = listeners.bind_tcp("other", address).unwrap_err();
                assert_eq!(io::Error::from(refused).kind(), io::ErrorKind::AddrInUse);
            }

            // The listener goes to a server, and the other file is taken by its name.
            let mut listeners = Listeners::new();
            listeners.bind_tcp("http", address).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let _server =
                Server::bind(directory.path().join("takeover"), listeners, Options::default())
                    .unwrap();
            let stored = take_stored("session").collect::<io::Result<Vec<_>>>().unwrap();
            assert_eq!(stored.iter().map(mark_of).collect::<Vec<_>>(), [7]);
            assert_eq!(take_stored("session").count(), 0, "each is taken once");
            assert_eq!(take_stored("http").count(), 0, "the server has it");
            assert!(
                !descriptors_of_a_child().contains("socket:"),
                "a child has a copy of a listener"
            );
        });
    }
    // systemd itself executes a service in this way.
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut shell = Command::new("sh");
    shell.args(["-c", "LISTEN_PID=$$ exec \"$@\" 3<&0 4<&1 </dev/null >/dev/null", "sh"]);
    shell.arg(std::env::current_exe().unwrap()).args([TEST, "--exact", "--nocapture"]);
    shell
        .env("LISTEN_FDS", "2")
        .env("LISTEN_FDNAMES", "session:http")
        .env("FDWIRE_ADDRESS", address);
    shell.env("FDWIRE_ROLE", TEST).stdin(marked(7)).stdout(OwnedFd::from(listener));
    assert_eq!(shell.status().unwrap().code(), Some(PASSED));
}
