//! A new process takes the listeners of a running server.

#[path = "../common/mod.rs"]
mod common;
mod datagrams;
mod drain;
mod generations;
mod groups;
#[cfg(feature = "axum")]
mod http;
mod hundred;
mod idle;
mod intruders;
mod kills;
mod lanes;
mod listeners;
mod namespaces;
mod process;
mod processes;
mod rules;
mod shortage;
mod supervisor;
mod undo;
mod versions;
mod workers;

use std::{
    fs::File,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use fdwire::{
    Framed, Socket, SocketKind,
    takeover::{
        self, Error, Gated, Listeners, Options, Pending, Server,
        protocol::{Address, FromTaker, Refusal, TakerCodec, ToTaker},
    },
};
use futures::{SinkExt, StreamExt};
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;
use tokio::{net::TcpStream, process::Command};

/// Makes a directory. Returns it with a path in it for a control socket.
pub(crate) fn control_path() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    (directory, path)
}

/// Starts a server with one TCP listener, "http".
pub(crate) fn first(path: &Path) -> Server {
    first_with(path, Options::default())
}

pub(crate) fn first_with(path: &Path, options: Options) -> Server {
    let mut listeners = Listeners::new();
    listeners.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    Server::bind(path, listeners, options).unwrap()
}

pub(crate) async fn request(path: &Path) -> Pending {
    takeover::request(path, Options::default()).await.unwrap()
}

/// Asks for a takeover until the server has noticed the end of the one before.
pub(crate) async fn request_until_not_busy(path: &Path) -> Pending {
    loop {
        match takeover::request(path, Options::default()).await {
            Err(Error::Refused(Refusal::Busy)) => tokio::task::yield_now().await,
            requested => return requested.unwrap(),
        }
    }
}

/// Connects to a server with the codec of the protocol alone.
pub(crate) async fn raw_taker(path: &Path) -> Framed<TakerCodec> {
    Framed::new(Socket::connect(path, SocketKind::SeqPacket).await.unwrap(), TakerCodec::default())
}

/// Asks for a takeover with the codec alone, and receives everything up to COMPLETE.
pub(crate) async fn offered_to_raw_taker(path: &Path) -> (Framed<TakerCodec>, Vec<ToTaker>) {
    loop {
        let mut taker = raw_taker(path).await;
        taker.send(FromTaker::Hello { lowest: 1, highest: 1 }).await.unwrap();
        let mut offered = Vec::new();
        while let Some(message) = taker.next().await {
            match message.unwrap() {
                ToTaker::Complete => return (taker, offered),
                // The server has not noticed the end of the takeover before yet.
                ToTaker::Refused { .. } => break,
                other => offered.push(other),
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Returns true if a process holds the lock of a path.
pub(crate) fn is_locked(path: &Path) -> bool {
    let lock = File::open(path.with_extension("lock"));
    lock.is_ok_and(|lock| Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err())
}

/// Returns a command that runs the test `role` of this binary as a server process.
pub(crate) fn server_command(role: &str, path: &Path, address: SocketAddr) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([role, "--exact", "--nocapture"]).env("FDWIRE_ROLE", role).kill_on_drop(true);
    command.env("FDWIRE_PATH", path).env("FDWIRE_ADDRESS", address.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Returns true in a process that was started with [`server_command`] for this test.
pub(crate) fn is_role(role: &str) -> bool {
    std::env::var("FDWIRE_ROLE").is_ok_and(|found| found == role)
}

/// Returns the path and the address that [`server_command`] has given this process.
pub(crate) fn path_and_address() -> (PathBuf, SocketAddr) {
    let path = PathBuf::from(std::env::var_os("FDWIRE_PATH").unwrap());
    (path, std::env::var("FDWIRE_ADDRESS").unwrap().parse().unwrap())
}

pub(crate) fn address(server: &Server) -> SocketAddr {
    match server.identities()[0].address {
        Address::Ip(address) => address,
        ref other => panic!("{other}"),
    }
}

pub(crate) fn http(server: &Server) -> Gated<tokio::net::TcpListener> {
    server.gated("http", 0).unwrap()
}

/// Checks that a client that connects now is accepted by this server.
pub(crate) async fn check_serves(server: &Server, address: SocketAddr) {
    let http = http(server);
    let (client, accepted) = tokio::join!(TcpStream::connect(address), http.accept());
    let (client, (_, peer)) = (client.unwrap(), accepted.unwrap());
    assert_eq!(client.local_addr().unwrap(), peer);
}

/// Checks that a server does not accept although a client waits. Returns the client, which is left
/// to the other process.
pub(crate) async fn check_does_not_serve(server: &Server, address: SocketAddr) -> TcpStream {
    let http = http(server);
    let client = TcpStream::connect(address).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(30), http.accept()).await.is_err());
    client
}
