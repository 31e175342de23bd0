//! Connections that several workers have rejected or died of. One is given up only when every
//! worker that takes connections has failed with it.

use std::time::Duration;

use fdwire::{
    Framed, Socket, SocketKind,
    handoff::{
        Accepted, Dispatcher, NotDispatched,
        protocol::{FromWorker, RejectReason, VERSION, WorkerCodec},
    },
};
use futures::{FutureExt, SinkExt, StreamExt, future::join_all, stream};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    both,
    common::{KINDS, run},
    raw_worker::{Raw, connections, until},
    refusal::reject_all,
};

async fn adopt_all(mut worker: Raw) {
    let mut served = 0;
    while let Some(offer) = worker.offer().await {
        drop(offer);
        worker.adopt(1).await;
        served += 1;
        worker.send(FromWorker::Load { finished: served }).await;
    }
}

/// The fault of the eight bad workers beside two healthy ones.
#[derive(Debug, Clone, Copy)]
enum Bad {
    Rejects(RejectReason),
    /// Each bad worker dies of its first offer, and another one takes its place.
    Dies,
}

/// 64 connections are handed over at a time, as from the backlog of a listener.
///
/// Rules: D-REASONS.
#[test]
fn workers_that_refuse_reject_or_die_lose_no_connection_beside_healthy_ones() {
    const CONNECTIONS: usize = 2000;
    for kind in KINDS {
        for bad in [
            Bad::Rejects(RejectReason::Full),
            Bad::Rejects(RejectReason::Recalled),
            Bad::Rejects(RejectReason::Draining),
            Bad::Rejects(RejectReason::Unusable),
            Bad::Rejects(RejectReason::Other(7)),
            Bad::Dies,
        ] {
            run(async {
                // Two workers are healthy, and eight are bad.
                let dispatcher = Dispatcher::builder().build();
                for _ in 0..2 {
                    let healthy = Raw::start(&dispatcher, kind, 10_000).await;
                    tokio::spawn(adopt_all(healthy));
                }
                for _ in 0..8 {
                    let dispatcher = dispatcher.clone();
                    tokio::spawn(async move {
                        match bad {
                            Bad::Rejects(reason) => {
                                reject_all(Raw::start(&dispatcher, kind, 10_000).await, reason)
                                    .await
                            }
                            Bad::Dies => loop {
                                drop(Raw::start(&dispatcher, kind, 10_000).await.offer().await);
                            },
                        }
                    });
                }
                // All connections are adopted, and each bad worker has got offers.
                let clients = stream::iter(0..CONNECTIONS).for_each_concurrent(64, async |_| {
                    let (_client, connection) = UnixStream::pair().unwrap();
                    let adopted = dispatcher.dispatch(connection).await;
                    assert!(adopted.is_ok(), "{kind:?} {bad:?}: {adopted:?}");
                });
                clients.await;
                let stats = dispatcher.stats();
                let (adopted, tried) = (stats.adopted as usize, stats.offered_again);
                assert_eq!(
                    (adopted, stats.lost, stats.given_back),
                    (CONNECTIONS, 0, 0),
                    "{kind:?} {bad:?}"
                );
                assert!(tried >= 8, "{kind:?} {bad:?}: the bad ones got {tried} offers");
            });
        }
    }
}

/// The connection is allowed no failure, so a single refusal that counted would fail it.
///
/// Rules: D-BLAME.
#[test]
fn no_refusal_counts_as_a_failure_of_its_connection() {
    both(async |kind| {
        // A worker rejects the connection for each reason that is a refusal, and then adopts it.
        let dispatcher = Dispatcher::builder().max_offers(1).build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let refusals = [
            RejectReason::Full,
            RejectReason::Draining,
            RejectReason::Recalled,
            RejectReason::Other(7),
        ];
        for (made, reason) in (1..).zip(refusals) {
            drop(worker.offer().await.unwrap());
            worker.reject(1, reason).await;
            worker.send(FromWorker::Demand { total: made + 1 }).await;
        }
        drop(worker.offer().await.unwrap());
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), worker.id);

        // UNUSABLE is no refusal, and counts as a failure.
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        worker.send(FromWorker::Demand { total: 6 }).await;
        drop(worker.offer().await.unwrap());
        worker.reject(1, RejectReason::Unusable).await;
        let refused = outcome.await.unwrap_err();
        assert!(matches!(refused.reason, NotDispatched::TooManyOffers { .. }), "{refused:?}");
    });
}

/// More workers die of the connection than `max_offers` allows, as those of a broken new version
/// do.
#[test]
fn a_connection_outlives_any_number_of_dying_workers_as_long_as_a_healthy_one_is_only_full() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().max_offers(2).build();
        let mut healthy = Raw::start(&dispatcher, kind, 0).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        for _ in 0..6 {
            let mut bad = Raw::start(&dispatcher, kind, 10).await;
            bad.offer().await.unwrap();
            drop(bad);
            until("the death of the worker is noticed", || dispatcher.stats().workers.len() == 1)
                .await;
            assert_eq!(dispatcher.stats().waiting, 1);
        }
        healthy.send(FromWorker::Demand { total: 1 }).await;
        healthy.offer().await.unwrap();
        healthy.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), healthy.id);
    });
}

#[test]
fn a_connection_that_no_worker_can_use_is_given_back() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().max_offers(3).build();
        let mut workers =
            [Raw::start(&dispatcher, kind, 10).await, Raw::start(&dispatcher, kind, 10).await];
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let work = async {
            loop {
                for worker in &mut workers {
                    if let Some(offer) =
                        timeout(Duration::from_millis(50), worker.offer()).await.ok().flatten()
                    {
                        drop(offer);
                        worker.reject(1, RejectReason::Unusable).await;
                    }
                }
            }
        };
        let error = tokio::select! {
            outcome = outcome => outcome.unwrap_err(),
            () = work => unreachable!(),
        };
        assert!(matches!(error.reason, NotDispatched::TooManyOffers { offers: 3, .. }));
    });
}

/// The suspect needs a worker without other offers. The connection behind it does not.
#[test]
fn a_suspect_does_not_hold_up_the_connections_behind_it() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().recall_after(Duration::from_secs(60)).build();
        let mut all = connections(3).await;
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_first, accepted) = all.remove(0);
        let _slow = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap(); // its application is slow to take it
        let (_second, accepted) = all.remove(0);
        let _suspect = dispatcher.dispatch(accepted);
        for _ in 0..2 {
            let mut bad = Raw::start(&dispatcher, kind, 1).await;
            bad.offer().await.unwrap();
            drop(bad);
            until("the death of the worker is noticed", || dispatcher.stats().workers.len() == 1)
                .await;
        }
        worker.send(FromWorker::Demand { total: 50 }).await;
        let (_third, accepted) = all.remove(0);
        until("the demand was received", || dispatcher.stats().workers[0].credit > 0).await;
        let permit = dispatcher.reserve().now_or_never().flatten().expect("there is room");
        let _behind = permit.dispatch(accepted);
        worker.offer().await.unwrap();
        assert_eq!(dispatcher.stats().waiting, 1, "the suspect");
        worker.adopt(2).await;
        worker.offer().await.unwrap();
        assert_eq!(dispatcher.stats().waiting, 0);
    });
}

/// Rules: W-HELLO-TIME.
#[test]
fn a_worker_that_sends_no_hello_is_cut_off() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().hello_timeout(Duration::from_millis(100)).build();
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        dispatcher.add_worker(dispatcher_end);
        let mut framed = Framed::new(worker_end, WorkerCodec::default());
        assert!(framed.next().await.is_none());
        assert_eq!(dispatcher.stats().retired.misbehaved, 1);
    });
}

/// Rules: D-OFFER-FDS.
#[test]
fn a_bundle_comes_with_its_connection_to_a_worker_that_takes_it() {
    both(async |kind| {
        // One worker takes one descriptor with each offer, and another one takes two.
        let dispatcher = Dispatcher::builder().build();
        let _takes_one = Raw::start(&dispatcher, kind, 10).await;
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        let id = dispatcher.add_worker(dispatcher_end);
        let mut framed = Framed::new(worker_end, WorkerCodec::default());
        framed
            .send(FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 2, open: None })
            .await
            .unwrap();
        framed.send(FromWorker::Demand { total: 10 }).await.unwrap();
        let mut worker = Raw::after_greeting(id, framed);
        // A connection with a further descriptor goes to the second worker.
        let (mut upstream, passed) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome =
            dispatcher.dispatch(Accepted::from(accepted).metadata("state").with_fd(passed));
        let mut offer = worker.offer().await.unwrap();
        assert_eq!((offer.bundle.len(), &offer.metadata[..]), (1, &b"state"[..]));
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), id);
        drop(std::os::unix::net::UnixStream::from(offer.bundle.remove(0)));
        // The dispatcher has no copy left.
        assert_eq!(std::io::Read::read(&mut upstream, &mut [0]).unwrap(), 0);

        // A connection with more descriptors than any worker takes waits, and others pass it.
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let many = [(); 2].map(|()| std::os::unix::net::UnixStream::pair().unwrap().0);
        let too_many = many.into_iter().fold(Accepted::from(accepted), Accepted::with_fd);
        let mut waits = dispatcher.dispatch(too_many);
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let passes = dispatcher.dispatch(accepted);
        assert!((&mut waits).now_or_never().is_none());
        assert_eq!(dispatcher.stats().waiting, 1);
        drop(passes);
    });
}

#[test]
fn only_offers_that_were_sent_count_as_failures_of_their_connection() {
    both(async |kind| {
        // More offers are planned for a silent worker than fit into its socket.
        const CONNECTIONS: u32 = 60;
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(20))
            .hang_timeout(Duration::from_secs(1))
            .max_offers(1)
            .build();
        let mut silent = Raw::start(&dispatcher, kind, CONNECTIONS.into()).await;
        let outcomes = connections(CONNECTIONS).await.into_iter().map(|(client, accepted)| {
            let outcome =
                dispatcher.dispatch(Accepted::from(accepted).with_prefix(vec![0; 10 << 10]));
            async { (client, outcome.await).1 }
        });
        let outcomes = Vec::from_iter(outcomes);
        // After the worker is cut off, it counts the offers that were sent.
        until("the worker was cut off", || dispatcher.stats().retired.hung == 1).await;
        let mut sent = 0;
        while silent.offer().await.is_some() {
            sent += 1;
        }
        // Only these are given back. A good worker adopts the others.
        let mut good = Raw::start(&dispatcher, kind, CONNECTIONS.into()).await;
        let work = async {
            while let Some(_offer) = good.offer().await {
                good.adopt(1).await;
            }
        };
        let outcomes = tokio::select! {
            outcomes = join_all(outcomes) => outcomes,
            () = work => unreachable!(),
        };
        let given_back = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        // The last offer may have been sent in part. On a stream, descriptors of later offers may
        // have been sent ahead of their bytes.
        assert!(given_back >= sent, "{sent} were sent, {given_back} given back");
        assert!(
            given_back <= sent + 1 || kind == SocketKind::Stream,
            "{sent} were sent, {given_back} given back"
        );
    });
}
