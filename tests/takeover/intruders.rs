//! Strangers and liars at the path.

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

/// One byte ends volo's server.
///
/// Rules: T-HELLO, T-EARLY, G-BREACH.
#[test]
fn nothing_that_a_stranger_sends_stops_the_server() {
    run(async {
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
        // One that speaks this version and later ones is welcome, and this version is spoken.
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
        let (directory, path) = control_path();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let server = crate::first_with(&path, Options::default().mode(0o666));
        let address = crate::address(&server);
        let (here, there) = UnixStream::pair().unwrap();
        let mut command = Command::new("/proc/self/exe");
        command.uid(uid).env("FDWIRE_PATH", directory.path());
        let mut child = spawn_role_by(command, NAME, there.into());
        let here = tokio::task::spawn_blocking(move || (&here).read_exact(&mut [0]).map(|()| here))
            .await
            .unwrap();
        check_serves(&server, address).await;

        let foreign = directory.path().join("foreign");
        let refused = takeover::request(&foreign, Options::default()).await.unwrap_err();
        assert!(matches!(refused, Error::NotTrusted { uid: found } if found == uid), "{refused}");
        drop(here);
        assert!(child.wait().unwrap().success());
    });
}

/// Is refused by the server, and listens beside it.
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

/// A process that speaks another protocol listens at the path.
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

        // One that sends nothing.
        let options = Options::default().answer_timeout(std::time::Duration::from_millis(10));
        let error = takeover::request(&path, options).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut), "{error}");
        // Nobody.
        let error =
            takeover::request(path.with_extension("none"), Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
        // A server that closes the connection.
        let closing = async {
            drop(listener.accept().await.unwrap()); // the one before
            drop(listener.accept().await.unwrap());
        };
        let (requested, ()) = tokio::join!(takeover::request(&path, Options::default()), closing);
        assert!(matches!(requested.unwrap_err(), Error::GiverGone));
    });
}

/// A giver that announces one socket and sends another: everything it sent is closed.
///
/// Rules: T-COMPARE.
#[test]
fn a_socket_that_is_not_the_announced_one_is_refused() {
    run(async {
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

        let liar = Listener::bind(&path2, SocketKind::SeqPacket).unwrap();
        let lying = async {
            let mut giver = Framed::new(liar.accept().await.unwrap(), GiverCodec::default());
            giver.next().await.unwrap().unwrap();
            giver.send(ToTaker::Welcome { version: 1, listeners: 1 }).await.unwrap();
            giver.send(ToTaker::Listeners(offered)).await.unwrap();
            assert!(giver.next().await.is_none_or(|end| end.is_err()), "the taker leaves");
        };
        let (requested, ()) = tokio::join!(takeover::request(&path2, Options::default()), lying);
        let error = requested.unwrap_err();
        assert!(
            matches!(error, Error::Mismatch { mismatch: takeover::Mismatch::Address { .. }, .. }),
            "{error}"
        );
        drop((taker, server));
    });
}

/// A taker that serves and then sends nonsense is alive: if the old server accepted again, two
/// would.
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

/// A giver that sends nonsense after READY gets RELEASE, and must not serve again.
///
/// Rules: T-BREACH.
#[test]
fn a_server_survives_a_breach_by_its_predecessor() {
    run(async {
        let (_directory, path) = control_path();
        let liar = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let lying = async {
            let mut giver = Framed::new(liar.accept().await.unwrap(), GiverCodec::default());
            giver.next().await.unwrap().unwrap();
            giver.send(ToTaker::Welcome { version: 1, listeners: 0 }).await.unwrap();
            giver.send(ToTaker::Complete).await.unwrap();
            assert_eq!(giver.next().await.unwrap().unwrap(), FromTaker::Ready);
            giver.send(ToTaker::Resumed).await.unwrap();
            assert_eq!(giver.next().await.unwrap().unwrap(), FromTaker::Release);
        };
        let requesting = async { request(&path).await.ready().await.unwrap() };
        let (server, ()) = tokio::join!(requesting, lying);
        assert_eq!(server.phase(), takeover::Phase::Serving);
    });
}

/// The first start leaves alone what is not a server's.
#[test]
fn a_first_start_does_not_replace_foreign_files_and_sockets() {
    run(async {
        let (_directory, path) = control_path();
        let start = async |path: &std::path::Path| {
            let options = Options::default().answer_timeout(std::time::Duration::from_millis(20));
            let options = options.lock_timeout(std::time::Duration::from_millis(20));
            takeover::bind_or_take(path, options, || panic!("it binds")).await.unwrap_err()
        };
        // A file, another kind of socket, and a process that holds the lock and does not listen.
        std::fs::write(&path, "precious").unwrap();
        let error = std::io::Error::from(start(&path).await);
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();

        let stream = Listener::bind(&path, SocketKind::Stream).unwrap();
        assert!(matches!(start(&path).await, Error::Io(_)));
        drop(stream);

        let datagram = fdwire::socket::DatagramSocket::bind(&path).unwrap();
        let error = start(&path).await;
        assert!(matches!(error, Error::Io(_)), "{error}");
        drop(datagram);

        let silent = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        assert!(matches!(start(&path).await, Error::TimedOut));
        drop(silent);
    });
}
