//! Sockets and listeners: who is connected, who may connect, who owns a path, and what becomes a socket.

mod common;

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
    },
    sync::atomic::Ordering::SeqCst,
};

use common::{KINDS, marked, other_uid, role_socket, run, spawn_role};
use fdwire::{Frame, FrameCodec, Framed, Listener, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, bind, listen, socket};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

fn sock_type(kind: SocketKind) -> SockType {
    match kind {
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Stream => SockType::Stream,
    }
}

/// Both ends can talk, descriptors included.
async fn check_connected(a: Socket, b: Socket) {
    let (mut a, mut b) = (Framed::new(a, FrameCodec::default()), Framed::new(b, FrameCodec::default()));
    a.send(Frame::new("hello").with_fd(marked(1))).await.unwrap();
    let frame = b.try_next().await.unwrap().unwrap();
    assert_eq!((&frame.payload[..], frame.fds.len()), (&b"hello"[..], 1));
    b.close().await.unwrap();
    assert!(a.next().await.is_none());
}

fn abstract_name(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("fdwire-test-{name}-{}", std::process::id())).unwrap()
}

#[test]
fn connects_to_a_path_and_to_an_abstract_name() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            for addr in [SocketAddr::from_pathname(&path).unwrap(), abstract_name("connect")] {
                let listener = Listener::bind_addr(&addr, kind).unwrap();
                assert_eq!(listener.local_addr().unwrap().as_pathname(), addr.as_pathname());
                assert_eq!(listener.local_addr().unwrap().as_abstract_name(), addr.as_abstract_name());
                let (a, b) = tokio::join!(Socket::connect_addr(&addr, kind), listener.accept());
                let (a, b) = (a.unwrap(), b.unwrap());
                assert_eq!((a.kind(), b.kind()), (kind, kind));
                check_connected(a, b).await;
            }
        }
    });
}

#[test]
fn a_connect_that_fails_says_why() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for kind in KINDS {
            assert_eq!(Socket::connect(&path, kind).await.unwrap_err().kind(), ErrorKind::NotFound);
        }
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(Socket::connect(&path, SocketKind::Stream).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let long = directory.path().join("x".repeat(200));
        assert_eq!(Socket::connect(&long, SocketKind::Stream).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        let unnamed = UnixStream::pair().unwrap().0.local_addr().unwrap();
        let error = Socket::connect_addr(&unnamed, SocketKind::Stream).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);

        let other = directory.path().join("other");
        let _listener = Listener::bind(&other, SocketKind::Stream).unwrap();
        let error = Socket::connect(&other, SocketKind::SeqPacket).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EPROTOTYPE));
    });
}

#[test]
fn a_full_backlog_is_waited_for() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join(format!("{kind:?}"));
            let listener = socket(AddressFamily::Unix, sock_type(kind), SockFlag::SOCK_CLOEXEC, None).unwrap();
            bind(listener.as_raw_fd(), &nix::sys::socket::UnixAddr::new(&path).unwrap()).unwrap();
            listen(&listener, Backlog::new(0).unwrap()).unwrap();
            let listener = Listener::try_from(listener).unwrap();

            let first = Socket::connect(&path, kind).await.unwrap();
            let mut second = Box::pin(Socket::connect(&path, kind));
            assert!((&mut second).now_or_never().is_none(), "the backlog is not full");
            check_connected(first, listener.accept().await.unwrap()).await;
            check_connected(second.await.unwrap(), listener.accept().await.unwrap()).await;
        }
    });
}

#[test]
fn a_cancelled_accept_loses_no_connection() {
    run(async {
        for kind in KINDS {
            let addr = abstract_name("accept");
            let listener = Listener::bind_addr(&addr, kind).unwrap();
            assert!(listener.accept().now_or_never().is_none());
            let client = Socket::connect_addr(&addr, kind).await.unwrap();
            check_connected(client, listener.accept().await.unwrap()).await;
        }
    });
}

#[test]
fn several_tasks_may_wait_for_connections() {
    run(async {
        for kind in KINDS {
            let addr = abstract_name("tasks");
            let listener = std::sync::Arc::new(Listener::bind_addr(&addr, kind).unwrap());
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..3 {
                let listener = std::sync::Arc::clone(&listener);
                tasks.spawn(async move { listener.accept().await.unwrap() });
            }
            tokio::task::yield_now().await; // all of them wait
            assert!(listener.accept().now_or_never().is_none());
            while !tasks.is_empty() {
                let client = Socket::connect_addr(&addr, kind).await.unwrap();
                check_connected(client, tasks.join_next().await.unwrap().unwrap()).await;
            }
        }
    });
}

#[test]
fn accepted_sockets_do_not_inherit_what_takes_the_descriptors_room() {
    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    run(async {
        let addr = abstract_name("inherit");
        let listener = UnixListener::bind_addr(&addr).unwrap();
        setsockopt(&listener, sockopt::PassCred, &true).unwrap();
        let listener = Listener::try_from(listener).unwrap();
        let (_client, accepted) = tokio::join!(Socket::connect_addr(&addr, SocketKind::Stream), listener.accept());
        assert!(!getsockopt(&accepted.unwrap(), sockopt::PassCred).unwrap());
    });
}

#[test]
fn the_peer_is_known() {
    run(async {
        for kind in KINDS {
            let (a, _b) = Socket::pair(kind).unwrap();
            let cred = a.peer_cred().unwrap();
            assert_eq!(cred.uid, nix::unistd::geteuid().as_raw());
            assert_eq!(cred.gid, nix::unistd::getegid().as_raw());
            assert_eq!(cred.pid, Some(std::process::id() as i32));
            match a.peer_pidfd() {
                Ok(pidfd) => {
                    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
                    assert!(info.lines().any(|line| line == format!("Pid:\t{}", std::process::id())), "{info}");
                }
                Err(error) => eprintln!("skipped: SO_PEERPIDFD is not to be had: {error}"),
            }
        }
    });
}

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
            drop(UnixListener::bind(&path).unwrap());
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
        drop(UnixListener::bind(&path).unwrap()); // stale: everybody wants to replace it
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

        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap().allow_any_uid();
        let (answer, ()) = tokio::join!(as_other_uid(&addr), greet(&listener));
        assert_eq!(answer, "<welcome>");
    });
}

#[test]
fn sockets_of_other_crates_become_ours_and_back() {
    run(async {
        let (a, b) = UnixStream::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;
        let (a, b) = tokio::net::UnixStream::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;
        let (a, b) = UnixSeqpacket::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;

        let (a, b) = Socket::pair(SocketKind::Stream).unwrap();
        let (a, b) = (UnixStream::try_from(a).unwrap(), tokio::net::UnixStream::try_from(b).unwrap());
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;

        let (a, b) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let (a, b) = (UnixSeqpacket::try_from(a).unwrap(), UnixSeqpacket::try_from(b).unwrap());
        a.send(b"packet").await.unwrap();
        let mut packet = [0; 16];
        assert_eq!(b.recv(&mut packet).await.unwrap().bytes_read(), 6);
        check_connected(a.try_into().unwrap(), OwnedFd::from(b).try_into().unwrap()).await;

        let (a, _) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let error = UnixStream::try_from(a).unwrap_err();
        assert!(error.to_string().contains("SOCK_SEQPACKET"), "{error}");
        let (a, _) = Socket::pair(SocketKind::Stream).unwrap();
        let error = UnixSeqpacket::try_from(a).unwrap_err();
        assert!(error.to_string().contains("SOCK_STREAM"), "{error}");
    });
}

#[test]
fn listeners_of_other_crates_become_ours() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let connects = async |listener: Listener| {
            let (a, b) = tokio::join!(Socket::connect(&path, listener.kind()), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
            drop(listener);
            fs::remove_file(&path).unwrap();
        };
        connects(UnixListener::bind(&path).unwrap().try_into().unwrap()).await;
        connects(tokio::net::UnixListener::bind(&path).unwrap().try_into().unwrap()).await;
        connects(UnixSeqpacketListener::bind(&path).unwrap().try_into().unwrap()).await;
    });
}

#[test]
fn a_descriptor_of_another_type_is_refused_with_a_reason() {
    run(async {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let name = abstract_name("types");
        let listener = UnixListener::bind_addr(&name).unwrap();
        let unconnected = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let datagram = UnixDatagram::pair().unwrap().0;
        let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().unwrap();
        for (fd, reason) in [
            (marked(1), "not a socket"),
            (copy(&tcp), "not a Unix socket"),
            (copy(&listener), "listening"),
            (copy(&unconnected), "not connected"),
            (copy(&datagram), "neither"),
        ] {
            let error = Socket::try_from(fd).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error}");
        }
        for (fd, reason) in [(marked(1), "not a socket"), (copy(&tcp), "not a Unix"), (unconnected, "not a listening")]
        {
            let error = Listener::try_from(fd).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    });
}

#[test]
fn a_socket_whose_peer_is_gone_can_still_be_read() {
    run(async {
        for kind in KINDS {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut tx = Framed::new(a, FrameCodec::default());
            tx.send(Frame::new("left behind").with_fd(marked(1))).await.unwrap();
            drop(tx);
            let mut rx = Framed::new(Socket::try_from(OwnedFd::from(b)).unwrap(), FrameCodec::default());
            assert_eq!(rx.try_next().await.unwrap().unwrap().fds.len(), 1);
            assert!(rx.next().await.is_none());
        }
    });
}

#[test]
fn a_child_finds_its_socket_as_standard_input() {
    const ROLE: &str = "a_child_finds_its_socket_as_standard_input";
    if role_socket(ROLE).is_some() {
        return run(async {
            let mut parent = Framed::new(Socket::from_stdin().unwrap(), FrameCodec::default());
            parent.send(Frame::new("here").with_fd(marked(1))).await.unwrap();
        });
    }
    run(async {
        for kind in KINDS {
            let (ours, theirs) = Socket::pair(kind).unwrap();
            let flags = nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_GETFL).unwrap();
            assert_eq!(flags & nix::libc::O_NONBLOCK, 0, "a child in another language would not expect it");
            let mut child = spawn_role(ROLE, None, theirs.into());
            let frame = Framed::new(ours, FrameCodec::default()).try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], common::mark_of(&frame.fds[0])), (&b"here"[..], 1));
            assert!(child.wait().unwrap().success());
        }
    });
}

#[test]
fn options_of_a_socket() {
    run(async {
        for kind in KINDS {
            let (a, _b) = Socket::pair(kind).unwrap();
            a.set_send_buffer_size(20_000).unwrap();
            assert_eq!(a.send_buffer_size().unwrap(), 40_000); // the kernel doubles it
        }
    });
}
