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
mod intruders;
mod listeners;
mod namespaces;
mod processes;
mod supervisor;
mod undo;
mod workers;

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use fdwire::takeover::{self, Gated, Listeners, Options, Pending, Server, protocol::Address};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// A directory with a path for a control socket.
pub(crate) fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    (directory, path)
}

/// A server with one TCP listener, "http".
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

pub(crate) fn address(server: &Server) -> SocketAddr {
    match server.identities()[0].address {
        Address::Ip(address) => address,
        ref other => panic!("{other}"),
    }
}

pub(crate) fn http(server: &Server) -> Gated<tokio::net::TcpListener> {
    server.gated("http", 0).unwrap()
}

/// A client that connects now is accepted by this server.
pub(crate) async fn check_serves(server: &Server, address: SocketAddr) {
    let http = http(server);
    let (client, accepted) = tokio::join!(TcpStream::connect(address), http.accept());
    let (client, (_, peer)) = (client.unwrap(), accepted.unwrap());
    assert_eq!(client.local_addr().unwrap(), peer);
}

/// A server does not accept although a client waits. The client is left to the other process.
pub(crate) async fn check_does_not_serve(server: &Server, address: SocketAddr) -> TcpStream {
    let http = http(server);
    let client = TcpStream::connect(address).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(30), http.accept()).await.is_err());
    client
}
