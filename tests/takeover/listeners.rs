//! Listeners of every kind, and their identities.

use std::{
    net::{TcpListener, UdpSocket},
    os::fd::OwnedFd,
    os::unix::net::UnixDatagram,
};

use fdwire::{
    Listener, Socket, SocketKind,
    takeover::{
        Error, Listeners, Options, Server,
        protocol::{Identity, Kind},
    },
};
use tokio::net::{UnixListener, UnixStream};

use crate::{common::*, control_path, groups::group, request};

#[test]
fn listeners_of_every_kind_move_and_work() {
    run(async {
        // A server has listeners of all kinds, which move.
        let (directory, path) = control_path();
        let mut listeners = Listeners::new();
        listeners.add("tcp", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp_address = udp.local_addr().unwrap();
        listeners.add("udp", udp).unwrap();
        for kind in [Kind::Stream, Kind::SeqPacket, Kind::Datagram] {
            listeners
                .bind_path("unix", directory.path().join(kind.to_string()), kind, 0o600)
                .unwrap();
        }
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let identities = old.identities();

        let new = request(&path).await.ready().await.unwrap();
        new.confirmed().await;
        assert!(old.drained().await);
        drop(old);
        assert_eq!(new.identities(), identities);

        // Each of them works in the new server.
        let stream = new.gated::<UnixListener>("unix", 0).unwrap();
        let connecting = UnixStream::connect(directory.path().join("stream"));
        let (client, accepted) = tokio::join!(connecting, stream.accept());
        drop((client.unwrap(), accepted.unwrap()));

        let seqpacket = new.gated::<Listener>("unix", 1).unwrap();
        let connecting = Socket::connect(directory.path().join("seqpacket"), SocketKind::SeqPacket);
        let (client, accepted) = tokio::join!(connecting, seqpacket.accept());
        check_connected(client.unwrap(), accepted.unwrap()).await;

        let mut received = [0; 4];
        let datagram = UnixDatagram::from(new.socket("unix", 2).unwrap());
        UnixDatagram::unbound()
            .unwrap()
            .send_to(b"unix", directory.path().join("datagram"))
            .unwrap();
        assert_eq!((datagram.recv(&mut received).unwrap(), &received), (4, b"unix"));

        let udp = UdpSocket::from(new.socket("udp", 0).unwrap());
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"inet", udp_address).unwrap();
        assert_eq!((udp.recv(&mut received).unwrap(), &received), (4, b"inet"));

        // A listener of another kind, or that does not exist, is an error.
        let wrong = new.gated::<UnixListener>("tcp", 0).unwrap_err();
        assert!(matches!(wrong, Error::WrongKind { .. }), "{wrong}");
        assert!(matches!(new.socket("tcp", 1), Err(Error::NoSuchListener { .. })));
    });
}

/// The path of a Unix socket keeps its inode, and the process that serves last removes it.
#[test]
fn paths_move_with_their_inode_lock_and_right_to_remove() {
    use std::os::unix::fs::MetadataExt;
    run(async {
        let (directory, path) = control_path();
        let unix = directory.path().join("unix");
        let lock = directory.path().join("unix.lock");
        let mut listeners = Listeners::new();
        listeners.bind_path("unix", &unix, Kind::Stream, 0o600).unwrap();
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let inodes = [&path, &unix, &lock].map(|path| path.metadata().unwrap().ino());

        let new = request(&path).await.ready().await.unwrap();
        new.confirmed().await;
        assert!(old.drained().await);
        drop(old); // at this point, gunicorn's old master removes the path of the new one
        assert_eq!([&path, &unix, &lock].map(|path| path.metadata().unwrap().ino()), inodes);
        let taken = Listeners::new().bind_path("unix", &unix, Kind::Stream, 0o600).unwrap_err();
        assert!(taken.to_string().contains("in use"), "{taken}");
        while !new.is_final() {
            tokio::task::yield_now().await;
        }
        drop(new);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    });
}

#[test]
fn six_hundred_and_one_listeners_move() {
    run(async {
        let (_directory, path) = control_path();
        let mut listeners = Listeners::new();
        for index in 0..601 {
            listeners
                .add(format!("listener {index}"), TcpListener::bind("127.0.0.1:0").unwrap())
                .unwrap();
        }
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let identities = old.identities();
        let new = request(&path).await.ready().await.unwrap();
        assert_eq!(new.identities(), identities);
    });
}

#[test]
fn sockets_with_equal_addresses_stay_apart() {
    run(async {
        let (_directory, path) = control_path();
        let mut listeners = Listeners::new();
        for fd in group(8) {
            listeners.add("http", fd).unwrap();
        }
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let cookies = |server: &Server| -> Vec<u64> {
            (0..8).map(|index| cookie(&server.socket("http", index).unwrap())).collect()
        };
        let before = cookies(&old);
        let new = request(&path).await.ready().await.unwrap();
        assert_eq!(cookies(&new), before);
        let indices: Vec<_> =
            new.identities().iter().map(|identity: &Identity| identity.index).collect();
        assert_eq!(indices, (0..8).collect::<Vec<_>>());
    });
}

fn cookie(fd: &OwnedFd) -> u64 {
    rustix::net::sockopt::socket_cookie(fd).unwrap()
}

/// The next process gets the other listeners, with the same indices as before.
#[test]
fn a_process_that_has_declined_a_listener_can_be_replaced() {
    run(async {
        let (_directory, path) = control_path();
        let mut listeners = Listeners::new();
        for _ in 0..3 {
            listeners.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        }
        let first = Server::bind(&path, listeners, Options::default()).unwrap();
        let mut pending = request(&path).await;
        pending.decline("http", 1).unwrap();
        let second = pending.ready().await.unwrap();
        first.replaced().await;
        second.confirmed().await;
        let third = request(&path).await.ready().await.unwrap();
        assert_eq!(third.identities(), second.identities());
        assert_eq!(third.identities()[1].index, 2);
        third.gated::<tokio::net::TcpListener>("http", 2).unwrap();
        assert_eq!(third.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap(), 3);
    });
}

#[test]
fn a_declined_listener_is_reported_to_the_old_server() {
    run(async {
        let (_directory, path) = control_path();
        let mut listeners = Listeners::new();
        for name in ["http", "admin", "metrics"] {
            listeners.add(name, TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        }
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let mut pending = request(&path).await;
        pending.decline("admin", 0).unwrap();
        assert!(matches!(pending.decline("admin", 1), Err(Error::NoSuchListener { .. })));
        let new = pending.ready().await.unwrap();
        old.replaced().await;
        let names = |identities: Vec<Identity>| -> Vec<String> {
            identities.into_iter().map(|identity| identity.name).collect()
        };
        assert_eq!(names(old.declined()), ["admin"]);
        assert_eq!(names(new.identities()), ["http", "metrics"]);
    });
}
