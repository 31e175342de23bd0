//! The outcome of a takeover, as the command that starts the new process learns it, and a service
//! manager.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::linux::net::SocketAddrExt,
    path::{Path, PathBuf},
    time::Duration,
};

use fdwire::{
    socket::{Datagram, DatagramSocket, PassCredentials},
    systemd::Notifier,
    takeover::{self, Error, Listeners, Options},
};
use tokio::process::{Child, Command};

use crate::{
    common::*, control_path, is_role, path_and_address, process::free_address, server_command,
};

const ROLE: &str = "supervisor::launch_returns_once_the_new_process_serves";
const PATIENCE: Duration = Duration::from_secs(30);

/// Is a server process. `FDWIRE_FAILS` has the way in which it fails before it is ready.
async fn serve() {
    // Take the listeners, or bind them. Then fail, if the test wants that.
    let (path, address) = path_and_address();
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.bind_tcp("http", address)?;
        Ok(listeners)
    };
    let options = Options::default().drain(Duration::from_millis(10), PATIENCE);
    let pending = takeover::bind_or_take(&path, options, bind).await.unwrap();
    match std::env::var("FDWIRE_FAILS").as_deref() {
        Ok("exits") => std::process::exit(7),
        Ok("hangs") => return std::future::pending().await,
        _ => {}
    }
    // Serve until another process has taken over, and send the service manager each step.
    let server = pending.ready().await.unwrap();
    let notifier = Notifier::from_env().unwrap();
    let http = server.gated::<tokio::net::TcpListener>("http", 0).unwrap();
    let serving = async {
        while let Ok((connection, _)) = http.accept().await {
            let connection = connection.into_std().unwrap();
            write!(&connection, "{}", std::process::id()).unwrap();
        }
        std::future::pending().await // the process was replaced for good
    };
    let following = async { tokio::join!(server.finish(), notifier.follow(&server)) };
    tokio::select! {
        (_, notified) = following => notified.unwrap(),
        () = serving => unreachable!(),
    }
}

struct Service {
    _directory: tempfile::TempDir,
    path: PathBuf,
    address: SocketAddr,
}

impl Service {
    fn new() -> Self {
        let (_directory, path) = control_path();
        Self { _directory, path, address: free_address() }
    }

    fn command(&self) -> Command {
        server_command(ROLE, &self.path, self.address)
    }

    async fn launch(&self, command: &mut Command, limit: Duration) -> Result<Child, Error> {
        takeover::launch(command, &self.path, &Options::default(), limit).await
    }

    /// Returns the process id of the server that answers a new client.
    fn pid(&self) -> u32 {
        let mut answer = String::new();
        TcpStream::connect(self.address).unwrap().read_to_string(&mut answer).unwrap();
        answer.parse().unwrap()
    }
}

#[test]
fn launch_returns_once_the_new_process_serves() {
    if is_role(ROLE) {
        return run(serve());
    }
    run(async {
        let service = Service::new();
        let mut first = service.launch(&mut service.command(), PATIENCE).await.unwrap();
        assert_eq!(Some(service.pid()), first.id());
        let second = service.launch(&mut service.command(), PATIENCE).await.unwrap();
        assert_eq!(Some(service.pid()), second.id());
        let status = takeover::status(&service.path, &Options::default()).await.unwrap();
        assert_eq!((Some(status.pid), status.takeover_in_progress), (second.id(), false));
        assert!(first.wait().await.unwrap().success());
    });
}

#[test]
fn launch_fails_if_the_new_process_ends_before_it_serves() {
    run(async {
        let service = Service::new();
        let mut failing = service.command();
        failing.env("FDWIRE_FAILS", "exits");
        // No server runs.
        for _ in 0..2 {
            let error = service.launch(&mut failing, PATIENCE).await.unwrap_err();
            assert!(
                matches!(error, Error::Ended { status } if status.code() == Some(7)),
                "{error}"
            );
        }
        // A server runs, and goes on.
        let first = service.launch(&mut service.command(), PATIENCE).await.unwrap();
        let error = service.launch(&mut failing, PATIENCE).await.unwrap_err();
        assert_eq!(error.to_string(), "the new process ended before it served: exit status: 7");
        assert_eq!(Some(service.pid()), first.id());
        let missing =
            service.launch(&mut Command::new("/nonexistent"), PATIENCE).await.unwrap_err();
        assert!(matches!(missing, Error::Io(_)), "{missing}");
    });
}

#[test]
fn launch_fails_if_the_new_process_hangs_and_leaves_none_behind() {
    run(async {
        let service = Service::new();
        let first = service.launch(&mut service.command(), PATIENCE).await.unwrap();
        let mut hanging = service.command();
        hanging.env("FDWIRE_FAILS", "hangs");
        let limit = Duration::from_millis(300);
        let error = service.launch(&mut hanging, limit).await.unwrap_err();
        assert!(matches!(error, Error::TooLate { .. }), "{error}");
        assert_eq!(Some(service.pid()), first.id());
        // The next process takes over.
        let second = loop {
            match service.launch(&mut service.command(), PATIENCE).await {
                Err(Error::Ended { .. }) => {} // the server has not noticed the last end yet
                launched => break launched.unwrap(),
            }
        };
        assert_eq!(Some(service.pid()), second.id());
    });
}

/// Receives until `until` is true. Returns the first line of each message, in their order, for each
/// process. Checks that only the barrier of a process comes with a descriptor.
async fn messages(
    manager: &DatagramSocket,
    until: impl Fn(&BTreeMap<i32, Vec<String>>) -> bool,
) -> BTreeMap<i32, Vec<String>> {
    let mut messages = BTreeMap::<i32, Vec<String>>::new();
    while !until(&messages) {
        let Datagram { payload, credentials, fds, .. } = manager.recv().await.unwrap();
        let text = String::from_utf8(payload.to_vec()).unwrap();
        assert_eq!(fds.len(), usize::from(text == "BARRIER=1"), "{text}");
        let (first, rest) = text.split_once('\n').unwrap_or((&text, ""));
        if first == "RELOADING=1" {
            let time = rest.strip_prefix("MONOTONIC_USEC=").unwrap();
            assert!(time.parse::<u64>().unwrap() > 0);
        } else {
            assert_eq!(rest, "");
        }
        let of_process = messages.entry(credentials.unwrap().pid.unwrap()).or_default();
        of_process.push(first.to_owned());
    }
    messages
}

#[test]
fn a_service_manager_learns_of_each_step_before_the_old_process_leaves() {
    run(async {
        // A process serves. A takeover that fails is a reload that has ended.
        let service = Service::new();
        let name = abstract_name("supervisor");
        let manager = DatagramSocket::bind_addr(&name).unwrap();
        manager.set_pass_credentials(PassCredentials::Ids).unwrap();
        let text = format!("@{}", str::from_utf8(name.as_abstract_name().unwrap()).unwrap());
        let command = || {
            let mut command = service.command();
            command.env("NOTIFY_SOCKET", &text);
            command
        };
        let mut first = service.launch(&mut command(), PATIENCE).await.unwrap();
        let old = first.id().unwrap() as i32;
        let mut failing = command();
        failing.env("FDWIRE_FAILS", "exits");
        service.launch(&mut failing, PATIENCE).await.unwrap_err();
        let has_three = |received: &BTreeMap<i32, Vec<String>>| {
            received.get(&old).is_some_and(|messages| messages.len() == 3)
        };
        let received = messages(&manager, has_three).await;
        assert_eq!(received[&old], ["READY=1", "RELOADING=1", "READY=1"]);

        // A takeover succeeds. The old process names the new one before it leaves.
        let second = service.launch(&mut command(), PATIENCE).await.unwrap();
        let new = second.id().unwrap();
        let has_ended = |received: &BTreeMap<i32, Vec<String>>| {
            let old_has = received
                .get(&old)
                .is_some_and(|messages| messages.last().is_some_and(|last| last == "BARRIER=1"));
            old_has && received.contains_key(&(new as i32))
        };
        let received = messages(&manager, has_ended).await;
        let expected = ["RELOADING=1", "READY=1", &format!("MAINPID={new}"), "BARRIER=1"];
        assert_eq!(
            (&received[&old][..], &received[&(new as i32)][..]),
            (&expected.map(str::to_owned)[..], &["READY=1".to_owned()][..])
        );
        assert!(first.wait().await.unwrap().success());
        assert_eq!(service.pid(), new);
    });
}

/// The old process stays until the manager has closed the barrier, so that it has read MAINPID.
#[test]
fn the_old_main_process_waits_for_the_manager_before_it_leaves() {
    run(async {
        let service = Service::new();
        let manager = DatagramSocket::bind(service.path.with_extension("notify")).unwrap();
        let command = || {
            let mut command = service.command();
            command.env("NOTIFY_SOCKET", service.path.with_extension("notify"));
            command
        };
        let mut first = service.launch(&mut command(), PATIENCE).await.unwrap();
        let _second = service.launch(&mut command(), PATIENCE).await.unwrap();
        let barrier = loop {
            let datagram = manager.recv().await.unwrap();
            if datagram.payload == "BARRIER=1" {
                break datagram;
            }
        };
        settle().await;
        assert!(first.try_wait().unwrap().is_none(), "it has left");
        drop(barrier);
        assert!(first.wait().await.unwrap().success());
    });
}

#[test]
fn the_status_of_a_path_without_a_server_is_an_error() {
    run(async {
        let error = takeover::status(Path::new("/nonexistent/path"), &Options::default())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
    });
}
