//! Sockets: connecting and accepting, the peer, options, and the conversions into a socket.

mod common;

use std::{
    fs,
    io::ErrorKind,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
};

use common::{
    KINDS, abstract_name, check_connected, encoded, leave_stale_socket, marked, raw_send,
    role_socket, run, sock_type, spawn_role,
};
use fdwire::{Frame, FrameCodec, Framed, Listener, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, bind, listen, shutdown, socket},
};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

#[test]
fn a_socket_connects_to_a_path_and_to_an_abstract_name() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            for addr in [SocketAddr::from_pathname(&path).unwrap(), abstract_name("connect")] {
                let listener = Listener::bind_addr(&addr, kind).unwrap();
                assert_eq!(listener.local_addr().unwrap().as_pathname(), addr.as_pathname());
                assert_eq!(
                    listener.local_addr().unwrap().as_abstract_name(),
                    addr.as_abstract_name()
                );
                let (a, b) = tokio::join!(Socket::connect_addr(&addr, kind), listener.accept());
                let (a, b) = (a.unwrap(), b.unwrap());
                assert_eq!((a.kind(), b.kind()), (kind, kind));
                check_connected(a, b).await;
            }
        }
    });
}

#[test]
fn a_connect_that_fails_returns_the_kind_of_error() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for kind in KINDS {
            assert_eq!(Socket::connect(&path, kind).await.unwrap_err().kind(), ErrorKind::NotFound);
        }
        leave_stale_socket(&path);
        assert_eq!(
            Socket::connect(&path, SocketKind::Stream).await.unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
        let long = directory.path().join("x".repeat(200));
        assert_eq!(
            Socket::connect(&long, SocketKind::Stream).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
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
            let listener =
                socket(AddressFamily::Unix, sock_type(kind), SockFlag::SOCK_CLOEXEC, None).unwrap();
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
fn accepted_sockets_do_not_inherit_the_credentials_option_of_their_listener() {
    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    run(async {
        let addr = abstract_name("inherit");
        let listener = UnixListener::bind_addr(&addr).unwrap();
        setsockopt(&listener, sockopt::PassCred, &true).unwrap();
        let listener = Listener::try_from(listener).unwrap();
        let (_client, accepted) =
            tokio::join!(Socket::connect_addr(&addr, SocketKind::Stream), listener.accept());
        assert!(!getsockopt(&accepted.unwrap(), sockopt::PassCred).unwrap());
    });
}

/// A connection copies the options of the listener when the client connects. With `SO_PASSCRED`, a
/// read of a stream ends where another process has written, and no event announces the rest.
#[test]
fn connections_in_the_backlog_of_a_converted_listener_bring_no_credentials() {
    const ROLE: &str = "connections_in_the_backlog_of_a_converted_listener_bring_no_credentials";
    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    if let Some(stdin) = role_socket(ROLE) {
        return raw_send(&stdin, &encoded(b"two", 0), &[]);
    }
    run(async {
        let addr = abstract_name("backlog");
        let listener = UnixListener::bind_addr(&addr).unwrap();
        setsockopt(&listener, sockopt::PassCred, &true).unwrap();
        let client = UnixStream::connect_addr(&addr).unwrap();
        raw_send(&client, &encoded(b"one", 0), &[]);
        let mut other_writer = spawn_role(ROLE, None, client.try_clone().unwrap().into());
        assert!(other_writer.wait().unwrap().success());

        let accepted = Listener::try_from(listener).unwrap().accept().await.unwrap();
        assert!(!getsockopt(&accepted, sockopt::PassCred).unwrap());
        let mut accepted = Framed::new(accepted, FrameCodec::default());
        assert_eq!(accepted.try_next().await.unwrap().unwrap().payload, "one");
        assert_eq!(accepted.try_next().await.unwrap().unwrap().payload, "two");
    });
}

#[test]
fn a_socket_knows_the_credentials_of_its_peer() {
    run(async {
        for kind in KINDS {
            let (a, _b) = Socket::pair(kind).unwrap();
            let cred = a.peer_cred().unwrap();
            assert_eq!(cred.uid, nix::unistd::geteuid().as_raw());
            assert_eq!(cred.gid, nix::unistd::getegid().as_raw());
            assert_eq!(cred.pid, Some(std::process::id() as i32));
            let process =
                format!("process {} of uid {}, gid {}", std::process::id(), cred.uid, cred.gid);
            assert_eq!(cred.to_string(), process);
            match a.peer_pidfd() {
                Ok(pidfd) => {
                    let info =
                        fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))
                            .unwrap();
                    assert!(
                        info.lines().any(|line| line == format!("Pid:\t{}", std::process::id())),
                        "{info}"
                    );
                }
                Err(error) => eprintln!("skipped: this kernel has no SO_PEERPIDFD: {error}"),
            }
        }
    });
}

#[test]
fn the_pidfd_of_a_peer_that_was_reaped_is_not_that_of_another_process() {
    const ROLE: &str = "the_pidfd_of_a_peer_that_was_reaped_is_not_that_of_another_process";
    if let Some(name) = role_socket(ROLE) {
        let name = UnixStream::from(name).peer_addr().unwrap();
        return drop(UnixStream::connect_addr(&name).unwrap());
    }
    run(async {
        // A child connects and ends.
        let addr = abstract_name("reaped");
        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap();
        let stdin = UnixStream::connect_addr(&addr).unwrap();
        let mut child = spawn_role(ROLE, None, stdin.into());
        assert!(child.wait().unwrap().success());
        assert_eq!(
            listener.accept().await.unwrap().peer_cred().unwrap().pid,
            Some(std::process::id() as i32)
        );

        // Its pidfd shows that it has ended.
        let peer = listener.accept().await.unwrap();
        assert_eq!(peer.peer_cred().unwrap().pid, Some(child.id() as i32));
        match peer.peer_pidfd() {
            Ok(pidfd) => {
                let mut has_ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                assert_eq!(poll(&mut has_ended, PollTimeout::ZERO).unwrap(), 1);
                // It is not a pidfd of a later process with the same number.
                let info =
                    fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
                assert!(info.lines().any(|line| line == "Pid:\t-1"), "{info}");
            }
            // SO_PASSRIGHTS came with the same release.
            Err(error) => assert!(peer.set_pass_fds(true).is_err(), "Linux 6.16 or later: {error}"),
        }
    });
}

#[test]
fn a_task_that_waits_to_receive_is_woken_by_a_shutdown() {
    run(async {
        for kind in KINDS {
            for (how, ours) in
                [(Shutdown::Read, true), (Shutdown::Both, true), (Shutdown::Read, false)]
            {
                let (a, _b) = Socket::pair(kind).unwrap();
                let (mut rx, tx) = Framed::new(a, FrameCodec::default()).into_split();
                assert!(rx.next().now_or_never().is_none());
                let waiting = tokio::spawn(async move { rx.next().await.is_none() });
                tokio::task::yield_now().await; // it waits
                if ours {
                    tx.socket().shutdown(how).unwrap();
                } else {
                    // Another holder shuts the socket down, so only the kernel can wake the task.
                    shutdown(tx.socket().as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Read)
                        .unwrap();
                }
                assert!(waiting.await.unwrap(), "on {kind:?}, {how:?}, ours: {ours}");
            }
        }
    });
}

#[test]
fn sockets_of_other_crates_convert_to_a_socket_and_back() {
    run(async {
        let (a, b) = UnixStream::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;
        let (a, b) = tokio::net::UnixStream::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;
        let (a, b) = UnixSeqpacket::pair().unwrap();
        check_connected(a.try_into().unwrap(), b.try_into().unwrap()).await;

        let (a, b) = Socket::pair(SocketKind::Stream).unwrap();
        let (a, b) =
            (UnixStream::try_from(a).unwrap(), tokio::net::UnixStream::try_from(b).unwrap());
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
fn listeners_of_other_crates_convert_to_a_listener() {
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
        let unconnected =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
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
        for (fd, reason) in [
            (marked(1), "not a socket"),
            (copy(&tcp), "not a Unix"),
            (unconnected, "not a listening"),
        ] {
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
            let mut rx =
                Framed::new(Socket::try_from(OwnedFd::from(b)).unwrap(), FrameCodec::default());
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
            assert_eq!(
                flags & nix::libc::O_NONBLOCK,
                0,
                "a child in another language would not expect it"
            );
            let mut child = spawn_role(ROLE, None, theirs.into());
            let frame = Framed::new(ours, FrameCodec::default()).try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], common::mark_of(&frame.fds[0])), (&b"here"[..], 1));
            assert!(child.wait().unwrap().success());
        }
    });
}

#[test]
fn the_send_buffer_of_a_socket_can_be_set() {
    run(async {
        for kind in KINDS {
            let (a, _b) = Socket::pair(kind).unwrap();
            a.set_send_buffer_size(20_000).unwrap();
            assert_eq!(a.send_buffer_size().unwrap(), 40_000); // the kernel doubles it
        }
    });
}

/// Sends a message with a descriptor. Returns the kind of the error if that fails.
async fn send_fd(tx: &mut Framed<FrameCodec>, mark: u32) -> Result<(), ErrorKind> {
    let sent = tx.send(Frame::new("").with_fd(marked(mark))).await;
    sent.map_err(|error| std::io::Error::from(error).kind())
}

#[test]
fn a_socket_that_takes_no_descriptors_still_receives_what_was_sent_before() {
    run(async {
        for kind in KINDS {
            let (a, b) = Socket::pair(kind).unwrap();
            let (mut tx, mut rx) =
                (Framed::new(a, FrameCodec::default()), Framed::new(b, FrameCodec::default()));
            send_fd(&mut tx, 1).await.unwrap();
            if let Err(error) = rx.socket().set_pass_fds(false) {
                return eprintln!("skipped: this kernel has no SO_PASSRIGHTS: {error}");
            }
            assert_eq!(send_fd(&mut tx, 2).await, Err(ErrorKind::PermissionDenied));
            assert_eq!(common::marks(&rx.try_next().await.unwrap().unwrap()), [1]);

            let (a, b) = Socket::pair(kind).unwrap();
            b.set_pass_fds(false).unwrap();
            b.set_pass_fds(true).unwrap();
            check_connected(a, b).await;
        }
    });
}

#[test]
fn connections_take_no_descriptors_if_their_listener_is_set_so() {
    run(async {
        for kind in KINDS {
            let addr = abstract_name("pass_fds");
            let listener = Listener::bind_addr(&addr, kind).unwrap();
            let framed = |socket| Framed::new(socket, FrameCodec::default());
            let mut early = framed(Socket::connect_addr(&addr, kind).await.unwrap());
            send_fd(&mut early, 1).await.unwrap();
            if let Err(error) = listener.set_pass_fds(false) {
                return eprintln!("skipped: this kernel has no SO_PASSRIGHTS: {error}");
            }

            // A connection has the option even before it is accepted.
            let mut late = framed(Socket::connect_addr(&addr, kind).await.unwrap());
            assert_eq!(send_fd(&mut late, 2).await, Err(ErrorKind::PermissionDenied));

            // Descriptors that were sent before are received, and later ones are refused.
            let mut accepted = framed(listener.accept().await.unwrap());
            assert_eq!(common::marks(&accepted.try_next().await.unwrap().unwrap()), [1]);
            assert_eq!(
                send_fd(&mut early, 3).await,
                Err(ErrorKind::PermissionDenied),
                "it was in the backlog"
            );

            // The option can be switched on again.
            drop(listener.accept().await.unwrap());
            listener.set_pass_fds(true).unwrap();
            let (a, b) = tokio::join!(Socket::connect_addr(&addr, kind), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
        }
    });
}
