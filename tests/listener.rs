//! Listeners: who may connect, and who owns a path.

mod common;

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, PermissionsExt, symlink},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    sync::{atomic::Ordering::SeqCst, mpsc},
    time::Duration,
};

use common::{KINDS, abstract_name, check_connected, leave_stale_socket, other_uid, role_socket, run, spawn_role};
use fdwire::{Listener, Socket, SocketKind};
use nix::{sys::stat::Mode, unistd::mkfifo};

#[test]
fn a_socket_file_is_for_its_owner_only_and_goes_with_the_listener() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            let listener = Listener::bind(&path, kind).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            drop(listener);
            let listener = Listener::bind_with_mode(&path, kind, 0o640).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
            drop(listener);
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a file was left behind");
        }
    });
}

#[test]
fn a_live_listeners_path_is_not_taken() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("ours");
            let _listener = Listener::bind(&path, kind).unwrap();
            for other in KINDS {
                let error = Listener::bind(&path, other).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::AddrInUse);
                assert!(error.to_string().contains("ours"), "{error}");
            }
        }
        // One of another program, which takes no lock.
        let path = directory.path().join("foreign");
        let foreign = UnixListener::bind(&path).unwrap();
        for kind in KINDS {
            assert_eq!(Listener::bind(&path, kind).unwrap_err().kind(), ErrorKind::AddrInUse);
        }
        foreign.set_nonblocking(true).unwrap();
        assert_eq!(foreign.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "the owner was disturbed");
        UnixStream::connect(&path).unwrap();
    });
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            leave_stale_socket(&path);
            let listener = Listener::bind(&path, kind).unwrap();
            let (a, b) = tokio::join!(Socket::connect(&path, kind), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
        }
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        for kind in KINDS {
            assert_eq!(Listener::bind(&file, kind).unwrap_err().kind(), ErrorKind::AlreadyExists);
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    });
}

#[test]
fn of_many_that_bind_at_once_one_wins() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = directory.path().join(round.to_string());
        leave_stale_socket(&path); // everybody wants to replace it
        let bound: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| run(async { Listener::bind(&path, SocketKind::Stream).map(OwnedFd::from) })))
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        // Handed on at once, so a later thread finds the socket alive and leaves it.
        assert_eq!(bound.len(), 1, "in round {round}");
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn peers_that_are_refused_do_not_keep_the_runtime_busy() {
    const ROLE: &str = "peers_that_are_refused_do_not_keep_the_runtime_busy";
    if let Some(stdin) = role_socket(ROLE) {
        let mut stdin = UnixStream::from(stdin);
        let mut name = String::new();
        stdin.read_to_string(&mut name).unwrap();
        let addr = SocketAddr::from_abstract_name(name).unwrap();
        while UnixStream::connect_addr(&addr).is_ok() {} // until the listener is gone
        return;
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        let addr = abstract_name("busy");
        let listener = std::sync::Arc::new(Listener::bind_addr(&addr, SocketKind::Stream).unwrap());
        let mut children = Vec::new();
        for _ in 0..3 {
            let (mut a, b) = UnixStream::pair().unwrap();
            children.push(spawn_role(ROLE, Some(uid), b.into()));
            a.write_all(addr.as_abstract_name().unwrap()).unwrap();
        }
        let accepting = tokio::spawn({
            let listener = std::sync::Arc::clone(&listener);
            async move { drop(listener.accept().await) }
        });
        // This task gets its turns beside the other's, however many wait to be refused.
        while listener.refused() < 5000 {
            tokio::task::yield_now().await;
        }
        accepting.abort();
        let _ = accepting.await;
        let refused = listener.refused();
        drop(listener);
        for mut child in children {
            child.wait().unwrap();
        }
        assert!(refused < 100_000, "{refused} were refused in a row");
    });
}

#[test]
fn a_path_can_be_taken_and_left_by_many_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let holders = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                run(async {
                    for _ in 0..500 {
                        if let Ok(listener) = Listener::bind(&path, SocketKind::Stream) {
                            assert_eq!(holders.fetch_add(1, SeqCst), 0, "two hold the path");
                            assert!(path.exists(), "the socket was removed by another");
                            holders.fetch_sub(1, SeqCst);
                            drop(listener);
                        }
                    }
                });
            });
        }
    });
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a file was left behind");
}

/// Whoever may write to the directory decides what is there.
#[test]
fn only_a_regular_file_is_taken_as_the_lock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let lock = directory.path().join("socket.lock");
    let target = directory.path().join("target");
    let refused = |what: &str| {
        let (done, outcome) = mpsc::channel();
        let path = path.clone();
        std::thread::spawn(move || run(async move { done.send(Listener::bind(&path, SocketKind::Stream).map(drop)) }));
        let outcome = outcome.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("bind waits for {what}"));
        let error = outcome.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{what}: {error}");
        assert!(error.to_string().contains("socket.lock is not a regular file"), "{what}: {error}");
    };

    mkfifo(&lock, Mode::S_IRWXU).unwrap();
    refused("a FIFO without a reader");
    let reader = fs::File::options().read(true).write(true).open(&lock).unwrap();
    refused("a FIFO with a reader");
    drop(reader);
    fs::remove_file(&lock).unwrap();

    fs::create_dir(&lock).unwrap();
    refused("a directory");
    fs::remove_dir(&lock).unwrap();

    symlink(&target, &lock).unwrap();
    refused("a symbolic link to nothing");
    assert!(!target.exists(), "the link was followed");
    fs::write(&target, "").unwrap();
    refused("a symbolic link to a file");
    fs::remove_file(&lock).unwrap();

    drop(UnixListener::bind(&lock).unwrap());
    refused("a socket");
    fs::remove_file(&lock).unwrap();
    run(async { Listener::bind(&path, SocketKind::Stream) }).unwrap();
}

#[test]
fn only_the_own_socket_is_removed() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path, SocketKind::Stream).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        drop(listener);
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    });
}

#[test]
fn a_listener_that_is_handed_on_keeps_its_path() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            let handed_on = OwnedFd::from(Listener::bind(&path, kind).unwrap());
            assert_eq!(Listener::bind(&path, kind).unwrap_err().kind(), ErrorKind::AddrInUse);
            let listener = Listener::try_from(handed_on).unwrap();
            let (a, b) = tokio::join!(Socket::connect(&path, kind), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
            drop(listener);
            while Socket::connect(&path, kind).await.is_ok() {
                tokio::task::yield_now().await; // a child that another test is starting may have a copy for a moment
            }
            drop(Listener::bind(&path, kind).unwrap()); // stale now
        }
    });
}

#[test]
fn other_uids_are_admitted_only_if_listed() {
    const ROLE: &str = "other_uids_are_admitted_only_if_listed";
    if let Some(stdin) = role_socket(ROLE) {
        let mut stdin = UnixStream::from(stdin);
        let mut name = String::new();
        stdin.read_to_string(&mut name).unwrap();
        let addr = SocketAddr::from_abstract_name(name).unwrap();
        let mut client = UnixStream::connect_addr(&addr).unwrap();
        let mut answer = String::new();
        // Refused: the end, or a reset.
        let _ = client.read_to_string(&mut answer);
        stdin.write_all(format!("<{answer}>").as_bytes()).unwrap();
        return;
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        let as_other_uid = async |addr: &SocketAddr| {
            let (mut a, b) = UnixStream::pair().unwrap();
            let mut child = spawn_role(ROLE, Some(uid), b.into());
            a.write_all(addr.as_abstract_name().unwrap()).unwrap();
            a.shutdown(std::net::Shutdown::Write).unwrap();
            tokio::task::spawn_blocking(move || {
                let mut answer = String::new();
                a.read_to_string(&mut answer).unwrap();
                child.wait().unwrap();
                answer
            })
            .await
            .unwrap()
        };
        let addr = abstract_name("uid");
        let greet = async |listener: &Listener| {
            let mut client = UnixStream::try_from(listener.accept().await.unwrap()).unwrap();
            client.write_all(b"welcome").unwrap();
        };

        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap();
        tokio::select! {
            answer = as_other_uid(&addr) => assert_eq!(answer, "<>"),
            () = greet(&listener) => panic!("admitted"),
        }
        assert_eq!(listener.refused(), 1);

        let listener = listener.allow_uids([uid]);
        let (answer, ()) = tokio::join!(as_other_uid(&addr), greet(&listener));
        assert_eq!((&answer[..], listener.refused()), ("<welcome>", 1));
        drop(listener);

        // Another name: a child that another test is starting may have a copy of the listener for a moment.
        let addr = abstract_name("any uid");
        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap().allow_any_uid();
        let (answer, ()) = tokio::join!(as_other_uid(&addr), greet(&listener));
        assert_eq!(answer, "<welcome>");
    });
}
