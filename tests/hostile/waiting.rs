//! Peers that begin a frame and never finish it, and connections that wait for descriptors to be
//! closed.

use std::{os::fd::OwnedFd, time::Duration};

use bytes::BytesMut;
use fdwire::{
    Error, FrameCodec, Framed, Limits, Socket, SocketKind, blocking,
    codec::{Codec, Decoder, FdQueue},
};
use futures::StreamExt;

use crate::{
    common::{encoded, marked, raw_send},
    counted, raw,
    slow::{slow_to_close, without_waiting},
    soon,
};

/// The time for the rest of a frame. A test waits until it is over.
const SHORT: Duration = Duration::from_millis(100);

/// The time for the rest of a frame that arrives in time. It is long enough for a busy machine.
const AMPLE: Duration = Duration::from_secs(1);

fn receiver(kind: SocketKind, time: Duration) -> (Framed<FrameCodec>, OwnedFd) {
    let (a, b) = Socket::pair(kind).unwrap();
    (Framed::new(a, FrameCodec::new(Limits::default().max_unfinished_time(time))), b.into())
}

/// The peer's descriptor is its own end of the connection, so the connection has no end while it
/// waits.
#[test]
fn a_peer_that_leaves_its_own_end_in_an_unfinished_frame_does_not_keep_the_connection() {
    counted(async |kind| {
        for bytes in [&b"\xFD"[..], &encoded(b"whole", 0)] {
            let (mut rx, peer) = receiver(kind, SHORT);
            let own_end = peer.try_clone().unwrap();
            raw_send(&peer, bytes, &[own_end]);
            drop(peer);
            let ended = soon("the end of a connection that holds its own peer", async {
                loop {
                    if let Err(error) = rx.next().await.unwrap() {
                        break error;
                    }
                }
            });
            assert!(matches!(ended.await, Error::Unfinished { fds: 1, .. }));
            assert!(rx.next().await.is_none());
        }
    });
}

#[test]
fn a_peer_that_sends_a_frame_byte_by_byte_gets_no_more_time_for_it() {
    counted(async |kind| {
        let (mut rx, peer) = receiver(kind, SHORT);
        raw_send(&peer, &encoded(&[0; 100_000], 0)[..8], &[]);
        let drip = tokio::spawn(async move {
            // The receiver closes its end with the frame unfinished.
            while nix::unistd::write(&peer, b"x").is_ok() {
                tokio::time::sleep(SHORT / 20).await;
            }
        });
        let ended = soon("the end of a slow frame", rx.next()).await;
        assert!(matches!(ended, Some(Err(Error::Unfinished { bytes: 9.., fds: 0 }))), "{ended:?}");
        drop(rx);
        drip.abort();
        let _ = drip.await;
    });
}

#[test]
fn whole_frames_do_not_extend_the_time_of_a_descriptor_that_no_frame_claims() {
    counted(async |kind| {
        let (mut rx, peer) = receiver(kind, SHORT);
        raw_send(&peer, &encoded(b"", 0), &[marked(1)]);
        let flow = tokio::spawn(async move {
            loop {
                raw_send(&peer, &encoded(b"whole", 0), &[]);
                tokio::time::sleep(SHORT / 20).await;
            }
        });
        let ended = soon("the end of a connection with an unclaimed descriptor", async {
            loop {
                if let Err(error) = rx.next().await.unwrap() {
                    break error;
                }
            }
        });
        assert!(matches!(ended.await, Error::Unfinished { bytes: 0, fds: 1 }));
        flow.abort();
        let _ = flow.await;
    });
}

#[test]
fn a_connection_may_wait_between_frames_longer_than_the_time_for_the_rest_of_a_frame() {
    counted(async |kind| {
        let (mut rx, peer) = receiver(kind, AMPLE);
        for _ in 0..3 {
            // The frame comes in two parts, both in time, and the next one long after it.
            let frame = encoded(b"whole", 1);
            raw_send(&peer, &frame[..3], &[marked(1)]);
            assert!(futures::FutureExt::now_or_never(rx.next()).is_none());
            raw_send(&peer, &frame[3..], &[]);
            assert_eq!(rx.next().await.unwrap().unwrap().fds.len(), 1);
            assert!(tokio::time::timeout(AMPLE + SHORT, rx.next()).await.is_err());
        }
        raw_send(&peer, &encoded(b"last", 0), &[]);
        assert_eq!(rx.next().await.unwrap().unwrap().payload, "last");
    });
}

/// A codec that takes all bytes that are there as one message, and drops all descriptors.
struct Refuse;

impl Codec for Refuse {}

impl Decoder for Refuse {
    type Item = ();
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> Result<Option<()>, Error> {
        drop(fds.take_all());
        Ok((!src.is_empty()).then(|| src.clear()))
    }
}

#[test]
fn descriptors_that_an_application_refuses_are_closed_as_fast_as_they_come() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let peer = OwnedFd::from(peer);
        let mut rx = Framed::with_codecs(a, Refuse, FrameCodec::default());
        let (slow, client) = slow_to_close();
        without_waiting([client], async {
            raw_send(&peer, b"x", &[slow]);
            let many = Vec::from_iter(
                (0..250).map(|_| OwnedFd::from(std::fs::File::open("/dev/null").unwrap())),
            );
            let before = crate::common::open_fds();
            for _ in 0..100 {
                raw_send(&peer, b"x", &many);
                rx.next().await.unwrap().unwrap();
                // Limits::max_queued_fds, the descriptors of one more receive, and those of the
                // test itself.
                assert!(crate::common::open_fds() < before + 506 + 253 + 10);
            }
        })
        .await;
    });
}

#[test]
fn a_connection_that_waits_for_its_sockets_to_be_closed_goes_on_then() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let peer = OwnedFd::from(peer);
        let mut rx = Framed::with_codecs(a, Refuse, FrameCodec::default());
        for _ in 0..10 {
            // Send all at once, so that they arrive faster than they are closed, and the runtime
            // sleeps meanwhile.
            let batches = [(); 5].map(|()| Vec::from_iter((0..250).map(|_| raw::pair(kind).0)));
            batches.iter().for_each(|sockets| raw_send(&peer, b"x", sockets));
            drop(batches);
            for _ in 0..5 {
                soon("the sockets before these are closed", rx.next()).await.unwrap().unwrap();
            }
        }
    });
}

/// The blocking side waits in its own thread.
#[test]
fn a_thread_that_waits_for_its_sockets_to_be_closed_goes_on_then() {
    counted(async |kind| {
        let (a, peer) = blocking::Socket::pair(kind).unwrap();
        let peer = OwnedFd::from(peer);
        let receiver = std::thread::spawn(move || {
            let mut rx = blocking::Framed::with_codecs(a, Refuse, FrameCodec::default());
            (0..50).for_each(|_| rx.next().unwrap().unwrap());
            assert!(rx.next().is_none());
        });
        for _ in 0..10 {
            let batches = [(); 5].map(|()| Vec::from_iter((0..250).map(|_| raw::pair(kind).0)));
            batches.iter().for_each(|sockets| raw_send(&peer, b"x", sockets));
        }
        drop(peer);
        soon("the sockets before these are closed", async {
            while !receiver.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await;
        receiver.join().unwrap();
    });
}
