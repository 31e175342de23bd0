//! Random connections over real sockets. Everything that is sent arrives. An asynchronous and a
//! blocking receiver yield the same, whatever the peer does.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Limits, Socket, SocketKind};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestRunner},
};

use crate::{
    common::{encoded, marked, marks, raw_send},
    counted,
    side::{End, SIDES, Side},
};

fn pattern(len: usize, seed: usize) -> Bytes {
    (0..len).map(|i| (i * 7 + seed) as u8).collect()
}

/// Frames as sizes, numbers of descriptors, and whether a flush follows.
fn frames() -> impl Strategy<Value = Vec<(usize, u32, bool)>> {
    let payload = prop_oneof![6 => 0..40usize, 3 => 0..5000usize, 1 => 0..300_000usize];
    let fds = prop_oneof![10 => 0..3u32, 1 => 250..300u32];
    prop::collection::vec((payload, fds, any::<bool>()), 1..20)
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases) })
}

#[test]
fn every_frame_arrives_once_with_its_own_descriptors() {
    counted(async |kind| {
        for (sender, receiver) in [
            (Side::Async, Side::Blocking),
            (Side::Blocking, Side::Async),
            (Side::Blocking, Side::Blocking),
        ] {
            // `proptest` has no asynchronous tests, so each case has its own runtime.
            tokio::task::spawn_blocking(move || {
                let check = |(frames, send_buffer)| {
                    crate::common::run(exchange(kind, sender, receiver, frames, send_buffer));
                    Ok(())
                };
                runner(25)
                    .run(
                        &(frames(), prop_oneof![Just(None), (1..100_000usize).prop_map(Some)]),
                        check,
                    )
                    .unwrap();
            })
            .await
            .unwrap();
        }
    });
}

/// Sends these frames, and checks that they arrive.
async fn exchange(
    kind: SocketKind,
    sender: Side,
    receiver: Side,
    frames: Vec<(usize, u32, bool)>,
    send_buffer: Option<usize>,
) {
    let (a, b) = Socket::pair(kind).unwrap();
    if let Some(bytes) = send_buffer {
        a.set_send_buffer_size(bytes).unwrap();
    }
    let codec = FrameCodec::new(Limits::default().max_fds_per_frame(300));
    let (mut tx, mut rx) = (End::new(sender, a, codec), End::new(receiver, b, codec));

    // One end sends, and flushes after some frames.
    let expected = frames.clone();
    let send = async {
        for (n, (payload, fds, flush)) in frames.into_iter().enumerate() {
            let frame = Frame::new(pattern(payload, n))
                .with_fds((0..fds).map(|fd| marked(n as u32 * 1000 + fd)));
            tx.feed(frame).await.unwrap();
            if flush {
                tx.flush().await.unwrap();
            }
        }
        tx.close().await.unwrap();
    };

    // The other end receives each frame with its own descriptors.
    let receive = async {
        for (n, (payload, fds, _)) in expected.into_iter().enumerate() {
            let frame = rx.frame().await;
            assert!(frame.payload == pattern(payload, n), "payload of frame {n}");
            assert!(
                marks(&frame).into_iter().eq((0..fds).map(|fd| n as u32 * 1000 + fd)),
                "descriptors of frame {n}"
            );
        }
        assert!(rx.next().await.is_none());
    };
    tokio::join!(send, receive);
}

/// Encoded frames with a wrong byte or a missing end, which are cut into sends with any number of
/// descriptors.
#[derive(Debug, Clone)]
struct Wrong {
    /// The length of each payload, and the number of descriptors in its header.
    frames: Vec<(usize, u16)>,
    /// A byte that is replaced.
    wrong_byte: Option<(Index, u8)>,
    /// The number of bytes that are sent, if not all are.
    kept: Option<Index>,
    /// The most bytes of each send, and the number of its descriptors.
    sends: Vec<(usize, u32)>,
}

fn wrong() -> impl Strategy<Value = Wrong> {
    let frames = prop::collection::vec((0..120usize, 0..5u16), 1..8);
    // Large enough that they do not fill the socket before the peer receives.
    let sends = prop::collection::vec((8..60usize, 0..5u32), 1..20);
    (frames, any::<Option<(Index, u8)>>(), any::<Option<Index>>(), sends)
        .prop_map(|(frames, wrong_byte, kept, sends)| Wrong { frames, wrong_byte, kept, sends })
}

impl Wrong {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (n, (payload, fds)) in self.frames.iter().enumerate() {
            bytes.extend(encoded(&pattern(*payload, n), *fds));
        }
        if let Some((index, byte)) = self.wrong_byte {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if let Some(kept) = self.kept {
            bytes.truncate(kept.index(bytes.len()));
        }
        bytes
    }

    /// Returns everything that a receiver yields, up to the end.
    async fn yielded(&self, kind: SocketKind, side: Side) -> Vec<String> {
        let (a, peer) = Socket::pair(kind).unwrap();
        let peer = OwnedFd::from(peer);
        let codec = FrameCodec::new(
            Limits::default().max_payload_bytes(100).max_fds_per_frame(3).max_queued_fds(20),
        );
        let mut rx = End::new(side, a, codec);

        // Send everything.
        let bytes = self.bytes();
        let (mut rest, mut number) = (&bytes[..], 0);
        for (most, fds) in self.sends.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(*most));
            let fds = Vec::from_iter((number..number + fds).map(marked));
            number += fds.len() as u32;
            raw_send(&peer, now, &fds);
            rest = later;
        }
        drop(peer);

        // Receive up to the end.
        let mut yielded = Vec::new();
        while let Some(item) = rx.next().await {
            yielded.push(match item {
                Ok(frame) => format!("{:?} {:?}", frame.payload, marks(&frame)),
                Err(error) => format!("{error:?}"),
            });
        }
        assert!(rx.next().await.is_none());
        yielded
    }
}

#[test]
fn an_asynchronous_and_a_blocking_receiver_yield_the_same_whatever_a_peer_sends() {
    counted(async |kind| {
        tokio::task::spawn_blocking(move || {
            let check = |wrong: Wrong| {
                let [first, second] =
                    SIDES.map(|side| crate::common::run(wrong.yielded(kind, side)));
                prop_assert_eq!(first, second);
                Ok(())
            };
            runner(150).run(&wrong(), check).unwrap();
        })
        .await
        .unwrap();
    });
}
