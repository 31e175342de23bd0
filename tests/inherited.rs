//! Sockets that a process was started with: as standard input, or under a number from its parent.
//!
//! Each test runs in two processes. The inner one uses descriptors by their numbers, so nothing
//! else runs in it.

mod common;

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::Barrier,
    thread,
};

use common::{
    KINDS, PASSED, abstract_name, descriptors_of_a_child, marked, one_thread, other_uid, run,
    run_and_pass,
};
use fdwire::{
    Frame, FrameCodec, Framed, Listener, Socket, SocketKind, blocking, socket::DatagramSocket,
};
use futures::{FutureExt, SinkExt, TryStreamExt};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::resource::{Resource, getrlimit, setrlimit},
};

/// The number under which the inner process of a test has its socket.
const NUMBER: i32 = 7;

/// Returns true in the inner process of a test.
fn is_inner(test: &str) -> bool {
    std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == test)
}

fn has_passed(status: ExitStatus) -> bool {
    status.code() == Some(PASSED)
}

/// Returns a command that runs the test `name` as a process of its own, without standard input.
fn inner(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture"]).env("FDWIRE_ROLE", name).stdin(Stdio::null());
    command
}

/// Returns the same command with two descriptors that the process inherits, under [`NUMBER`] and
/// the number after it.
fn inner_with(name: &str, fd: impl Into<OwnedFd>, second: impl Into<OwnedFd>) -> Command {
    let command = inner(name);
    let mut shell = Command::new("sh");
    let redirect = format!("exec \"$@\" {NUMBER}<&0 {}<&1 </dev/null >/dev/null", NUMBER + 1);
    shell.args(["-c", &redirect, "sh"]).arg(command.get_program()).args(command.get_args());
    shell.env("FDWIRE_ROLE", name).stdin(fd.into()).stdout(second.into());
    shell
}

fn framed(socket: Socket) -> Framed<FrameCodec> {
    Framed::new(socket, FrameCodec::default())
}

/// Returns the path that a descriptor number of this process leads to.
fn target(number: i32) -> String {
    fs::read_link(format!("/proc/self/fd/{number}"))
        .unwrap()
        .into_os_string()
        .into_string()
        .unwrap()
}

fn is_close_on_exec(fd: impl AsFd) -> bool {
    FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap()).contains(FdFlag::FD_CLOEXEC)
}

#[test]
fn a_socket_is_taken_by_its_number_once_and_leaves_no_copy_to_children() {
    const TEST: &str = "a_socket_is_taken_by_its_number_once_and_leaves_no_copy_to_children";
    if is_inner(TEST) {
        return run_and_pass(async {
            // The number can be taken once.
            assert!(descriptors_of_a_child().contains("socket:"), "this process inherits nothing");
            let socket = Socket::from_inherited(NUMBER).unwrap();
            assert!(is_close_on_exec(&socket) && socket.as_fd().as_raw_fd() > NUMBER);
            let error = Socket::from_inherited(NUMBER).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ResourceBusy);
            assert_eq!(error.to_string(), format!("descriptor {NUMBER}: it was taken before"));
            assert_eq!(
                Listener::from_inherited(NUMBER).unwrap_err().kind(),
                ErrorKind::ResourceBusy
            );

            // Children do not get the socket.
            let children = descriptors_of_a_child();
            assert!(
                !children.contains("socket:") && !children.contains(&format!(" {NUMBER} ->")),
                "{children}"
            );
            assert_eq!(target(NUMBER), "/dev/null");
            framed(socket).send(Frame::new("here").with_fd(marked(1))).await.unwrap();
            // A number that was taken once is never free for other files.
            assert_eq!(Socket::from_inherited(NUMBER).unwrap_err().kind(), ErrorKind::ResourceBusy);
        });
    }
    run(async {
        for kind in KINDS {
            let (ours, theirs) = Socket::pair(kind).unwrap();
            let mut command = inner_with(TEST, theirs, marked(2));
            let mut child = command.spawn().unwrap();
            drop(command);
            let mut ours = framed(ours);
            let frame = ours.try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], common::marks(&frame)), (&b"here"[..], vec![1]));
            assert!(
                ours.try_next().await.unwrap().is_none(),
                "a process still has a copy of the socket"
            );
            assert!(has_passed(child.wait().unwrap()));
        }
    });
}

#[test]
fn a_number_that_is_refused_keeps_its_file() {
    const TEST: &str = "a_number_that_is_refused_keeps_its_file";
    if is_inner(TEST) {
        return run_and_pass(async {
            let refused = |error: io::Error, reason: &str| {
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
                assert!(error.to_string().contains(reason), "{error}");
            };

            // Numbers that were not inherited.
            for number in 0..=2 {
                refused(Socket::from_inherited(number).unwrap_err(), "from_stdin");
                refused(Listener::from_inherited(number).unwrap_err(), "from_stdin");
            }
            for number in [-1, i32::MIN, i32::MAX, 99] {
                refused(Socket::from_inherited(number).unwrap_err(), "not open");
            }
            let ours = UnixStream::pair().unwrap().0;
            refused(Socket::from_inherited(ours.as_raw_fd()).unwrap_err(), "close-on-exec");
            ours.set_nonblocking(true).unwrap(); // it is still a socket

            // A file of the wrong kind.
            refused(Socket::from_inherited(NUMBER).unwrap_err(), "listening");
            refused(Listener::from_inherited(NUMBER + 1).unwrap_err(), "not a socket");
            assert!(target(NUMBER + 1).contains("memfd"), "{}", target(NUMBER + 1));
            assert!(
                descriptors_of_a_child().contains("socket:"),
                "a child does not inherit the refused socket"
            );

            // A limit of descriptors that leaves no room.
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, NUMBER as u64, hard).unwrap();
            refused(Listener::from_inherited(NUMBER).unwrap_err(), "RLIMIT_NOFILE");
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();

            // After these failures, the listener can still be taken.
            let listener = Listener::from_inherited(NUMBER).unwrap();
            assert!(is_close_on_exec(&listener));
            assert!(!descriptors_of_a_child().contains("socket:"));
            framed(listener.accept().await.unwrap()).send(Frame::new("accepted")).await.unwrap();
        });
    }
    run(async {
        for kind in KINDS {
            let addr = abstract_name("refused");
            let listener = Listener::bind_addr(&addr, kind).unwrap();
            let mut child = inner_with(TEST, listener, marked(2)).spawn().unwrap();
            let mut client = framed(Socket::connect_addr(&addr, kind).await.unwrap());
            assert_eq!(client.try_next().await.unwrap().unwrap().payload, "accepted");
            assert!(has_passed(child.wait().unwrap()));
        }
    });
}

#[test]
fn a_datagram_socket_is_taken_by_its_number_too() {
    const TEST: &str = "a_datagram_socket_is_taken_by_its_number_too";
    if is_inner(TEST) {
        return run_and_pass(async {
            assert!(Socket::from_inherited(NUMBER).unwrap_err().to_string().contains("neither"));
            let socket = DatagramSocket::from_inherited(NUMBER).unwrap();
            assert!(is_close_on_exec(&socket) && !descriptors_of_a_child().contains("socket:"));
            assert_eq!(
                DatagramSocket::from_inherited(NUMBER).unwrap_err().kind(),
                ErrorKind::ResourceBusy
            );
            socket.send("here", &[]).await.unwrap();
        });
    }
    run(async {
        let (ours, theirs) = DatagramSocket::pair().unwrap();
        let mut child = inner_with(TEST, theirs, marked(2)).spawn().unwrap();
        assert_eq!(ours.recv().await.unwrap().payload, "here");
        assert!(has_passed(child.wait().unwrap()));
    });
}

#[test]
fn only_one_of_many_threads_that_take_a_number_gets_the_socket() {
    const TEST: &str = "only_one_of_many_threads_that_take_a_number_gets_the_socket";
    const THREADS: usize = 8;
    if is_inner(TEST) {
        let start = Barrier::new(THREADS);
        let taken = thread::scope(|scope| {
            let take = || {
                let runtime = one_thread();
                let _context = runtime.enter();
                start.wait();
                Socket::from_inherited(NUMBER).map(drop).map_err(|error| error.kind())
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(taken.iter().filter(|taken| taken.is_ok()).count(), 1, "{taken:?}");
        assert!(
            taken.iter().all(|taken| taken.is_ok() || *taken == Err(ErrorKind::ResourceBusy)),
            "{taken:?}"
        );
        return run_and_pass(async {});
    }
    for _ in 0..5 {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert!(has_passed(inner_with(TEST, theirs, marked(2)).status().unwrap()));
    }
}

/// A failure leaves the number as it was, so that the call can be repeated.
#[test]
fn without_a_free_descriptor_an_inherited_socket_is_not_taken() {
    const TEST: &str = "without_a_free_descriptor_an_inherited_socket_is_not_taken";
    if is_inner(TEST) {
        return run_and_pass(async {
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            // Start the crate's own threads before the limit is set.
            Socket::pair(SocketKind::Stream).unwrap();

            // Taking a socket needs two descriptors. It fails with none and with one.
            for spare in 0..=1 {
                // New descriptors get the lowest free number.
                let mut last = marked(3);
                while last.as_raw_fd() < NUMBER + 20 {
                    std::mem::forget(std::mem::replace(&mut last, marked(3)));
                }
                setrlimit(Resource::RLIMIT_NOFILE, last.as_raw_fd() as u64 + 1 + spare, hard)
                    .unwrap();
                for error in
                    [Socket::from_inherited(NUMBER).unwrap_err(), Socket::from_stdin().unwrap_err()]
                {
                    assert_eq!(
                        error.raw_os_error(),
                        Some(nix::libc::EMFILE),
                        "{spare} to spare: {error}"
                    );
                }
                setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            }

            // With more, it succeeds.
            assert!(target(NUMBER).starts_with("socket:"));
            framed(Socket::from_inherited(NUMBER).unwrap()).send(Frame::new("late")).await.unwrap();
        });
    }
    run(async {
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut child = inner_with(TEST, theirs, marked(2)).spawn().unwrap();
        assert_eq!(framed(ours).try_next().await.unwrap().unwrap().payload, "late");
        assert!(has_passed(child.wait().unwrap()));
    });
}

#[test]
fn without_a_runtime_an_inherited_socket_is_not_taken() {
    const TEST: &str = "without_a_runtime_an_inherited_socket_is_not_taken";
    if is_inner(TEST) {
        assert!(std::panic::catch_unwind(|| Socket::from_inherited(NUMBER)).is_err());
        assert!(target(NUMBER).starts_with("socket:"));
        return run_and_pass(async { drop(Socket::from_inherited(NUMBER).unwrap()) });
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(has_passed(inner_with(TEST, theirs, marked(2)).status().unwrap()));
}

#[test]
fn a_listener_is_taken_from_standard_input() {
    const TEST: &str = "a_listener_is_taken_from_standard_input";
    if is_inner(TEST) {
        return run_and_pass(async {
            assert!(Socket::from_stdin().unwrap_err().to_string().contains("listening"));
            let listener = Listener::from_stdin().unwrap();
            assert_eq!(target(0), "/dev/null");
            framed(listener.accept().await.unwrap()).send(Frame::new("here")).await.unwrap();
        });
    }
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut child =
            inner(TEST).stdin(OwnedFd::from(listener)).stdout(Stdio::null()).spawn().unwrap();
        let mut client = framed(Socket::connect(&path, SocketKind::Stream).await.unwrap());
        assert_eq!(client.try_next().await.unwrap().unwrap().payload, "here");
        assert!(has_passed(child.wait().unwrap()));
    });
}

#[test]
fn standard_input_is_taken_once_and_leaves_an_end_of_file() {
    const TEST: &str = "standard_input_is_taken_once_and_leaves_an_end_of_file";
    if is_inner(TEST) {
        return run_and_pass(async {
            // Standard input can be taken once.
            let socket = Socket::from_stdin().unwrap();
            let error = Socket::from_stdin().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ResourceBusy);
            assert_eq!(error.to_string(), "standard input: it was taken before");

            // Standard input is at its end now, for this process and its children.
            assert_eq!(target(0), "/dev/null");
            assert!(!is_close_on_exec(io::stdin()), "children would have no standard input");
            assert!(!descriptors_of_a_child().contains("socket:"));
            let read = Command::new("cat").stdin(Stdio::inherit()).output().unwrap();
            assert!(read.status.success() && read.stdout.is_empty(), "a child reads messages");
            assert_eq!(io::stdin().lines().count(), 0);

            // The socket works, and dropping it ends the connection.
            let mut parent = framed(socket);
            assert_eq!(parent.try_next().await.unwrap().unwrap().payload, "for the child");
            parent.send(Frame::new("here")).await.unwrap();
            drop(parent);
            // This process lives on until the parent has seen the end of the connection.
            let stderr = UnixStream::from(io::stderr().as_fd().try_clone_to_owned().unwrap());
            assert_eq!(io::read_to_string(stderr).unwrap(), "");
        });
    }
    run(async {
        for kind in KINDS {
            let (ours, theirs) = Socket::pair(kind).unwrap();
            let (until_it_ends, end) = UnixStream::pair().unwrap();
            let mut command = inner(TEST);
            command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(OwnedFd::from(end));
            let mut child = command.spawn().unwrap();
            drop(command);
            let mut ours = framed(ours);
            ours.send(Frame::new("for the child")).await.unwrap();
            assert_eq!(ours.try_next().await.unwrap().unwrap().payload, "here");
            assert!(
                ours.try_next().await.unwrap().is_none(),
                "dropping the socket does not end the connection"
            );
            assert!(child.try_wait().unwrap().is_none());
            drop(until_it_ends);
            assert!(has_passed(child.wait().unwrap()));
        }
    });
}

#[test]
fn standard_input_that_is_no_socket_is_refused_and_stays() {
    const TEST: &str = "standard_input_that_is_no_socket_is_refused_and_stays";
    if is_inner(TEST) {
        return run_and_pass(async {
            let error = Socket::from_stdin().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().starts_with("standard input: "), "{error}");
            assert_eq!(io::read_to_string(io::stdin()).unwrap(), "text for the program");
        });
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("input");
    fs::write(&path, "text for the program").unwrap();
    assert!(has_passed(inner(TEST).stdin(fs::File::open(path).unwrap()).status().unwrap()));
}

#[test]
fn without_dev_null_standard_input_still_leaves_an_end_of_file() {
    const TEST: &str = "without_dev_null_standard_input_still_leaves_an_end_of_file";
    if is_inner(TEST) {
        return run_and_pass(async {
            nix::unistd::chroot(&*std::env::var("FDWIRE_ROOT").unwrap()).unwrap();
            assert!(!Path::new("/dev/null").exists());
            let _socket = Socket::from_stdin().unwrap();
            assert_eq!(io::stdin().lines().count(), 0);
        });
    }
    if other_uid().is_none() {
        return; // chroot takes root too
    }
    let directory = tempfile::tempdir().unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut command = inner(TEST);
    command.env("FDWIRE_ROOT", directory.path()).stdin(OwnedFd::from(theirs));
    assert!(has_passed(command.status().unwrap()));
}

#[test]
fn a_clone_is_another_handle_to_the_same_socket() {
    run(async {
        for kind in KINDS {
            // A clone of an accepted connection.
            let addr = abstract_name("clone");
            let listener = Listener::bind_addr(&addr, kind).unwrap();
            let client = Socket::connect_addr(&addr, kind).await.unwrap();
            let accepted = listener.accept().await.unwrap();
            let clone = accepted.try_clone().unwrap();
            assert!(is_close_on_exec(&clone));
            assert_eq!(
                (clone.kind(), clone.peer_cred().unwrap()),
                (kind, accepted.peer_cred().unwrap())
            );

            // Both send on the same connection, which ends with the last one.
            let (mut client, mut first, mut second) =
                (framed(client), framed(accepted), framed(clone));
            first.send(Frame::new("one")).await.unwrap();
            second.send(Frame::new("two")).await.unwrap();
            client.send(Frame::new("to either")).await.unwrap();
            assert_eq!(client.try_next().await.unwrap().unwrap().payload, "one");
            assert_eq!(client.try_next().await.unwrap().unwrap().payload, "two");
            drop(first);
            assert!(
                client.try_next().now_or_never().is_none(),
                "the connection ends with the first handle"
            );
            assert_eq!(second.try_next().await.unwrap().unwrap().payload, "to either");
            second.close().await.unwrap();
            assert!(client.try_next().await.unwrap().is_none());
        }
    });
}

#[test]
fn a_program_without_a_runtime_takes_its_sockets_in_the_same_way() {
    const TEST: &str = "a_program_without_a_runtime_takes_its_sockets_in_the_same_way";
    if is_inner(TEST) {
        // Each number can be taken once, on whichever side.
        let socket = blocking::Socket::from_inherited(NUMBER).unwrap();
        let listener = blocking::Listener::from_inherited(NUMBER + 1).unwrap();
        assert!(is_close_on_exec(&socket) && is_close_on_exec(&listener));
        for number in [NUMBER, NUMBER + 1] {
            assert_eq!(target(number), "/dev/null");
            let error = blocking::Socket::from_inherited(number).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ResourceBusy);
            assert_eq!(Socket::from_inherited(number).unwrap_err().kind(), ErrorKind::ResourceBusy);
        }
        assert_eq!(blocking::Socket::from_stdin().unwrap_err().kind(), ErrorKind::InvalidInput);

        // The socket and the listener work.
        let mut parent = blocking::Framed::new(socket, FrameCodec::default());
        parent.send(Frame::new("here").with_fd(marked(1))).unwrap();
        let mut client = blocking::Framed::new(listener.accept().unwrap(), FrameCodec::default());
        client.send(Frame::new("accepted")).unwrap();
        std::process::exit(PASSED);
    }
    for kind in KINDS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (ours, theirs) = blocking::Socket::pair(kind).unwrap();
        let listener = blocking::Listener::bind(&path, kind).unwrap();
        let client = blocking::Socket::connect(&path, kind).unwrap();
        let mut command = inner_with(TEST, theirs, listener);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut ours = blocking::Framed::new(ours, FrameCodec::default());
        assert_eq!(common::marks(&ours.next().unwrap().unwrap()), [1]);
        let mut client = blocking::Framed::new(client, FrameCodec::default());
        assert_eq!(client.next().unwrap().unwrap().payload, "accepted");
        assert!(
            ours.next().is_none() && client.next().is_none(),
            "a process still has copies of the sockets"
        );
        assert!(has_passed(child.wait().unwrap()));
    }
}

#[test]
fn a_program_without_a_runtime_takes_its_socket_from_standard_input() {
    const TEST: &str = "a_program_without_a_runtime_takes_its_socket_from_standard_input";
    if is_inner(TEST) {
        let mut parent =
            blocking::Framed::new(blocking::Socket::from_stdin().unwrap(), FrameCodec::default());
        assert_eq!(target(0), "/dev/null");
        assert_eq!(blocking::Socket::from_stdin().unwrap_err().kind(), ErrorKind::ResourceBusy);
        parent.send(Frame::new("here")).unwrap();
        std::process::exit(PASSED);
    }
    for kind in KINDS {
        let (ours, theirs) = blocking::Socket::pair(kind).unwrap();
        let mut command = inner(TEST);
        let mut child = command.stdin(OwnedFd::from(theirs)).spawn().unwrap();
        drop(command);
        let mut ours = blocking::Framed::new(ours, FrameCodec::default());
        assert_eq!(ours.next().unwrap().unwrap().payload, "here");
        assert!(ours.next().is_none());
        assert!(has_passed(child.wait().unwrap()));
    }
}
