//! All frames arrive whole and in order, whatever their sizes and their numbers of descriptors.

use bytes::Bytes;
use fdwire::{Error, Frame, FrameCodec, Framed, Socket, framed::FramedParts};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt, stream};

use crate::{
    common::{
        encoded, framed_pair, large, mark_of, marked, marks, raw_send, sock_type, with_raw_peer,
    },
    counted,
};

fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn payloads_of_every_size_arrive_whole() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        for len in
            [0, 1, (64 << 10) - 9, (64 << 10) - 8, (64 << 10) - 1, 64 << 10, 1 << 20, 16 << 20]
        {
            let sent = async {
                tx.send(Frame::new(pattern(len)).with_fd(marked(len as u32))).await.unwrap()
            };
            let ((), received) = tokio::join!(sent, rx.try_next());
            let frame = received.unwrap().unwrap();
            assert!(frame.payload == pattern(len), "payload of {len} bytes on {kind:?}");
            assert_eq!(marks(&frame), [len as u32]);
        }
    });
}

#[test]
fn connections_that_share_read_buffers_keep_their_messages_apart() {
    counted(async |kind| {
        let mut connections: Vec<_> = (0..20).map(|_| with_raw_peer(kind)).collect();
        let mut kept = Vec::new();
        for round in 0..50 {
            let message = |n: usize| format!("{n} {round} ").repeat(1 + 37 * (round % 10));
            for (n, (rx, peer)) in connections.iter_mut().enumerate() {
                let bytes = encoded(message(n).as_bytes(), 0);
                raw_send(peer, &bytes[..bytes.len() / 2], &[]);
                // The runtime learns that there is something to receive.
                tokio::task::yield_now().await;
                assert!(rx.next().now_or_never().is_none());
            }
            for (n, (rx, peer)) in connections.iter_mut().enumerate() {
                let bytes = encoded(message(n).as_bytes(), 0);
                raw_send(peer, &bytes[bytes.len() / 2..], &[]);
                kept.push((message(n), rx.try_next().await.unwrap().unwrap()));
                assert!(rx.next().now_or_never().is_none());
            }
        }
        for (message, frame) in kept {
            assert_eq!(frame.payload, message);
        }
    });
}

#[test]
fn any_number_of_descriptors_arrives_in_order() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        for count in [0, 1, 2, 252, 253, 254, 506, 1000, 2024] {
            let frame = Frame::new("").with_fds((0..count).map(marked));
            let ((), received) =
                tokio::join!(async { tx.send(frame).await.unwrap() }, rx.try_next());
            assert!(
                marks(&received.unwrap().unwrap()).into_iter().eq(0..count),
                "{count} descriptors"
            );
        }
    });
}

#[test]
fn more_descriptors_than_bytes_to_carry_them_are_refused_and_come_back() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let error = tx.send(Frame::new("").with_fds((0..2025).map(marked))).await.unwrap_err();
        assert!(matches!(error.error, Error::TooManyFdsForLength { fds: 2025, bytes: 8 }));
        assert_eq!(error.item.unwrap().fds.len(), 2025);

        tx.send(Frame::new("next")).await.unwrap();
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "next");
    });
}

/// Frames of many sizes, some with descriptors that carry their frame's number.
fn mixed_frames(count: u32) -> impl Iterator<Item = Frame> {
    (0..count).map(|n| {
        let len = [0, 3, 100, 5000, 70_000, 300_000][n as usize % 6];
        Frame::new(pattern(len)).with_fds((0..n % 5).map(|_| marked(n)))
    })
}

async fn check_mixed_frames(rx: &mut Framed<FrameCodec>, count: u32) {
    for n in 0..count {
        let frame = rx.try_next().await.unwrap().unwrap();
        assert!(
            frame.payload == pattern([0, 3, 100, 5000, 70_000, 300_000][n as usize % 6]),
            "frame {n}"
        );
        assert_eq!(marks(&frame), vec![n; n as usize % 5]);
    }
}

#[test]
fn short_writes_and_any_send_buffer_keep_descriptors_with_their_frames() {
    counted(async |kind| {
        // The smallest buffer that the kernel allows makes nearly every write short. The largest
        // makes packets of many sizes.
        for size in [1, 9000, 100_000, 4 << 20] {
            let (a, b) = Socket::pair(kind).unwrap();
            a.set_send_buffer_size(size).unwrap();
            let (mut tx, mut rx) = (Framed::new(a, large()), Framed::new(b, large()));
            let send = async {
                tx.send_all(&mut stream::iter(mixed_frames(120).map(Ok))).await.unwrap();
                tx.close().await.unwrap();
            };
            let receive = async {
                check_mixed_frames(&mut rx, 120).await;
                assert!(rx.next().await.is_none());
            };
            tokio::join!(send, receive);
        }
    });
}

#[test]
fn a_send_buffer_that_is_made_smaller_later_is_noticed() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        tx.socket().set_send_buffer_size(1).unwrap();
        let frame = Frame::new(pattern(1 << 20)).with_fd(marked(1));
        let ((), received) = tokio::join!(async { tx.send(frame).await.unwrap() }, rx.try_next());
        assert!(received.unwrap().unwrap().payload == pattern(1 << 20));
    });
}

#[test]
fn both_directions_at_once_do_not_wait_for_each_other() {
    counted(async |kind| {
        let (a, b) = framed_pair(kind);
        let ((mut a_rx, mut a_tx), (mut b_rx, mut b_tx)) = (a.into_split(), b.into_split());
        let send = async |tx: &mut fdwire::framed::WriteHalf<FrameCodec>| {
            tx.send_all(&mut stream::iter(mixed_frames(60).map(Ok))).await.unwrap();
        };
        let receive = async |rx: &mut fdwire::framed::ReadHalf<FrameCodec>| {
            for n in 0..60 {
                assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), vec![n; n as usize % 5]);
            }
        };
        tokio::join!(send(&mut a_tx), receive(&mut b_rx), send(&mut b_tx), receive(&mut a_rx));
    });
}

#[test]
fn a_read_that_ends_behind_descriptors_does_not_hide_the_frames_that_follow() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        // On a stream, a read ends behind each send with descriptors, and no event announces the
        // rest.
        for n in 0..20 {
            raw_send(&peer, &encoded(b"plain", 0), &[]);
            raw_send(&peer, &encoded(b"marked", 2), &[marked(n), marked(n + 100)]);
        }
        for n in 0..20 {
            assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "plain");
            let frame = rx.try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], marks(&frame)), (&b"marked"[..], vec![n, n + 100]));
        }
    });
}

#[test]
fn frames_in_any_pieces_are_put_together() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let bytes = [encoded(b"one", 1), encoded(b"", 0), encoded(b"three", 2)].concat();
        // Descriptors come with the byte they are attached to, which may be long before their
        // frame.
        for (index, byte) in bytes.iter().enumerate() {
            let fds =
                if index % 4 == 0 && index < 12 { vec![marked(index as u32)] } else { vec![] };
            raw_send(&peer, &[*byte], &fds);
        }
        let frames = [rx.try_next().await, rx.try_next().await, rx.try_next().await]
            .map(|frame| frame.unwrap().unwrap());
        assert_eq!(frames.each_ref().map(|frame| frame.payload.clone()), ["one", "", "three"]);
        assert_eq!(frames.each_ref().map(marks), [vec![0], vec![], vec![4, 8]]);
    });
}

#[test]
fn a_descriptor_that_is_sent_twice_arrives_as_two() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let fd = marked(7);
        tx.send(Frame::new("").with_fd(fd.try_clone().unwrap()).with_fd(fd)).await.unwrap();
        let [first, second] = rx.try_next().await.unwrap().unwrap().fds.into_array().unwrap();
        assert_eq!((mark_of(&first), mark_of(&second)), (7, 7));
    });
}

#[test]
fn a_descriptor_is_closed_once_it_is_sent() {
    counted(async |kind| {
        let (mut tx, rx) = framed_pair(kind);
        let (reader, writer) = std::io::pipe().unwrap();
        tx.feed(Frame::new("").with_fd(writer)).await.unwrap();
        assert_eq!((tx.unsent().bytes, tx.unsent().fds), (8, 1));
        tx.flush().await.unwrap();
        assert_eq!((tx.unsent().bytes, tx.unsent().fds), (0, 0));
        drop(rx); // the kernel closes the descriptors that were not received
        assert_eq!(std::io::read_to_string(reader).unwrap(), "", "a copy of the writer is open");
    });
}

#[test]
fn a_connection_continues_from_its_parts() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        tx.feed(Frame::new("one").with_fd(marked(1))).await.unwrap();
        tx.feed(Frame::new("two").with_fd(marked(2))).await.unwrap();
        let parts: FramedParts<FrameCodec> = tx.into_parts();
        assert_eq!((parts.unsent.len(), parts.unsent.fd_count()), (22, 2));
        let mut tx = Framed::from_parts(parts);
        tx.send(Frame::new("three").with_fd(marked(3))).await.unwrap();

        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [1]);
        let parts = rx.into_parts(); // has the frames that were received with the first
        let mut rx = Framed::from_parts(parts);
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [2]);
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [3]);
    });
}

#[test]
fn halves_work_apart_and_together_again() {
    counted(async |kind| {
        let (a, mut b) = framed_pair(kind);
        let (mut rx, mut tx) = a.into_split();
        let task = tokio::spawn(async move { (rx.try_next().await.unwrap().unwrap(), rx) });
        tx.send(Frame::new("out").with_fd(marked(1))).await.unwrap();
        assert_eq!(marks(&b.try_next().await.unwrap().unwrap()), [1]);
        b.send(Frame::new("in").with_fd(marked(2))).await.unwrap();
        let (frame, rx) = task.await.unwrap();
        assert_eq!(marks(&frame), [2]);

        let (other_rx, other_tx) = framed_pair(kind).0.into_split();
        let error = Framed::reunite(rx, other_tx).unwrap_err();
        let mut a = Framed::reunite(error.read, tx).unwrap();
        drop((other_rx, error.write));
        a.send(Frame::new("again")).await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "again");
    });
}

#[test]
fn options_that_take_the_descriptors_room_are_switched_off() {
    counted(async |kind| {
        use nix::sys::socket::{
            AddressFamily, SockFlag, getsockopt, setsockopt, socketpair, sockopt,
        };
        let (a, b) =
            socketpair(AddressFamily::Unix, sock_type(kind), None, SockFlag::SOCK_CLOEXEC).unwrap();
        setsockopt(&b, sockopt::PassCred, &true).unwrap();
        let mut rx = Framed::new(Socket::try_from(b).unwrap(), large());
        assert!(!getsockopt(rx.socket(), sockopt::PassCred).unwrap());
        raw_send(&a, &encoded(b"", 253), &(0..253).map(marked).collect::<Vec<_>>());
        assert!(marks(&rx.try_next().await.unwrap().unwrap()).into_iter().eq(0..253));
    });
}

#[test]
fn a_blocking_socket_does_not_block_the_runtime() {
    counted(async |kind| {
        use nix::sys::socket::{AddressFamily, SockFlag, socketpair};
        let (a, b) =
            socketpair(AddressFamily::Unix, sock_type(kind), None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (a, b) = (Socket::try_from(a).unwrap(), Socket::try_from(b).unwrap());
        let (mut tx, mut rx) = (Framed::new(a, large()), Framed::new(b, large()));
        let frame = Frame::new(pattern(4 << 20));
        let ((), received) = tokio::join!(async { tx.send(frame).await.unwrap() }, rx.try_next());
        assert_eq!(received.unwrap().unwrap().payload.len(), 4 << 20);
    });
}

#[test]
fn a_fast_peer_does_not_starve_other_tasks() {
    counted(async |kind| {
        use std::sync::{
            Arc,
            atomic::{AtomicBool, AtomicUsize, Ordering},
        };
        let (mut tx, mut rx) = framed_pair(kind);
        for _ in 0..5000 {
            tx.feed(Frame::new("x")).await.unwrap();
        }
        tx.flush().await.unwrap();
        // After the first frame, the others are in the read buffer.
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "x");

        // Another task counts its turns while they are received.
        let (turns, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let other = tokio::spawn({
            let (turns, stop) = (Arc::clone(&turns), Arc::clone(&stop));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    turns.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            }
        });
        for _ in 1..5000 {
            rx.try_next().await.unwrap().unwrap();
        }
        assert!(turns.load(Ordering::Relaxed) > 3, "the other task had no turn");
        stop.store(true, Ordering::Relaxed);
        other.await.unwrap();
    });
}

#[test]
fn bytes_and_descriptors_that_are_put_into_the_parts_are_sent() {
    counted(async |kind| {
        let (tx, mut rx) = framed_pair(kind);
        let mut parts: FramedParts<FrameCodec> = tx.into_parts();
        parts.unsent.put_slice(&encoded(b"by hand", 1));
        parts.unsent.put_fd(marked(1));
        let mut tx = Framed::from_parts(parts);
        tx.send(Frame::new("next")).await.unwrap();
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [1]);
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "next");

        let mut parts: FramedParts<FrameCodec> = tx.into_parts();
        parts.unsent.put_fd(marked(1)); // a stream would drop it silently
        let mut tx = Framed::from_parts(parts);
        assert!(tx.flush().await.is_err());
        assert_eq!(tx.into_parts().unsent.fd_count(), 1);
    });
}

#[test]
fn descriptors_of_other_control_messages_are_owned_too() {
    counted(async |kind| {
        use nix::libc;
        use nix::{setsockopt_impl, sys::socket::SetSockOpt};
        #[derive(Clone)]
        struct PassPidfd;
        const SO_PASSPIDFD: i32 = 76;
        setsockopt_impl!(
            PassPidfd,
            libc::SOL_SOCKET,
            SO_PASSPIDFD,
            bool,
            nix::sys::socket::sockopt::SetBool
        );
        let (mut rx, peer) = with_raw_peer(kind);
        if PassPidfd.set(rx.socket(), &true).is_err() {
            return eprintln!("skipped: this kernel has no SO_PASSPIDFD");
        }
        raw_send(&peer, &encoded(b"", 253), &(0..253).map(marked).collect::<Vec<_>>());
        assert!(marks(&rx.try_next().await.unwrap().unwrap()).into_iter().eq(0..253));
    });
}

#[test]
fn a_send_that_is_polled_outside_of_the_runtime_waits_for_the_socket_too() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let receive = tokio::spawn(async move { rx.try_next().await.unwrap().unwrap() });
        let send = std::thread::spawn(move || {
            // This executor does not know tokio.
            let waker = futures::task::noop_waker();
            let mut context = std::task::Context::from_waker(&waker);
            let mut sending = tx.send(Frame::new(vec![0; 4 << 20]).with_fd(marked(1)));
            while futures::FutureExt::poll_unpin(&mut sending, &mut context).is_pending() {
                std::thread::yield_now();
            }
        });
        assert_eq!(marks(&receive.await.unwrap()), [1]);
        send.join().unwrap();
    });
}
