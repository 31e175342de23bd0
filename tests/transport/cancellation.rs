//! Cancellation: a future that is dropped while it waits loses nothing.

use std::{
    future::{self, Future},
    pin::pin,
    time::Duration,
};

use fdwire::{Error, Frame, FrameCodec, Framed, Limits, Sender, Socket};
use futures::{SinkExt, StreamExt, TryStreamExt, future::join_all};
use tokio::{task::yield_now, time::timeout};

use crate::{
    common::{encoded, framed_pair, large, marked, marks, raw_send, some_threads, with_raw_peer},
    counted, counted_in,
    sender::shared,
};

/// Polls a future once and drops it, as a lost `select!` does.
pub(crate) async fn once<T>(future: impl Future<Output = T>) -> Option<T> {
    yield_now().await;
    timeout(Duration::ZERO, future).await.ok()
}

#[test]
fn receiving_can_be_cancelled_after_every_byte() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let bytes = encoded(b"payload", 2);
        let mut frame = None;
        for (index, byte) in bytes.iter().enumerate() {
            assert!(once(rx.next()).await.is_none());
            let fds = if index == 0 || index == 5 { vec![marked(index as u32)] } else { vec![] };
            raw_send(&peer, &[*byte], &fds);
            tokio::task::yield_now().await;
        }
        while frame.is_none() {
            frame = once(rx.next()).await;
        }
        let frame = frame.unwrap().unwrap().unwrap();
        assert_eq!((&frame.payload[..], marks(&frame)), (&b"payload"[..], vec![0, 5]));
    });
}

#[test]
fn flushing_can_be_cancelled_after_every_send() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        a.set_send_buffer_size(1).unwrap();
        let (mut tx, mut rx) = (Framed::new(a, large()), Framed::new(b, large()));
        let mut cancelled = 0;
        for n in 0..50 {
            tx.feed(Frame::new(vec![0; 20_000]).with_fd(marked(n)).with_fd(marked(n + 100)))
                .await
                .unwrap();
            while once(tx.flush()).await.is_none() {
                cancelled += 1;
                if let Some(frame) = once(rx.next()).await {
                    assert_eq!(marks(&frame.unwrap().unwrap()), [n, n + 100]);
                }
            }
            if n == 49 {
                once(tx.close()).await.unwrap().unwrap();
            }
            if let Some(Some(frame)) = once(rx.next()).await {
                assert_eq!(marks(&frame.unwrap()), [n, n + 100]);
            }
        }
        assert!(cancelled > 50, "the flushes were never cut short");
        assert!(rx.next().await.is_none());
    });
}

#[test]
fn waiting_for_room_can_be_cancelled() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        a.set_send_buffer_size(1).unwrap();
        let codec = FrameCodec::new(Limits::default().max_queued_bytes(1));
        let (mut tx, mut rx) = (Framed::new(a, codec), Framed::new(b, codec));
        // Send until the socket is full, and one frame waits.
        let mut sent = 0;
        let waiting = loop {
            let Some(permit) = once(tx.reserve()).await else { break marked(sent) };
            permit.unwrap().send(Frame::new(vec![0; 1000]).with_fd(marked(sent))).unwrap();
            sent += 1;
        };
        let receive = async {
            for n in 0..sent {
                assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [n]);
            }
        };
        let ((), flushed) = tokio::join!(receive, tx.flush());
        flushed.unwrap();
        tx.reserve().await.unwrap().send(Frame::new("").with_fd(waiting)).unwrap();
        tx.flush().await.unwrap();
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [sent]);
    });
}

#[test]
fn closing_can_be_cancelled() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        a.set_send_buffer_size(1).unwrap();
        let (mut tx, mut rx) = (Framed::new(a, large()), Framed::new(b, large()));
        tx.feed(Frame::new(vec![0; 1 << 20]).with_fd(marked(1))).await.unwrap();
        assert!(once(tx.close()).await.is_none());
        let (closed, received) = tokio::join!(tx.close(), rx.try_next());
        closed.unwrap();
        assert_eq!(marks(&received.unwrap().unwrap()), [1]);
        assert!(rx.next().await.is_none());

        let error = tx.send(Frame::new("late").with_fd(marked(2))).await.unwrap_err();
        assert!(matches!(error.error, Error::Closed));
        assert_eq!(marks(&error.item.unwrap()), [2]);
        assert!(matches!(tx.reserve().await, Err(Error::Closed)));
        tx.close().await.unwrap();
    });
}

#[test]
fn a_cancelled_send_loses_only_its_item_and_closes_its_descriptors() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        while once(tx.send(Frame::new(vec![0; 100_000]))).await.is_some() {}
        let (reader, writer) = std::io::pipe().unwrap();
        // Above the limit, no further frame is taken.
        while once(tx.feed(Frame::new(vec![0; 100_000]))).await.is_some() {}
        assert!(once(tx.send(Frame::new("").with_fd(writer))).await.is_none());
        assert_eq!(std::io::read_to_string(reader).unwrap(), "", "a copy of the writer is open");
        let drain = async {
            while let Some(frame) = rx.next().await {
                assert_eq!(frame.unwrap().payload.len(), 100_000);
            }
        };
        let ((), closed) = tokio::join!(drain, tx.close());
        closed.unwrap();
    });
}

/// Polls a future at most `times` times and drops it.
async fn at_most<T>(times: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..times {
        if let Some(output) = once(future.as_mut()).await {
            return Some(output);
        }
    }
    None
}

/// Sends messages in several ways, and gives up many of them while they wait. Returns the number of
/// messages accepted.
async fn send_at_random(sender: Sender<FrameCodec>, seed: u64) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut accepted = 0;
    for _ in 0..40 {
        let polls = random.usize(0..4);
        let frame =
            Frame::new(vec![0; random.usize(0..2000)]).with_fds((0..random.u32(0..3)).map(marked));
        match random.u8(0..5) {
            0 => drop(at_most(polls, sender.flush()).await.transpose().unwrap()),
            1 => drop(at_most(polls, sender.reserve()).await.transpose().unwrap()),
            2 => {
                let permit = sender.reserve().await.unwrap();
                at_most(polls, future::pending::<()>()).await;
                permit.send(frame).unwrap();
                accepted += 1;
            }
            3 => {
                accepted += usize::from(
                    at_most(polls, sender.send(frame)).await.transpose().unwrap().is_some(),
                )
            }
            _ => {
                sender.send(frame).await.unwrap();
                accepted += 1;
            }
        }
    }
    sender.flush().await.unwrap();
    accepted
}

#[test]
fn senders_that_give_up_at_random_lose_nothing_that_was_accepted_and_hang_nobody() {
    for round in 0..4 {
        counted_in(some_threads, async |kind| {
            let (a, b) = Socket::pair(kind).unwrap();
            a.set_send_buffer_size(1).unwrap();
            let limits = Limits::default()
                .max_queued_bytes(200 + 1000 * round)
                .max_queued_fds(1 + 4 * round);
            let (_read, sender, driver) = shared(Framed::new(a, FrameCodec::new(limits)));
            let driver = tokio::spawn(driver);
            let tasks = (0..20).map(|task| {
                tokio::spawn(send_at_random(sender.clone(), 1000 * round as u64 + task))
            });
            let tasks = Vec::from_iter(tasks);
            drop(sender);
            let end = async { driver.await.unwrap().close().await.unwrap() };
            let (received, ()) =
                tokio::join!(Framed::new(b, large()).try_fold(0, async |n, _| Ok(n + 1)), end);
            let accepted: usize = join_all(tasks).await.into_iter().map(Result::unwrap).sum();
            assert_eq!(received.unwrap(), accepted);
        });
    }
}
