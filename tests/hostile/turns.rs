//! A fast peer leaves other tasks their turns.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fdwire::Frame;
use futures::{SinkExt, TryStreamExt};
use tokio::task::yield_now;

use crate::{
    common::{encoded, framed_pair, with_raw_peer},
    counted,
    descriptors::nulls,
    raw,
};

#[test]
fn messages_with_many_descriptors_leave_other_tasks_their_turns() {
    counted(async |kind| {
        const MESSAGES: usize = 60;
        let (mut rx, peer) = with_raw_peer(kind);

        // All messages wait in the socket before the first is received.
        let fds = nulls(253);
        for _ in 0..MESSAGES {
            if raw::try_send(&peer, &encoded(b"", 253), &fds).is_none() {
                return eprintln!(
                    "skipped: RLIMIT_NOFILE is too small for this many descriptors in flight"
                );
            }
        }

        // One task receives them, and this one counts how many between two of its own turns.
        let received = Arc::new(AtomicUsize::new(0));
        let reader = tokio::spawn({
            let received = Arc::clone(&received);
            async move {
                for _ in 0..MESSAGES {
                    rx.try_next().await.unwrap().unwrap();
                    received.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let (mut before, mut most) = (0, 0);
        while !reader.is_finished() {
            yield_now().await;
            let now = received.load(Ordering::Relaxed);
            most = most.max(now - before);
            before = now;
        }
        reader.await.unwrap();
        assert!(most <= MESSAGES / 2, "{most} messages of 253 descriptors in one turn");
    });
}

/// The peer takes each message before the next one is sent, so only the cooperative budget can end
/// a turn of the task.
#[test]
fn a_task_whose_messages_are_taken_at_once_leaves_other_tasks_their_turns() {
    counted(async |kind| {
        const MESSAGES: usize = 1000;
        let (tx, rx) = framed_pair(kind);
        let (_read, mut tx) = tx.into_split();
        let mut turns = 0;
        let mut sending = pin!(async {
            for _ in 0..MESSAGES {
                tx.send(Frame::new("x")).await.unwrap();
                assert_eq!(raw::receive(rx.socket(), false).unwrap().0, encoded(b"x", 0));
            }
        });
        poll_fn(|cx| {
            turns += 1;
            sending.as_mut().poll(cx)
        })
        .await;
        assert!(turns > 2, "{MESSAGES} messages in {turns} turns");
    });
}
