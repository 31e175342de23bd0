//! Credentials: the kernel reports with each message which process has sent it.
//!
//! The writers are processes of their own that share one end of a connection.

mod common;

use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::Command,
};

use bytes::BytesMut;
use common::{
    KINDS, abstract_name, encoded, marked, other_uid, raw_send, role_socket, run, spawn_role,
};
use fdwire::{
    Error, Frame, FrameCodec, Framed, Listener, Socket, SocketKind,
    codec::{Codec, PacketCodec},
    socket::{Credentials, DatagramSocket, PassCredentials},
};
use futures::{FutureExt, SinkExt, TryStreamExt};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{getsockopt, setsockopt, sockopt},
};

fn own_pid() -> Option<i32> {
    Some(std::process::id() as i32)
}

fn pid_of(credentials: Option<&Credentials>) -> Option<i32> {
    credentials.and_then(|sender| sender.pid)
}

/// In the inner process of a test, writes the pieces to the socket at standard input, with one
/// system call for each, and returns true. Returns false in the test itself.
fn write_if_inner(test: &str) -> bool {
    let Some(socket) = role_socket(test) else { return false };
    let pieces = std::env::var("FDWIRE_PIECES").unwrap();
    for piece in pieces.split(' ') {
        let bytes = Vec::from_iter(
            (0..piece.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&piece[at..at + 2], 16).unwrap()),
        );
        raw_send(&socket, &bytes, &[]);
    }
    true
}

/// Lets another process write to a copy of a socket, and waits for its end. Returns its process id.
fn write_elsewhere(test: &str, uid: Option<u32>, socket: &impl AsFd, pieces: &[&[u8]]) -> i32 {
    let hex = |bytes: &&[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut command = Command::new("/proc/self/exe");
    command.args([test, "--exact"]).env("FDWIRE_ROLE", test).stdout(std::process::Stdio::null());
    command.env("FDWIRE_PIECES", pieces.iter().map(hex).collect::<Vec<_>>().join(" "));
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let mut child = command.stdin(socket.as_fd().try_clone_to_owned().unwrap()).spawn().unwrap();
    assert!(child.wait().unwrap().success());
    child.id() as i32
}

/// Makes a receiver with these credentials switched on, and the bare other end.
fn receiver<C: Codec + Clone>(
    kind: SocketKind,
    codec: C,
    pass: PassCredentials,
) -> (Framed<C>, OwnedFd) {
    let (a, b) = Socket::pair(kind).unwrap();
    a.set_pass_credentials(pass).unwrap();
    (Framed::new(a, codec), b.into())
}

/// Returns the next payload, and the process id of its sender.
async fn next(rx: &mut Framed<FrameCodec>) -> (String, Option<i32>) {
    let frame = rx.try_next().await.unwrap().unwrap();
    (String::from_utf8(frame.payload.to_vec()).unwrap(), pid_of(rx.credentials()))
}

#[test]
fn each_message_has_its_own_sender() {
    const TEST: &str = "each_message_has_its_own_sender";
    if write_if_inner(TEST) {
        return;
    }
    run(async {
        for kind in KINDS {
            let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::Ids);
            assert!(rx.credentials().is_none());

            // Messages of two processes alternate.
            let (one, two) = (encoded(b"one", 0), encoded(b"two", 1));
            raw_send(&peer, &[&one[..], &one].concat(), &[]);
            let child = write_elsewhere(TEST, None, &peer, &[&one, &one]);
            raw_send(&peer, &two, &[marked(3)]);
            for (text, pid) in
                [("one", own_pid()), ("one", own_pid()), ("one", Some(child)), ("one", Some(child))]
            {
                assert_eq!(next(&mut rx).await, (text.to_owned(), pid), "on {kind:?}");
            }
            assert_eq!(next(&mut rx).await, ("two".to_owned(), own_pid()));

            // Bytes that complete no message do not change the sender of the last one.
            let child = write_elsewhere(TEST, None, &peer, &[&one]);
            raw_send(&peer, &one[..9], &[]);
            assert_eq!(next(&mut rx).await, ("one".to_owned(), Some(child)));
            assert!(rx.try_next().now_or_never().is_none());
            assert_eq!(pid_of(rx.credentials()), Some(child), "on {kind:?}");
            raw_send(&peer, &one[9..], &[]);
            assert_eq!(next(&mut rx).await, ("one".to_owned(), own_pid()));
        }
    });
}

#[test]
fn a_message_of_another_uid_has_the_credentials_of_that_uid() {
    const TEST: &str = "a_message_of_another_uid_has_the_credentials_of_that_uid";
    if write_if_inner(TEST) {
        return;
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        for kind in KINDS {
            let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::Ids);
            // The peer is still the process that has made the connection.
            let child = write_elsewhere(TEST, Some(uid), &peer, &[&encoded(b"from elsewhere", 0)]);
            rx.try_next().await.unwrap().unwrap();
            let sender = rx.credentials().unwrap();
            assert_eq!((sender.uid, sender.gid, sender.pid), (uid, uid, Some(child)));
            assert!(sender.pidfd.is_none());
            assert_eq!(
                (rx.socket().peer_cred().unwrap().uid, rx.socket().peer_cred().unwrap().pid),
                (0, own_pid())
            );
        }
    });
}

#[test]
fn a_message_of_several_processes_ends_the_stream() {
    const TEST: &str = "a_message_of_several_processes_ends_the_stream";
    if write_if_inner(TEST) {
        return;
    }
    run(async {
        for kind in KINDS {
            let frame = encoded(b"half of it is from elsewhere", 0);
            for cut in [1, 8, frame.len() - 1] {
                // Two processes write one message.
                let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::Ids);
                let before = encoded(b"before", 0);
                raw_send(&peer, &[&before[..], &frame[..cut]].concat(), &[]);
                write_elsewhere(TEST, None, &peer, &[&frame[cut..]]);
                assert_eq!(next(&mut rx).await, ("before".to_owned(), own_pid()));
                let error = rx.try_next().await.unwrap_err();
                assert!(matches!(error, Error::MixedSenders), "{error} on {kind:?}");
                assert!(rx.try_next().await.unwrap().is_none());
                assert_eq!(pid_of(rx.credentials()), own_pid(), "the last message is unchanged");

                // Without credentials, such a message is received.
                let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::No);
                raw_send(&peer, &frame[..cut], &[]);
                write_elsewhere(TEST, None, &peer, &[&frame[cut..]]);
                assert_eq!(next(&mut rx).await, ("half of it is from elsewhere".to_owned(), None));
            }

            // A descriptor of one process does not get into the message of another.
            let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::Ids);
            raw_send(&peer, &encoded(b"one", 0), &[marked(1)]);
            write_elsewhere(TEST, None, &peer, &[&encoded(b"claims it", 1)]);
            assert_eq!(next(&mut rx).await, ("one".to_owned(), own_pid()));
            assert!(matches!(rx.try_next().await, Err(Error::MixedSenders)));
        }
    });
}

#[test]
fn a_message_sent_before_credentials_were_switched_on_has_no_known_sender() {
    run(async {
        for kind in KINDS {
            let (a, b) = Socket::pair(kind).unwrap();
            let (rx, peer) = (Framed::new(a, FrameCodec::default()), OwnedFd::from(b));
            raw_send(&peer, &encoded(b"early", 0), &[]);
            rx.socket().set_pass_credentials(PassCredentials::IdsAndPidfd).unwrap();
            let mut rx = rx;
            raw_send(&peer, &encoded(b"late", 0), &[]);
            assert_eq!(next(&mut rx).await, ("early".to_owned(), None));
            assert_eq!(next(&mut rx).await, ("late".to_owned(), own_pid()));

            // A message whose beginning was received before has no sender either.
            let frame = encoded(b"in two parts", 0);
            rx.socket().set_pass_credentials(PassCredentials::No).unwrap();
            raw_send(&peer, &frame[..10], &[]);
            assert!(rx.try_next().now_or_never().is_none());
            rx.socket().set_pass_credentials(PassCredentials::Ids).unwrap();
            raw_send(&peer, &frame[10..], &[]);
            assert_eq!(next(&mut rx).await, ("in two parts".to_owned(), None));
            raw_send(&peer, &frame, &[]);
            assert_eq!(next(&mut rx).await, ("in two parts".to_owned(), own_pid()));
        }
    });
}

#[test]
fn a_pidfd_comes_with_the_message_and_names_its_sender() {
    const TEST: &str = "a_pidfd_comes_with_the_message_and_names_its_sender";
    if write_if_inner(TEST) {
        return;
    }
    run(async {
        for kind in KINDS {
            let (a, b) = Socket::pair(kind).unwrap();
            if let Err(error) = a.set_pass_credentials(PassCredentials::IdsAndPidfd) {
                return eprintln!("skipped: this kernel has no SO_PASSPIDFD: {error}");
            }
            let (mut rx, peer) = (Framed::new(a, FrameCodec::default()), OwnedFd::from(b));
            // There is still room for as many descriptors as one send takes.
            raw_send(&peer, &encoded(b"from here", 253), &Vec::from_iter((0..253).map(marked)));
            assert_eq!(rx.try_next().await.unwrap().unwrap().fds.len(), 253);
            let pidfd = rx.credentials().unwrap().pidfd.as_ref().unwrap();
            let info =
                fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
            assert!(info.contains(&format!("Pid:\t{}\n", std::process::id())), "{info}");

            rx.socket().set_pass_credentials(PassCredentials::Ids).unwrap();
            raw_send(&peer, &encoded(b"without", 0), &[]);
            rx.try_next().await.unwrap().unwrap();
            assert!(rx.credentials().unwrap().pidfd.is_none());
        }
    });
}

/// At the limit of descriptors, the pidfd is missing. The message and its ids are there.
#[test]
fn without_a_descriptor_to_spare_there_is_no_pidfd() {
    const TEST: &str = "without_a_descriptor_to_spare_there_is_no_pidfd";
    if role_socket(TEST).is_some() {
        return run(async {
            for kind in KINDS {
                let (mut rx, peer) =
                    receiver(kind, FrameCodec::default(), PassCredentials::IdsAndPidfd);
                raw_send(&peer, &encoded(b"ids", 0), &[]);
                let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
                // New descriptors get the lowest free number.
                let last = marked(1).as_raw_fd() as u64;
                setrlimit(Resource::RLIMIT_NOFILE, last, hard).unwrap();
                assert_eq!(next(&mut rx).await, ("ids".to_owned(), own_pid()));
                assert!(rx.credentials().unwrap().pidfd.is_none());
                setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            }
        });
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(spawn_role(TEST, None, theirs.into()).wait().unwrap().success());
}

#[test]
fn packets_have_their_own_senders() {
    const TEST: &str = "packets_have_their_own_senders";
    if write_if_inner(TEST) {
        return;
    }
    run(async {
        let (mut rx, peer) =
            receiver(SocketKind::SeqPacket, PacketCodec::default(), PassCredentials::Ids);
        raw_send(&peer, b"one", &[]);
        let child = write_elsewhere(TEST, None, &peer, &[b"two", b"three"]);
        raw_send(&peer, b"four", &[]);
        for (text, pid) in
            [("one", own_pid()), ("two", Some(child)), ("three", Some(child)), ("four", own_pid())]
        {
            assert_eq!(rx.try_next().await.unwrap().unwrap().payload, text);
            assert_eq!(pid_of(rx.credentials()), pid);
        }
    });
}

#[test]
fn datagrams_have_their_own_senders() {
    const TEST: &str = "datagrams_have_their_own_senders";
    if write_if_inner(TEST) {
        return;
    }
    let uid = other_uid();
    run(async {
        let (a, b) = DatagramSocket::pair().unwrap();
        a.send("early", &[]).await.unwrap();
        b.set_pass_credentials(PassCredentials::Ids).unwrap();
        a.send("here", &[marked(1).as_fd()]).await.unwrap();
        let child = write_elsewhere(TEST, uid, &a, &[b"there"]);
        assert!(b.recv().await.unwrap().credentials.is_none());
        let here = b.recv().await.unwrap();
        assert_eq!((pid_of(here.credentials.as_ref()), here.fds.len()), (own_pid(), 1));
        let there = b.recv().await.unwrap().credentials.unwrap();
        assert_eq!(there.pid, Some(child));
        assert_eq!(there.uid, uid.unwrap_or(nix::unistd::getuid().as_raw()));
        b.set_pass_credentials(PassCredentials::No).unwrap();
        a.send("switched off", &[]).await.unwrap();
        assert!(b.recv().await.unwrap().credentials.is_none());
        if b.set_pass_credentials(PassCredentials::IdsAndPidfd).is_ok() {
            a.send("with a pidfd", &[]).await.unwrap();
            assert!(b.recv().await.unwrap().credentials.unwrap().pidfd.is_some());
        }
    });
}

#[test]
fn the_senders_on_accepted_connections_are_known_from_the_first_byte() {
    run(async {
        for kind in KINDS {
            let addr = abstract_name("accepted");
            let listener = Listener::bind_addr(&addr, kind).unwrap();
            // This client connects and sends before the listener switches credentials on.
            let early = Framed::new(
                Socket::connect_addr(&addr, kind).await.unwrap(),
                FrameCodec::default(),
            );
            raw_send(early.socket(), &encoded(b"early", 0), &[]);
            listener.set_pass_credentials(PassCredentials::Ids).unwrap();
            let late = Socket::connect_addr(&addr, kind).await.unwrap();
            raw_send(&late, &encoded(b"late", 0), &[]);
            for text in ["early", "late"] {
                let mut rx = Framed::new(listener.accept().await.unwrap(), FrameCodec::default());
                assert_eq!(next(&mut rx).await, (text.to_owned(), own_pid()));
            }
            // Credentials can be switched off again, even for clients that wait to be accepted.
            let _waiting = Socket::connect_addr(&addr, kind).await.unwrap();
            listener.set_pass_credentials(PassCredentials::No).unwrap();
            assert!(!getsockopt(&listener.accept().await.unwrap(), sockopt::PassCred).unwrap());
        }
    });
}

/// Another holder of the socket switches credentials on, and two processes write one message.
#[test]
fn a_receiver_without_credentials_ignores_those_that_another_holder_switches_on() {
    const TEST: &str =
        "a_receiver_without_credentials_ignores_those_that_another_holder_switches_on";
    if write_if_inner(TEST) {
        return;
    }
    run(async {
        for kind in KINDS {
            let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::No);
            setsockopt(rx.socket(), sockopt::PassCred, &true).unwrap();
            let frame = encoded(b"of two processes", 0);
            raw_send(&peer, &frame[..9], &[]);
            write_elsewhere(TEST, None, &peer, &[&frame[9..]]);
            assert_eq!(next(&mut rx).await, ("of two processes".to_owned(), None));
        }
    });
}

#[test]
fn the_senders_of_messages_are_known_after_a_change_of_the_codec() {
    run(async {
        for kind in KINDS {
            let (mut rx, peer) = receiver(kind, FrameCodec::default(), PassCredentials::Ids);
            let (one, two) = (encoded(b"one", 0), encoded(b"two", 0));
            raw_send(&peer, &[&one[..], &two, &one[..4]].concat(), &[]);
            assert_eq!(next(&mut rx).await, ("one".to_owned(), own_pid()));
            let mut rx = rx.map_codecs(|decoder, encoder| (decoder, encoder));
            assert_eq!(pid_of(rx.credentials()), own_pid());
            assert_eq!(next(&mut rx).await, ("two".to_owned(), own_pid()));
            let mut rx = rx.map_codecs(|decoder, encoder| (decoder, encoder));
            raw_send(&peer, &one[4..], &[]);
            assert_eq!(next(&mut rx).await, ("one".to_owned(), own_pid()));
        }
    });
}

#[test]
fn a_message_that_a_codec_yields_at_the_end_has_its_sender() {
    /// A codec whose only message is all bytes up to the end.
    #[derive(Clone)]
    struct Whole;
    impl Codec for Whole {}
    impl fdwire::codec::Decoder for Whole {
        type Item = usize;
        type Error = Error;
        fn decode(
            &mut self,
            _: &mut BytesMut,
            _: &mut fdwire::codec::FdQueue,
        ) -> Result<Option<usize>, Error> {
            Ok(None)
        }
        fn decode_eof(
            &mut self,
            src: &mut BytesMut,
            _: &mut fdwire::codec::FdQueue,
        ) -> Result<Option<usize>, Error> {
            let bytes = std::mem::take(src).len();
            Ok((bytes > 0).then_some(bytes))
        }
    }

    // The peer sends and closes, so the codec yields its message at the end.
    run(async {
        let (mut rx, peer) = receiver(SocketKind::Stream, Whole, PassCredentials::Ids);
        raw_send(&peer, b"all of it", &[]);
        drop(peer);
        assert_eq!(rx.try_next().await.unwrap(), Some(9));
        assert_eq!(pid_of(rx.credentials()), own_pid());
    });
}

#[test]
fn credentials_are_switched_on_for_a_clone_and_its_original_together() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        a.set_pass_credentials(PassCredentials::Ids).unwrap();
        let mut rx = Framed::new(a.try_clone().unwrap(), FrameCodec::default());
        let mut tx = Framed::new(peer, FrameCodec::default());
        tx.send(Frame::new("hello")).await.unwrap();
        assert_eq!(next(&mut rx).await, ("hello".to_owned(), own_pid()));

        // A clone may switch them on for its original.
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        a.try_clone().unwrap().set_pass_credentials(PassCredentials::Ids).unwrap();
        let mut rx = Framed::new(a, FrameCodec::default());
        raw_send(&peer, &encoded(b"hello", 0), &[]);
        assert_eq!(next(&mut rx).await, ("hello".to_owned(), own_pid()));

        // On a socket that was converted, they are off.
        let (a, _peer) = Socket::pair(SocketKind::Stream).unwrap();
        a.set_pass_credentials(PassCredentials::Ids).unwrap();
        let a = Socket::try_from(OwnedFd::from(a)).unwrap();
        assert!(!getsockopt(&a, sockopt::PassCred).unwrap());
    });
}
