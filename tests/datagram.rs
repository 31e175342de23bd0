//! Datagram sockets: their messages and addresses, their errors, and their paths.

mod common;

use std::{
    fs,
    future::poll_fn,
    io::{ErrorKind, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::PermissionsExt,
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::Path,
    process::Command,
    time::Duration,
};

use common::{
    PASSED, abstract_name, mark_of, marked, open_fds, other_uid, run, run_and_pass, settle,
};
use fdwire::{
    Error, Socket, SocketKind,
    socket::{Datagram, DatagramSocket},
};
use futures::{FutureExt, StreamExt, future::join_all, stream};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{setsockopt, sockopt},
};
use tokio::{task::unconstrained, time::timeout};

fn marks(datagram: &Datagram) -> Vec<u32> {
    datagram.fds.iter().map(mark_of).collect()
}

/// Returns true in the inner process of a test.
fn is_inner(test: &str) -> bool {
    std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == test)
}

/// Runs the test as a process of its own, which has to pass.
fn run_inner(test: &str, change: impl FnOnce(&mut Command)) {
    let mut command = Command::new("/proc/self/exe");
    command.args([test, "--exact", "--nocapture"]).env("FDWIRE_ROLE", test);
    change(&mut command);
    assert_eq!(command.status().unwrap().code(), Some(PASSED));
}

/// Returns true if both are the same path or abstract name.
fn is_same(a: &SocketAddr, b: &SocketAddr) -> bool {
    a.as_pathname() == b.as_pathname() && a.as_abstract_name() == b.as_abstract_name()
}

#[test]
fn an_empty_datagram_is_a_message() {
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        let file = marked(1);
        a.send("", &[]).await.unwrap();
        a.send(b"", &[file.as_fd()]).await.unwrap();
        a.send("text", &[]).await.unwrap();
        for (payload, expected) in [("", &[][..]), ("", &[1]), ("text", &[])] {
            let datagram = b.recv().await.unwrap();
            assert_eq!(
                (&datagram.payload[..], &marks(&datagram)[..]),
                (payload.as_bytes(), expected)
            );
            assert!(datagram.sender.is_none() && datagram.credentials.is_none());
        }
        assert!(b.recv().now_or_never().is_none());
    });
}

#[test]
fn datagrams_have_as_many_descriptors_as_one_call_takes() {
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        let file = marked(7);
        for count in [1, 2, 252, 253] {
            a.send("many", &vec![file.as_fd(); count]).await.unwrap();
            assert_eq!(marks(&b.recv().await.unwrap()), vec![7; count]);
        }
        let error = a.send("too many", &[file.as_fd(); 254]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(b.recv().now_or_never().is_none());
    });
}

#[test]
fn a_receiver_learns_the_address_of_the_sender_and_answers() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let longest = directory.path().join("x".repeat(106 - directory.path().as_os_str().len()));
        let service = DatagramSocket::bind_addr(&abstract_name("service")).unwrap();
        let address = service.local_addr().unwrap().unwrap();
        for client in [
            DatagramSocket::bind(directory.path().join("client")).unwrap(),
            DatagramSocket::bind(&longest).unwrap(),
            DatagramSocket::bind_addr(&abstract_name("client")).unwrap(),
            DatagramSocket::bind_addr(&abstract_name("zero \0 byte")).unwrap(),
            DatagramSocket::autobind().unwrap(),
        ] {
            client.send_to("question", &[], &address).await.unwrap();
            let sender = service.recv().await.unwrap().sender.unwrap();
            assert!(is_same(&sender, &client.local_addr().unwrap().unwrap()), "{sender:?}");
            service.send_to("answer", &[marked(3).as_fd()], &sender).await.unwrap();
            let answer = client.recv().await.unwrap();
            assert_eq!((&answer.payload[..], marks(&answer)), (&b"answer"[..], vec![3]));
            assert!(is_same(&answer.sender.unwrap(), &address));
        }
        let unbound = DatagramSocket::unbound().unwrap();
        assert!(unbound.local_addr().unwrap().is_none());
        unbound.send_to("question", &[], &address).await.unwrap();
        assert!(service.recv().await.unwrap().sender.is_none());
    });
}

#[test]
fn a_datagram_that_is_too_long_is_an_error_of_its_own() {
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        setsockopt(&a, sockopt::SndBuf, &(2 << 20)).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        a.send(vec![1; 256 << 10], &[]).await.unwrap();
        if let Err(error) = a.send(vec![2; (256 << 10) + 1], &[writer.as_fd()]).await {
            return common::skipped(&format!("net.core.wmem_max is too small: {error}"));
        }
        a.send("next", &[]).await.unwrap();
        drop(writer);
        assert_eq!(b.recv().await.unwrap().payload, vec![1; 256 << 10]);
        assert!(matches!(b.recv().await, Err(Error::TruncatedPacket)));
        assert_eq!(b.recv().await.unwrap().payload, "next");
        // Its descriptor is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn descriptors_that_are_lost_are_an_error_of_their_datagram() {
    const TEST: &str = "descriptors_that_are_lost_are_an_error_of_their_datagram";
    if is_inner(TEST) {
        return run_and_pass(async {
            let (a, b) = DatagramSocket::pair().unwrap();
            let (mut reader, writer) = std::io::pipe().unwrap();
            a.send("lost", &[writer.as_fd(); 9]).await.unwrap();
            a.send("small", &[writer.as_fd(); 2]).await.unwrap();
            drop(writer);
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            let next = marked(1).as_raw_fd() as u64; // new descriptors get the lowest free number
            setrlimit(Resource::RLIMIT_NOFILE, next + 4, hard).unwrap();
            assert!(matches!(b.recv().await, Err(Error::TruncatedControl)));
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            let small = b.recv().await.unwrap();
            assert_eq!((&small.payload[..], small.fds.len()), (&b"small"[..], 2));
            drop(small);
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "descriptors have leaked");
        });
    }
    run_inner(TEST, |_| {});
}

#[test]
fn a_sender_waits_while_the_queue_is_full() {
    const COUNT: u32 = 1000;
    run(async {
        let address = abstract_name("queue");
        let service = DatagramSocket::bind_addr(&address).unwrap();
        let [connected, unconnected] = [(); 2].map(|()| DatagramSocket::unbound().unwrap());
        connected.connect_addr(&address).unwrap();
        let (pair, other) = DatagramSocket::pair().unwrap();
        let receive = async |socket: &DatagramSocket| {
            settle().await; // until the queue is full
            for n in 0..COUNT {
                assert_eq!(socket.recv().await.unwrap().payload, n.to_string());
            }
        };
        let text = |n: u32| n.to_string();
        let send = async |socket: &DatagramSocket| {
            for n in 0..COUNT {
                socket.send(text(n), &[marked(n).as_fd()]).await.unwrap();
            }
        };
        tokio::join!(send(&connected), receive(&service));
        tokio::join!(send(&pair), receive(&other));

        // An unconnected sender waits by a timer, so it sends only a few.
        let few = async {
            for n in 0..30 {
                unconnected.send_to(text(n), &[], &address).await.unwrap();
            }
        };
        let receive_few = async {
            settle().await;
            for n in 0..30 {
                assert_eq!(service.recv().await.unwrap().payload, text(n));
            }
        };
        tokio::join!(few, receive_few);

        // A send that is given up sends nothing.
        while connected.send("filler", &[]).now_or_never().is_some() {}
        let waiting = [
            connected.send("given up", &[]).now_or_never(),
            unconnected.send_to("", &[], &address).now_or_never(),
        ];
        assert!(waiting.iter().all(Option::is_none));

        // The queue is full of another socket's datagrams, so no event announces room to this one.
        let drain = async {
            settle().await;
            while service.recv().await.unwrap().payload != "after the others" {}
        };
        let (sent, ()) =
            tokio::join!(unconnected.send_to("after the others", &[], &address), drain);
        sent.unwrap();

        // Several tasks may wait at the same time.
        let senders = join_all((0..50).map(|_| connected.send("from many", &[])));
        let receiver = stream::poll_fn(|cx| service.poll_recv(cx).map(Some)).take(50).for_each(
            async |datagram| {
                assert_eq!(datagram.unwrap().payload, "from many");
            },
        );
        let (sent, ()) = tokio::join!(senders, receiver);
        assert!(sent.into_iter().all(|sent| sent.is_ok()));
    });
}

/// A send that fails makes its own socket writable for a moment.
#[test]
fn a_sender_sleeps_while_the_queue_is_full() {
    run(async {
        let address = abstract_name("sleeps");
        let _service = DatagramSocket::bind_addr(&address).unwrap();
        let [connected, unconnected] = [(); 2].map(|()| DatagramSocket::unbound().unwrap());
        connected.connect_addr(&address).unwrap();
        let (pair, _other) = DatagramSocket::pair().unwrap();
        for socket in [&connected, &pair] {
            while unconstrained(socket.send("filler", &[])).now_or_never().is_some() {}
        }
        let sends = [
            connected.send("filler", &[]).boxed_local(),
            unconnected.send_to("filler", &[], &address).boxed_local(),
            pair.send("filler", &[]).boxed_local(),
        ];
        for mut send in sends {
            let mut polls = 0;
            let counted = poll_fn(|cx| {
                polls += 1;
                send.as_mut().poll(cx)
            });
            assert!(timeout(Duration::from_millis(100), counted).await.is_err());
            assert!(polls < 50, "{polls} polls while there is no room");
        }
    });
}

#[test]
fn a_receiver_that_is_gone_is_an_error_and_not_the_end() {
    run(async {
        // There is no receiver yet.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("service");
        let address = SocketAddr::from_pathname(&path).unwrap();
        let client = DatagramSocket::autobind().unwrap();
        assert_eq!(client.connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(
            client.send("to nobody", &[]).await.unwrap_err().kind(),
            ErrorKind::NotConnected
        );
        assert_eq!(
            client.send_to("to nobody", &[], &address).await.unwrap_err().kind(),
            ErrorKind::NotFound
        );

        // The receiver goes.
        let service = DatagramSocket::bind(&path).unwrap();
        client.connect(&path).unwrap();
        client.send("one", &[]).await.unwrap();
        let one = service.recv().await.unwrap();
        drop(service);
        let refused = loop {
            // The socket is closed in the background.
            if let Err(error) = client.send("into the void", &[]).await {
                break error;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(client.recv().now_or_never().is_none(), "there is no end");

        // Another receiver at the same path gets messages.
        let service = DatagramSocket::bind(&path).unwrap();
        client.connect(&path).unwrap();
        client.send("two", &[]).await.unwrap();
        assert_eq!(service.recv().await.unwrap().payload, "two");
        assert!(is_same(&one.sender.unwrap(), &client.local_addr().unwrap().unwrap()));

        // A message that is too long fails alone.
        let long = client.send(vec![0; 8 << 20], &[]).await.unwrap_err();
        assert_eq!(long.raw_os_error(), Some(nix::libc::EMSGSIZE));
        client.send("three", &[]).await.unwrap();
        assert_eq!(service.recv().await.unwrap().payload, "three");
    });
}

#[test]
fn a_connected_socket_receives_from_its_peer_only() {
    run(async {
        let (ours, others) = (abstract_name("ours"), abstract_name("others"));
        let service = DatagramSocket::bind_addr(&ours).unwrap();
        let peer = DatagramSocket::bind_addr(&others).unwrap();
        service.connect_addr(&others).unwrap();
        let stranger = DatagramSocket::unbound().unwrap();
        let refused = stranger.send_to("hello", &[], &ours).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        peer.send_to("from the peer", &[], &ours).await.unwrap();
        assert_eq!(service.recv().await.unwrap().payload, "from the peer");

        // If it connects to another socket, its queue is discarded, and its peer gets one error.
        peer.connect_addr(&ours).unwrap();
        peer.send("discarded", &[]).await.unwrap();
        let elsewhere = abstract_name("elsewhere");
        let third = DatagramSocket::bind_addr(&elsewhere).unwrap();
        service.connect_addr(&elsewhere).unwrap();
        third.send_to("from the third", &[], &ours).await.unwrap();
        assert_eq!(service.recv().await.unwrap().payload, "from the third");
        service.connect_addr(&others).unwrap();
        service.send("again", &[]).await.unwrap();
        match peer.recv().await {
            Err(Error::Io(error)) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            other => panic!("{other:?}"),
        }
        assert!(service.recv().now_or_never().is_none());
        assert_eq!(peer.recv().await.unwrap().payload, "again");
    });
}

#[test]
fn a_connected_socket_receives_from_others_before_it_connects_and_after_its_peer_is_gone() {
    run(async {
        let (ours, others) = (abstract_name("connected"), abstract_name("gone-peer"));
        let client = DatagramSocket::bind_addr(&ours).unwrap();
        let peer = DatagramSocket::bind_addr(&others).unwrap();
        let stranger = DatagramSocket::unbound().unwrap();
        stranger.send_to("before", &[], &ours).await.unwrap();
        client.connect_addr(&others).unwrap();
        let refused = stranger.send_to("meanwhile", &[], &ours).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        assert_eq!(client.recv().await.unwrap().payload, "before");

        peer.send_to("the last words", &[], &ours).await.unwrap();
        drop(peer);
        let refused = loop {
            // The socket is closed in the background.
            if let Err(error) = client.send("into the void", &[]).await {
                break error;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(client.send("again", &[]).await.unwrap_err().kind(), ErrorKind::NotConnected);
        stranger.send_to("after", &[], &ours).await.unwrap();
        assert_eq!(client.recv().await.unwrap().payload, "after", "the last words are discarded");
    });
}

#[test]
fn a_path_is_for_its_owner_only_and_is_removed_with_the_socket() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;

        // A socket that nobody has open is replaced.
        drop(UnixDatagram::bind(&path).unwrap());

        // The mode is for the owner only, unless another one is given.
        let socket = DatagramSocket::bind(&path).unwrap();
        assert_eq!(mode(), 0o600);
        drop(socket);
        let socket = DatagramSocket::bind_with_mode(&path, 0o666).unwrap();
        assert_eq!(mode(), 0o666);
        assert_eq!(DatagramSocket::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a file was left behind");

        // Live sockets without a lock stay, even connected ones, and so do files that are no
        // socket.
        let foreign = UnixDatagram::bind(&path).unwrap();
        assert_eq!(DatagramSocket::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        let peer = abstract_name("peer");
        let _peer = DatagramSocket::bind_addr(&peer).unwrap();
        foreign.connect_addr(&peer).unwrap();
        assert_eq!(DatagramSocket::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(foreign);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(DatagramSocket::bind(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();

        // The file of a socket that was converted into a descriptor stays.
        let fd = OwnedFd::from(DatagramSocket::bind(&path).unwrap());
        let socket = DatagramSocket::try_from(fd).unwrap();
        UnixDatagram::unbound().unwrap().send_to(b"still here", &path).unwrap();
        assert_eq!(socket.recv().await.unwrap().payload, "still here");
    });
}

#[test]
fn another_uid_can_send_to_a_path_only_if_its_mode_allows_that() {
    const TEST: &str = "another_uid_can_send_to_a_path_only_if_its_mode_allows_that";
    if is_inner(TEST) {
        return run_and_pass(async {
            let directory = std::env::var("FDWIRE_DIRECTORY").unwrap();
            let socket = DatagramSocket::unbound().unwrap();
            let refused = socket.connect(Path::new(&directory).join("private")).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
            socket.connect(Path::new(&directory).join("public")).unwrap();
            socket.send("hello", &[]).await.unwrap();
        });
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        use std::os::unix::process::CommandExt;
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let _private = DatagramSocket::bind(directory.path().join("private")).unwrap();
        let public =
            DatagramSocket::bind_with_mode(directory.path().join("public"), 0o666).unwrap();
        run_inner(TEST, |command| {
            _ = command.uid(uid).gid(uid).env("FDWIRE_DIRECTORY", directory.path())
        });
        assert_eq!(public.recv().await.unwrap().payload, "hello");
    });
}

#[test]
fn receives_that_are_given_up_lose_nothing_and_many_tasks_may_receive() {
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        assert!(b.recv().now_or_never().is_none());
        a.send("kept", &[marked(1).as_fd()]).await.unwrap();
        assert_eq!(b.recv().await.unwrap().payload, "kept");

        let receivers = join_all((0..10).map(async |_| b.recv().await.unwrap().payload));
        let send = async {
            settle().await;
            for n in 0..10 {
                a.send(n.to_string(), &[]).await.unwrap();
            }
        };
        let (mut received, ()) = tokio::join!(receivers, send);
        received.sort();
        assert_eq!(received, Vec::from_iter((0..10).map(|n| n.to_string())));
    });
}

#[test]
fn sockets_of_other_types_are_refused_with_a_reason() {
    run(async {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let listener = UnixListener::bind_addr(&abstract_name("listener")).unwrap();
        for (fd, reason) in [
            (marked(1), "not a socket"),
            (copy(udp.as_fd()), "not a Unix socket"),
            (copy(listener.as_fd()), "not SOCK_DGRAM"),
            (Socket::pair(SocketKind::SeqPacket).unwrap().0.into(), "not SOCK_DGRAM"),
            (UnixStream::pair().unwrap().0.into(), "not SOCK_DGRAM"),
        ] {
            let error = DatagramSocket::try_from(fd).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error}");
        }
        let (a, b) = UnixDatagram::pair().unwrap();
        let b = DatagramSocket::try_from(b).unwrap();
        a.send(b"from std").unwrap();
        assert_eq!(b.recv().await.unwrap().payload, "from std");
    });
}

/// The thread that receives closes none of the descriptors.
#[test]
fn descriptors_that_nobody_takes_are_closed_as_fast_as_they_come() {
    const TEST: &str = "descriptors_that_nobody_takes_are_closed_as_fast_as_they_come";
    if is_inner(TEST) {
        return run_and_pass(async {
            let (a, b) = DatagramSocket::pair().unwrap();
            let sockets =
                Vec::from_iter((0..250).map(|_| OwnedFd::from(UnixStream::pair().unwrap().0)));
            let fds = Vec::from_iter(sockets.iter().map(AsFd::as_fd));
            let before = open_fds();
            for _ in 0..100 {
                a.send("x", &fds).await.unwrap();
                drop(b.recv().await.unwrap());
                assert!(open_fds() < before + 506 + 253 + 10);
            }
        });
    }
    run_inner(TEST, |_| {});
}

#[test]
fn a_socket_that_takes_no_descriptors_refuses_them_to_the_sender() {
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        if let Err(error) = b.set_pass_fds(false) {
            return eprintln!("skipped: this kernel has no SO_PASSRIGHTS: {error}");
        }
        let file = marked(1);
        assert_eq!(
            a.send("x", &[file.as_fd()]).await.unwrap_err().kind(),
            ErrorKind::PermissionDenied
        );
        a.send("without", &[]).await.unwrap();
        assert_eq!(b.recv().await.unwrap().payload, "without");
    });
}
