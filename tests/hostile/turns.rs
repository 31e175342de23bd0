//! A fast peer leaves other tasks their turns.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures::TryStreamExt;
use tokio::task::yield_now;

use crate::{
    common::{encoded, with_raw_peer},
    counted,
    descriptors::nulls,
    raw,
};

#[test]
fn messages_with_many_descriptors_leave_other_tasks_their_turns() {
    counted(async |kind| {
        const MESSAGES: usize = 60;
        let (mut rx, peer) = with_raw_peer(kind);
        let fds = nulls(253);
        for _ in 0..MESSAGES {
            if raw::try_send(&peer, &encoded(b"", 253), &fds).is_none() {
                return eprintln!("skipped: RLIMIT_NOFILE is too small for so many descriptors in flight");
            }
        }
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
