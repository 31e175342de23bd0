//! Workers that neither die nor fall silent, and settings without an end.

use std::time::Duration;

use fdwire::handoff::{Dispatcher, protocol::FromWorker};
use futures::{SinkExt, future::join_all};
use tokio::time::sleep;

use crate::{
    both,
    raw_worker::{Raw, connections, until},
};

/// What it says keeps it from being taken for one that hangs.
#[test]
fn a_worker_that_talks_and_never_answers_is_cut_off() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(20))
            .hang_timeout(Duration::from_millis(200))
            .recall_after(Duration::from_millis(20))
            .build();
        let mut bad = Raw::start(&dispatcher, kind, 2).await;
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(2).await.into_iter().unzip();
        let outcomes = Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let talk = async {
            while bad.framed.send(FromWorker::Demand { total: 2 }).await.is_ok() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let cut_off = until("it was cut off", || dispatcher.stats().retired.misbehaved == 1);
        tokio::join!(talk, cut_off);
        let mut good = Raw::start(&dispatcher, kind, 2).await;
        good.offers(2).await;
        good.adopt(2).await;
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok_and(|worker| worker == good.id)));
    });
}
