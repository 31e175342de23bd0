//! Workers that reject connections because they have no room or no time.

use std::time::Duration;

use fdwire::{
    SocketKind,
    handoff::{
        Accepted, Dispatcher,
        protocol::{FromWorker, RejectReason},
    },
};
use futures::future::join_all;
use tokio::time::timeout;

use crate::{
    both,
    common::run,
    raw_worker::{Raw, connections, serve, until},
};

/// Rejects each offer, and asks for more, until the link ends.
pub(crate) async fn reject_all(mut worker: Raw, reason: RejectReason) {
    while worker.offer().await.is_some() {
        worker.reject(1, reason).await;
        worker.send(FromWorker::Demand { total: 10_000 }).await;
    }
}

/// The worker rejects its first offer. The connections that were planned for it and not sent yet go
/// to another worker.
#[test]
fn offers_that_were_only_planned_are_not_sent_after_a_refusal() {
    both(async |kind| {
        // All connections are planned for the first worker, and about a third of them is sent.
        const CONNECTIONS: u32 = 120;
        let dispatcher =
            Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
        let mut first = Raw::start(&dispatcher, kind, CONNECTIONS.into()).await;
        let (_clients, outcomes): (Vec<_>, Vec<_>) = connections(CONNECTIONS)
            .await
            .into_iter()
            .map(|(client, accepted)| {
                // The prefix is so long that no more offers fit into the socket.
                (
                    client,
                    dispatcher.dispatch(Accepted::from(accepted).with_prefix(vec![0; 10 << 10])),
                )
            })
            .unzip();
        // The first worker rejects its first offer.
        drop(first.offer().await.unwrap());
        first.reject(1, RejectReason::Recalled).await;
        until("the refusal was received", || dispatcher.stats().workers[0].rejected == 1).await;
        // Both workers adopt each offer that they get. The second one gets those not yet sent.
        let mut second = Raw::start(&dispatcher, kind, CONNECTIONS.into()).await;
        let adopt_all = async |worker: &mut Raw| {
            while worker.offer().await.is_some() {
                worker.adopt(1).await;
            }
        };
        let outcomes = tokio::select! {
            outcomes = join_all(outcomes) => outcomes,
            _ = async {
                tokio::join!(adopt_all(&mut first), adopt_all(&mut second))
            } => unreachable!(),
        };
        let by_second =
            outcomes.into_iter().filter(|outcome| *outcome.as_ref().unwrap() == second.id).count();
        assert!(by_second > CONNECTIONS as usize / 4, "{by_second}");
    });
}

/// The worker has asked for more connections than it can take. They wait until it asks again, and
/// are not given up.
///
/// Rules: D-REFUSAL.
#[test]
fn a_worker_that_refuses_is_offered_nothing_until_it_asks_again() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut full = Raw::start(&dispatcher, kind, u64::MAX).await;
        let (client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        for reason in [RejectReason::Full, RejectReason::Recalled] {
            drop(full.offer().await.unwrap());
            full.reject(1, reason).await;
            until("the refusal was received", || dispatcher.stats().waiting == 1).await;
            assert_eq!(dispatcher.stats().workers[0].credit, 0);
            full.send(FromWorker::Demand { total: u64::MAX }).await;
        }
        let offer = full.offer().await.unwrap();
        full.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), full.id);
        drop(serve(offer, "at last").unwrap());
        assert_eq!(client.answer().await, "at last");
    });
}

/// The worker has rejected all its offers so far. So it does not get the next one at once.
///
/// Rules: D-REFUSAL.
#[test]
fn a_worker_that_refuses_again_and_again_is_offered_less_and_less() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let bad = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        let refusing = tokio::spawn(reject_all(bad, RejectReason::Full));
        assert!(timeout(Duration::from_millis(500), &mut outcome).await.is_err());
        let rejected = dispatcher.stats().workers[0].rejected;
        assert!((1..20).contains(&rejected), "{rejected}");
        refusing.abort();
    });
}
