//! Processes that connect to a server's path, or listen at it, and break the protocol or have no
//! right to take part.

use std::{
    fs::Permissions,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::Command,
};

use fdwire::{
    Framed, Listener, SendFd, Socket, SocketKind,
    takeover::{
        self, Error, Options,
        protocol::{FromTaker, GiverCodec, ToTaker},
    },
};
use futures::{SinkExt, StreamExt};

use crate::{
    check_serves, common::*, control_path, first, offered_to_raw_taker, raw_taker, request,
};

/// The messages come too early, in the wrong order, or from another protocol. (A single byte ends a
/// server of the crate volo that waits for its successor.)
///
/// Rules: T-HELLO, T-EARLY, G-BREACH.
#[test]
fn nothing_that_a_stranger_sends_stops_the_server() {
    run(async {
        // Each of these sequences is sent, with the connection closed afterwards, or left open.
        let (_directory, path) = control_path();
        let server = first(&path);
        let address = crate::address(&server);
        let ready = encoded(b"\x03", 0);
        let hello = encoded(b"\x01FDTO\x01\x01", 0);
        let foreign = encoded(b"\x01FDTO\x07\x09", 0);
        let release = encoded(b"\x05", 0);
        let back = encoded(b"\x04", 0);
        for bytes in [
            &b"x"[..],
            &ready,
            &[&hello[..], &hello].concat(),
            &foreign,
            &release,
            &back,
            b"GET / HTTP/1.1\r\n",
        ] {
            let socket = Socket::connect(&path, SocketKind::SeqPacket).await.unwrap();
            raw_send(&socket, bytes, &[]);
            drop(socket);
            let socket = Socket::connect(&path, SocketKind::SeqPacket).await.unwrap();
            let fd = OwnedFd::from(socket);
            raw_send(&fd, bytes, &[]);
            check_serves(&server, address).await;
        }
        // READY before the offer is complete does not count either.
        let socket = Socket::connect(&path, SocketKind::SeqPacket).await.unwrap();
        raw_send(&socket, &[&hello[..], &ready].concat(), &[]);
        check_serves(&server, address).await;
        drop(socket);
    });
}

/// Rules: G-VERSION, G-NO-VERSION.
#[test]
fn a_taker_of_another_version_learns_of_it() {
    run(async {
        let (_directory, path) = control_path();
        let _server = first(&path);
        let mut taker = raw_taker(&path).await;
        taker.send(FromTaker::Hello { lowest: 7, highest: 9 }).await.unwrap();
        let answer = taker.next().await.unwrap().unwrap();
        assert!(
            matches!(answer, ToTaker::Refused { reason: takeover::protocol::Refusal::Version }),
            "{answer:?}"
        );
        // A taker that supports this version and later ones is welcome, with this version.
        let mut taker = raw_taker(&path).await;
        taker.send(FromTaker::Hello { lowest: 1, highest: 9 }).await.unwrap();
        let answer = taker.next().await.unwrap().unwrap();
        assert!(matches!(answer, ToTaker::Welcome { version: 1, listeners: 1 }), "{answer:?}");
    });
}

/// A server of another uid at the path is not trusted, and a new process of another uid gets
/// nothing.
///
/// Rules: B-UID.
#[test]
fn other_uids_neither_get_listeners_nor_give_any() {
    const NAME: &str = "intruders::other_uids_neither_get_listeners_nor_give_any";
    if let Some(socket) = role_socket(NAME) {
        return run(be_another_uid(socket));
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        // A process of another uid asks for a takeover, and gets nothing.
        let (directory, path) = control_path();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let server = crate::first_with(&path, Options::default().mode(0o666));
        let address = crate::address(&server);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("/proc/self/exe");
        command.uid(uid).env("FDWIRE_PATH", directory.path());
        let mut child = spawn_role_by(command, NAME, theirs.into());
        let ours = tokio::task::spawn_blocking(move || (&ours).read_exact(&mut [0]).map(|()| ours))
            .await
            .unwrap();
        check_serves(&server, address).await;

        // That process listens at another path, where nothing is taken from it.
        let foreign = directory.path().join("foreign");
        let refused = takeover::request(&foreign, Options::default()).await.unwrap_err();
        assert!(matches!(refused, Error::NotTrusted { uid: found } if found == uid), "{refused}");
        drop(ours);
        assert!(child.wait().unwrap().success());
    });
}

/// Is the process of another uid: the server refuses it, and it listens at a path of its own.
async fn be_another_uid(socket: OwnedFd) {
    let directory = PathBuf::from(std::env::var_os("FDWIRE_PATH").unwrap());
    let refused =
        takeover::request(directory.join("control"), Options::default()).await.unwrap_err();
    assert!(!matches!(refused, Error::Io(_) | Error::Aborted(_) | Error::TimedOut), "{refused}");
    let _listener = Listener::bind(directory.join("foreign"), SocketKind::SeqPacket).unwrap();
    let mut parent = UnixStream::from(socket);
    parent.write_all(b"x").unwrap();
    assert_eq!(parent.read(&mut [0]).unwrap(), 0);
}

/// A process with another protocol listens at the path.
#[test]
fn a_foreign_process_at_the_path_is_a_clear_error() {
    run(async {
        let (_directory, path) = control_path();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let foreign = async {
            let socket = listener.accept().await.unwrap();
            raw_send(&socket, b"220 welcome\r\n", &[]);
            socket
        };
        let (requested, _socket) =
            tokio::join!(takeover::request(&path, Options::default()), foreign);
        let error = requested.unwrap_err();
        assert!(matches!(error, Error::Connection(_)), "{error}");

        // The process at the path sends nothing.
        let options = Options::default().answer_timeout(std::time::Duration::from_millis(10));
        let error = takeover::request(&path, options).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut), "{error}");
        // No process listens at the path.
        let error =
            takeover::request(path.with_extension("none"), Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
        // The process at the path closes the connection.
        let closing = async {
            drop(listener.accept().await.unwrap()); // the connection that has timed out
            drop(listener.accept().await.unwrap());
        };
        let (requested, ()) = tokio::join!(takeover::request(&path, Options::default()), closing);
        assert!(matches!(requested.unwrap_err(), Error::GiverGone));
    });
}

/// A giver announces one socket and sends another. The taker closes everything that it has sent.
///
/// Rules: T-COMPARE.
#[test]
fn a_socket_that_is_not_the_announced_one_is_refused() {
    run(async {
        // The offer of a true server gets another socket.
        let (_directory, path) = control_path();
        let (_directory2, path2) = control_path();
        let server = first(&path);
        let (taker, offer) = offered_to_raw_taker(&path).await;
        let listeners = offer.into_iter().find_map(|message| match message {
            ToTaker::Listeners(listeners) => Some(listeners),
            _ => None,
        });
        let mut offered = listeners.unwrap();
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        offered[0].fd = other.into();
        let offered = offered.into_iter().map(|listener| listener.with_fd(SendFd::from)).collect();

        // A false giver sends that offer. The taker finds the difference.
        let listener = Listener::bind(&path2, SocketKind::SeqPacket).unwrap();
        let giving = async {
            let mut giver = Framed::new(listener.accept().await.unwrap(), GiverCodec::default());
            giver.next().await.unwrap().unwrap();
            giver.send(ToTaker::Welcome { version: 1, listeners: 1 }).await.unwrap();
            giver.send(ToTaker::Listeners(offered)).await.unwrap();
            assert!(giver.next().await.is_none_or(|end| end.is_err()), "the taker leaves");
        };
        let (requested, ()) = tokio::join!(takeover::request(&path2, Options::default()), giving);
        let error = requested.unwrap_err();
        assert!(
            matches!(error, Error::Mismatch { mismatch: takeover::Mismatch::Address { .. }, .. }),
            "{error}"
        );
        drop((taker, server));
    });
}

/// A taker that sends a wrong message after READY is alive and serves. If the old server accepted
/// again, both would.
///
/// Rules: G-BREACH-LATE.
#[test]
fn a_breach_after_ready_does_not_undo_a_takeover() {
    run(async {
        let (_directory, path) = control_path();
        let server = first(&path);
        let (mut taker, _) = offered_to_raw_taker(&path).await;
        taker.send(FromTaker::Ready).await.unwrap();
        server.replaced().await;
        taker.send(FromTaker::Hello { lowest: 1, highest: 1 }).await.unwrap();
        assert!(!server.undone().await);
    });
}

/// A giver that sends a wrong message after READY gets RELEASE, and must not serve again.
///
/// Rules: T-BREACH.
#[test]
fn a_server_survives_a_breach_by_its_predecessor() {
    run(async {
        let (_directory, path) = control_path();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let giving = async {
            let mut giver = Framed::new(listener.accept().await.unwrap(), GiverCodec::default());
            giver.next().await.unwrap().unwrap();
            giver.send(ToTaker::Welcome { version: 1, listeners: 0 }).await.unwrap();
            giver.send(ToTaker::Complete).await.unwrap();
            assert_eq!(giver.next().await.unwrap().unwrap(), FromTaker::Ready);
            giver.send(ToTaker::Resumed).await.unwrap();
            assert_eq!(giver.next().await.unwrap().unwrap(), FromTaker::Release);
        };
        let requesting = async { request(&path).await.ready().await.unwrap() };
        let (server, ()) = tokio::join!(requesting, giving);
        assert_eq!(server.phase(), takeover::Phase::Serving);
    });
}

/// A path that does not belong to a server is left as it is.
#[test]
fn a_first_start_does_not_replace_foreign_files_and_sockets() {
    run(async {
        let (_directory, path) = control_path();
        let start = async |path: &std::path::Path| {
            let options = Options::default().answer_timeout(std::time::Duration::from_millis(20));
            let options = options.lock_timeout(std::time::Duration::from_millis(20));
            takeover::bind_or_take(path, options, || panic!("it binds")).await.unwrap_err()
        };
        // A file is at the path.
        std::fs::write(&path, "precious").unwrap();
        let error = std::io::Error::from(start(&path).await);
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();

        // A socket of another kind is at the path.
        let stream = Listener::bind(&path, SocketKind::Stream).unwrap();
        assert!(matches!(start(&path).await, Error::Io(_)));
        drop(stream);

        let datagram = fdwire::socket::DatagramSocket::bind(&path).unwrap();
        let error = start(&path).await;
        assert!(matches!(error, Error::Io(_)), "{error}");
        drop(datagram);

        // A process listens at the path, and accepts nothing.
        let silent = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        assert!(matches!(start(&path).await, Error::TimedOut));
        drop(silent);
    });
}
