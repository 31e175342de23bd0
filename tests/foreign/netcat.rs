//! `nc -F` of OpenBSD's netcat connects, passes the connection over its standard output, attached
//! to one zero byte, and ends.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use fdwire::{Framed, Socket, codec::PacketCodec};
use futures::TryStreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{Daemon, common::run, installed, skipped};

#[test]
fn netcat_connects_and_passes_the_connection() {
    let Some(program) = installed("nc") else { return };
    let help = Command::new(&program).arg("-h").output().unwrap().stderr;
    if !String::from_utf8_lossy(&help).contains("Pass socket fd") {
        return skipped("nc is not OpenBSD's");
    }
    run(async {
        // netcat connects to a server of the test.
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, its_stdout) = UnixStream::pair().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(&program);
        command.args(["-F", "127.0.0.1", &server.local_addr().unwrap().port().to_string()]);
        command.stdin(Stdio::null()).stdout(OwnedFd::from(its_stdout));
        let mut program = Daemon::start(&mut command, directory.path());
        drop(command); // and with it our copy of its standard output

        // It passes the connection, and ends.
        let mut netcat = Framed::new(Socket::try_from(ours).unwrap(), PacketCodec::default());
        let frame = netcat.try_next().await.unwrap().unwrap();
        assert_eq!(frame.payload, &b"\0"[..]);
        let [connection] = frame.fds.into_array().unwrap();
        let mut client = TcpStream::from_std(connection.into()).unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        assert_eq!(client.local_addr().unwrap(), served.peer_addr().unwrap());
        assert!(netcat.try_next().await.unwrap().is_none());
        assert!(program.ended().await.success());

        // The passed connection leads to the server.
        client.write_all(b"over a passed connection").await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = String::new();
        served.read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "over a passed connection");
    });
}
