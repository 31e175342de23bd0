//! The properties of the blocking side alone: its calls wait in the calling thread, for a time that
//! can be limited.

use std::{
    net::Shutdown,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use fdwire::{
    Error, Frame, FrameCodec, Framed, Limits, Socket, SocketKind,
    blocking::{self, Listener},
    framed::FramedParts,
    socket::PassCredentials,
};
use futures::{SinkExt, TryStreamExt};
use nix::sys::{
    pthread::{pthread_kill, pthread_self},
    resource::{Resource, setrlimit},
    signal::Signal,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    common::{
        encoded, large, mark_of, marked, marks, open_fds, other_uid, raw_send, role_socket,
        spawn_role,
    },
    counted,
    side::SHORT,
};

/// Runs a test on both kinds of socket, in a thread that has no runtime.
fn without_runtime(test: impl Fn(SocketKind) + Send + Sync + 'static) {
    let test = Arc::new(test);
    counted(async |kind| {
        let test = Arc::clone(&test);
        let (done, ended) = tokio::sync::oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            let _done = done; // dropped when the test has returned or panicked
            test(kind);
        });
        let _ = ended.await;
        thread.join().unwrap();
    });
}

fn framed_pair(kind: SocketKind) -> (blocking::Framed<FrameCodec>, blocking::Framed<FrameCodec>) {
    let (a, b) = blocking::Socket::pair(kind).unwrap();
    (blocking::Framed::new(a, large()), blocking::Framed::new(b, large()))
}

fn with_raw_peer(kind: SocketKind) -> (blocking::Framed<FrameCodec>, OwnedFd) {
    let (a, b) = blocking::Socket::pair(kind).unwrap();
    (blocking::Framed::new(a, large()), b.into())
}

/// Returns the next frame, which must arrive.
#[track_caller]
fn next(rx: &mut blocking::Framed<FrameCodec>) -> Frame {
    rx.next().unwrap().unwrap()
}

#[test]
fn everything_can_move_between_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<blocking::Socket>();
    check::<Listener>();
    check::<blocking::Framed<FrameCodec>>();
    check::<blocking::ReadHalf<FrameCodec>>();
    check::<blocking::WriteHalf<FrameCodec>>();
}

#[test]
fn listening_connecting_sending_and_receiving_need_no_runtime() {
    without_runtime(|kind| {
        // The server sends each frame back.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path, kind).unwrap();
        let server = thread::spawn(move || {
            let mut client =
                blocking::Framed::new(listener.accept().unwrap(), FrameCodec::default());
            while let Some(frame) = client.next().transpose().unwrap() {
                client.send(frame).unwrap();
            }
        });

        // The client sends and receives in two threads.
        let socket = blocking::Socket::connect(&path, kind).unwrap();
        assert_eq!(socket.peer_cred().unwrap().pid, Some(std::process::id() as i32));
        let (mut rx, mut tx) = blocking::Framed::new(socket, large()).into_split();
        let receiver = thread::spawn(move || {
            for n in 0..200 {
                let frame = rx.next().unwrap().unwrap();
                assert_eq!((frame.payload.len(), marks(&frame)), (10_000, vec![n]));
            }
            assert!(rx.next().is_none());
        });
        for n in 0..200 {
            tx.feed(Frame::new(vec![7; 10_000]).with_fd(marked(n))).unwrap();
        }
        tx.close().unwrap();
        receiver.join().unwrap();
        server.join().unwrap();
    });
}

#[test]
fn a_read_that_times_out_loses_nothing() {
    without_runtime(|kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        for timeout in [Duration::ZERO, Duration::from_millis(2)] {
            rx.set_read_timeout(Some(timeout));
            for (index, byte) in encoded(b"payload", 2).iter().enumerate() {
                assert!(matches!(rx.next(), Some(Err(Error::TimedOut))));
                let fds =
                    if index == 0 || index == 5 { vec![marked(index as u32)] } else { vec![] };
                raw_send(&peer, &[*byte], &fds);
            }
            let frame = next(&mut rx);
            assert_eq!((&frame.payload[..], marks(&frame)), (&b"payload"[..], vec![0, 5]));
        }
        // A limit that is longer than the clock reaches is no limit.
        for timeout in [None, Some(Duration::MAX)] {
            rx.set_read_timeout(timeout);
            raw_send(&peer, &encoded(b"", 0), &[]);
            next(&mut rx);
        }
        drop(peer);
        assert!(rx.next().is_none());
    });
}

#[test]
fn packets_of_one_byte_do_not_prolong_a_call_beyond_its_time_limit() {
    without_runtime(|kind| {
        if kind == SocketKind::Stream {
            return; // one receive takes all bytes that are there
        }
        let (a, peer) = blocking::Socket::pair(kind).unwrap();
        peer.set_send_buffer_size(1 << 20).unwrap();
        if peer.send_buffer_size().unwrap() < 1 << 20 {
            return eprintln!("skipped: net.core.wmem_max is too small for so many packets");
        }
        let mut rx = blocking::Framed::new(a, large());
        rx.set_read_timeout(Some(Duration::ZERO));
        encoded(&[7; 392], 0).iter().for_each(|byte| raw_send(&peer, &[*byte], &[]));
        assert!(matches!(rx.next(), Some(Err(Error::TimedOut))), "400 packets were there");
        assert_eq!(next(&mut rx).payload.len(), 392);
    });
}

#[test]
fn a_write_that_times_out_loses_nothing() {
    without_runtime(|kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        tx.set_write_timeout(Some(Duration::from_millis(2)));

        // The peer reads nothing, so the socket and then the queue are full.
        let mut taken = 0;
        let refused = loop {
            match tx.send(Frame::new(vec![7; 50_000]).with_fd(marked(taken))) {
                Ok(()) => taken += 1,
                Err(error) => {
                    assert!(matches!(error.error, Error::TimedOut), "{error}");
                    match error.item {
                        None => taken += 1, // the queue has it
                        Some(item) => break item,
                    }
                }
            }
        };
        assert_eq!(marks(&refused), [taken]);
        let bytes = tx.unsent().bytes;
        assert!((256 << 10..(256 << 10) + 50_008).contains(&bytes), "{bytes} bytes wait");

        // Each call times out as long as the queue is full.
        for _ in 0..2 {
            assert!(matches!(tx.flush(), Err(Error::TimedOut)));
            assert!(matches!(tx.close(), Err(Error::TimedOut)));
            let refused = tx.feed(Frame::new("").with_fd(marked(1))).unwrap_err();
            assert!(matches!(refused.error, Error::TimedOut) && refused.item.is_some());
        }

        // When the peer reads, everything arrives.
        tx.set_write_timeout(None);
        let receiver = thread::spawn(move || {
            for n in 0..=taken {
                assert_eq!(marks(&next(&mut rx)), [n]);
            }
            assert!(rx.next().is_none());
        });
        tx.feed(refused).unwrap();
        tx.close().unwrap();
        assert_eq!((tx.unsent().bytes, tx.unsent().fds), (0, 0));
        receiver.join().unwrap();
    });
}

/// The time limit of a call is shorter than the time for the rest of the frame. That time runs on
/// between the calls.
#[test]
fn the_time_for_an_unfinished_frame_runs_on_over_calls_that_time_out() {
    without_runtime(|kind| {
        let (a, peer) = blocking::Socket::pair(kind).unwrap();
        let peer = OwnedFd::from(peer);
        let codec =
            FrameCodec::new(Limits::default().max_unfinished_time(Duration::from_millis(100)));
        let mut rx = blocking::Framed::new(a, codec);
        rx.set_read_timeout(Some(Duration::from_millis(5)));
        raw_send(&peer, &encoded(b"cut", 0)[..9], &[]);
        let error = loop {
            match rx.next().unwrap().unwrap_err() {
                Error::TimedOut => {}
                error => break error,
            }
        };
        assert!(matches!(error, Error::Unfinished { bytes: 9, fds: 0 }), "{error}");
        assert!(rx.next().is_none());
    });
}

#[test]
fn signals_do_not_end_a_wait() {
    counted(async |kind| {
        let mut signals = signal(SignalKind::user_defined1()).unwrap();
        let (a, b) = Socket::pair(kind).unwrap();
        let mut async_end = Framed::new(a, large());

        // One thread waits, first to receive and then for room to send.
        let (started, has_started) = tokio::sync::oneshot::channel();
        let blocked = thread::spawn(move || {
            started.send(pthread_self()).unwrap();
            let mut end = blocking::Framed::new(blocking::Socket::from(b), large());
            end.set_read_timeout(Some(Duration::from_secs(60)));
            assert_eq!(marks(&next(&mut end)), [1]);
            end.send(Frame::new(vec![7; 4 << 20]).with_fd(marked(2))).unwrap();
        });
        let thread = has_started.await.unwrap();

        // Another thread sends it signals all the time.
        let stop = Arc::new(AtomicBool::new(false));
        let interrupt = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    pthread_kill(thread, Signal::SIGUSR1).unwrap();
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });

        // Signals arrive while it waits to receive, and again while it waits for room.
        for _ in 0..10 {
            signals.recv().await.unwrap();
        }
        async_end.send(Frame::new("").with_fd(marked(1))).await.unwrap();
        for _ in 0..10 {
            signals.recv().await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        interrupt.join().unwrap();
        assert_eq!(marks(&async_end.try_next().await.unwrap().unwrap()), [2]);
        blocked.join().unwrap();
    });
}

#[test]
fn a_thread_that_waits_is_woken_by_a_shutdown() {
    without_runtime(|kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let kept = a.try_clone().unwrap();
        let (mut rx, mut tx) = blocking::Framed::new(a, large()).into_split();
        let reader = thread::spawn(move || assert!(rx.next().is_none()));
        let writer = thread::spawn(move || {
            let error = loop {
                if let Err(error) = tx.send(Frame::new(vec![7; 100_000])) {
                    break error.error;
                }
            };
            assert!(error.is_peer_gone(), "{error}");
        });
        thread::sleep(SHORT); // most likely both wait by now
        kept.shutdown(Shutdown::Both).unwrap();
        reader.join().unwrap();
        writer.join().unwrap();
        drop(b);
    });
}

#[test]
fn out_of_band_data_does_not_hide_the_messages_behind_it() {
    without_runtime(|kind| {
        if kind == SocketKind::SeqPacket {
            return; // there is no out-of-band data on this kind
        }
        let (mut rx, peer) = with_raw_peer(kind);
        rx.set_read_timeout(Some(SHORT));
        for n in 0..3 {
            nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&peer),
                b"!",
                nix::sys::socket::MsgFlags::MSG_OOB,
            )
            .unwrap();
            assert!(matches!(rx.next(), Some(Err(Error::TimedOut))));
            raw_send(&peer, &encoded(b"", 1), &[marked(n)]);
            assert_eq!(marks(&next(&mut rx)), [n]);
        }
    });
}

#[test]
fn a_connection_continues_from_its_parts() {
    without_runtime(|kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        tx.feed(Frame::new("one").with_fd(marked(1))).unwrap();
        tx.feed(Frame::new("two").with_fd(marked(2))).unwrap();
        let parts: FramedParts<FrameCodec, FrameCodec, blocking::Socket> = tx.into_parts();
        assert_eq!((parts.unsent.len(), parts.unsent.fd_count()), (22, 2));
        let mut tx = blocking::Framed::from_parts(parts);
        tx.send(Frame::new("three").with_fd(marked(3))).unwrap();

        assert_eq!(marks(&next(&mut rx)), [1]);
        // The second and the third frame were received together with the first.
        let mut rx = rx.map_codecs(|_, _| (large(), large()));
        assert_eq!(marks(&next(&mut rx)), [2]);
        assert_eq!(marks(&next(&mut rx)), [3]);

        drop(blocking::Framed::from_parts(rx.into_parts()).into_split().1); // ends the direction
        assert!(tx.next().is_none());
    });
}

#[test]
fn a_message_whose_encoder_panics_leaves_nothing_behind() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    without_runtime(|kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let panics = fdwire::codec::Codec::map(large(), Ok::<Frame, Error>, |frame: Frame| {
            assert_ne!(frame.payload, "panic", "on purpose");
            Ok(frame)
        });
        let mut tx = blocking::Framed::with_codecs(a, large(), panics);
        let mut rx = blocking::Framed::new(b, large());
        let panicked =
            catch_unwind(AssertUnwindSafe(|| tx.send(Frame::new("panic").with_fd(marked(1)))));
        assert!(panicked.is_err());
        tx.send(Frame::new("after").with_fd(marked(2))).unwrap();
        assert_eq!(marks(&next(&mut rx)), [2]);
    });
}

#[test]
fn the_sender_of_a_message_is_known_if_the_socket_or_its_listener_asks() {
    without_runtime(|kind| {
        let own_pid = Some(std::process::id() as i32);
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        b.set_pass_credentials(PassCredentials::Ids).unwrap();
        let (mut tx, mut rx) =
            (blocking::Framed::new(a, large()), blocking::Framed::new(b, large()));
        tx.send(Frame::new("")).unwrap();
        assert!(rx.credentials().is_none());
        next(&mut rx);
        assert_eq!(rx.credentials().unwrap().pid, own_pid);

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path, kind).unwrap();
        listener.set_pass_credentials(PassCredentials::Ids).unwrap();
        let mut client =
            blocking::Framed::new(blocking::Socket::connect(&path, kind).unwrap(), large());
        client.send(Frame::new("before it is accepted")).unwrap();
        let mut rx = blocking::Framed::new(listener.accept().unwrap(), large());
        next(&mut rx);
        assert_eq!(rx.credentials().unwrap().pid, own_pid);
    });
}

/// Runs in a process of its own, as a program without a runtime.
#[test]
fn a_receiver_at_its_descriptor_limit_returns_an_error_and_leaks_nothing() {
    const ROLE: &str =
        "blocking::a_receiver_at_its_descriptor_limit_returns_an_error_and_leaks_nothing";
    if let Some(socket) = role_socket(ROLE) {
        let mut rx = blocking::Framed::new(
            blocking::Socket::try_from(socket).unwrap(),
            FrameCodec::default(),
        );
        rx.send(Frame::new("ready")).unwrap();
        let limit = open_fds() as u64 + 10;
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
        let before = open_fds();
        // Frames that were complete before the loss are received.
        assert_eq!(next(&mut rx).fds.len(), 2);
        assert_eq!(next(&mut rx).payload, "none");
        assert!(matches!(rx.next(), Some(Err(Error::TruncatedControl))));
        assert!(rx.next().is_none());
        // The descriptors are closed on another thread.
        while std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) != before {
            thread::yield_now();
        }
        return;
    }
    without_runtime(|kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let mut tx = blocking::Framed::new(a, FrameCodec::default());
        let mut child = spawn_role(ROLE, None, b.into());
        assert_eq!(next(&mut tx).payload, "ready");
        tx.feed(Frame::new("few").with_fds((0..2).map(marked))).unwrap();
        tx.feed(Frame::new("none")).unwrap();
        tx.feed(Frame::new("many").with_fds((0..50).map(marked))).unwrap();
        tx.send(Frame::new("none, and too late")).unwrap();
        assert!(child.wait().unwrap().success());
    });
}

#[test]
fn too_many_descriptors_in_flight_are_waited_for() {
    const ROLE: &str = "blocking::too_many_descriptors_in_flight_are_waited_for";
    if let Some(socket) = role_socket(ROLE) {
        // The limit of descriptors in flight counts all processes of the uid. The kernel checks it
        // before it adds more.
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        let mut tx = blocking::Framed::new(
            blocking::Socket::try_from(socket).unwrap(),
            FrameCodec::default(),
        );
        let null = std::fs::File::open("/dev/null").unwrap();
        let frame =
            |n: u8| Frame::new(vec![n]).with_fds((0..40).map(|_| null.try_clone().unwrap().into()));

        // The third frame has to wait.
        tx.set_write_timeout(Some(2 * SHORT));
        tx.send(frame(0)).unwrap();
        tx.send(frame(1)).unwrap();
        let stuck = tx
            .send(frame(2))
            .expect_err("80 descriptors of this uid are in flight, the limit is 64");
        assert!(matches!(stuck.error, Error::TimedOut), "{stuck}");
        assert_eq!((tx.unsent().bytes, tx.unsent().fds), (9, 40));

        // The parent reads this name, and receives only then.
        std::fs::write("/proc/self/comm", "stuck").unwrap();
        tx.set_write_timeout(None);
        tx.close().unwrap();
        return assert!(tx.next().is_none());
    }
    let Some(uid) = other_uid() else { return };
    without_runtime(move |kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let mut rx = blocking::Framed::new(a, FrameCodec::default());
        let mut child = spawn_role(ROLE, Some(uid), b.into());
        while std::fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap().trim()
            != "stuck"
        {
            thread::sleep(Duration::from_millis(5));
        }
        for n in 0..3 {
            let frame = next(&mut rx);
            assert_eq!((frame.payload[0], frame.fds.len()), (n, 40));
        }
        assert!(rx.next().is_none());
        drop(rx);
        assert!(child.wait().unwrap().success());
    });
}

#[test]
fn a_program_that_may_open_no_descriptor_still_sends_and_receives() {
    const ROLE: &str = "blocking::a_program_that_may_open_no_descriptor_still_sends_and_receives";
    if let Some(socket) = role_socket(ROLE) {
        let mut end = blocking::Framed::new(blocking::Socket::try_from(socket).unwrap(), large());
        let passed = marked(7);
        setrlimit(Resource::RLIMIT_NOFILE, 1, 1).unwrap();
        assert!(std::fs::File::open("/dev/null").is_err());
        assert_eq!(next(&mut end).payload.len(), 4 << 20);
        end.send(Frame::new(vec![0; 4 << 20]).with_fd(passed)).unwrap();
        return;
    }
    without_runtime(|kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let mut end = blocking::Framed::new(a, large());
        let mut child = spawn_role(ROLE, None, b.into());
        end.send(Frame::new(vec![0; 4 << 20])).unwrap();
        let [fd] = next(&mut end).fds.into_array().unwrap();
        assert_eq!(mark_of(&fd), 7);
        assert!(child.wait().unwrap().success());
    });
}

#[test]
fn a_socket_can_change_sides() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let a = tokio::task::spawn_blocking(move || {
            let mut end = blocking::Framed::new(blocking::Socket::from(a), FrameCodec::default());
            end.send(Frame::new("blocking").with_fd(marked(1))).unwrap();
            end.into_parts().socket
        });
        let mut b = Framed::new(b, FrameCodec::default());
        assert_eq!(marks(&b.try_next().await.unwrap().unwrap()), [1]);
        let mut a = Framed::new(Socket::try_from(a.await.unwrap()).unwrap(), FrameCodec::default());
        a.send(Frame::new("asynchronous").with_fd(marked(2))).await.unwrap();
        assert_eq!(marks(&b.try_next().await.unwrap().unwrap()), [2]);
    });
}
