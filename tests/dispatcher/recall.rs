//! Recalls of connections that busy workers have not adopted.

use std::{os::fd::OwnedFd, time::Duration};

use fdwire::{
    Socket,
    handoff::{Dispatcher, Incoming, protocol::FromWorker},
};
use futures::{SinkExt, future::join_all};
use tokio::time::{sleep, timeout};

use crate::{
    both,
    common::{KINDS, run_in, some_threads},
    raw_worker::{Raw, connections, until},
};

/// A connection that every worker has rejected waits until the application of one of them asks for
/// a connection. Messages that a worker's library sends by itself do not bring it there again.
#[test]
fn a_recalled_connection_does_not_go_around_busy_workers() {
    both(async |kind| {
        // The applications of two workers have a connection each, and ask for no other.
        let interval = Duration::from_millis(10);
        let dispatcher =
            Dispatcher::builder().ping_interval(interval).recall_after(interval).build();
        let mut workers = Vec::new();
        let mut all = connections(3).await.into_iter();
        for _ in 0..2 {
            let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
            dispatcher.add_worker(dispatcher_end);
            let mut incoming = Incoming::new(worker_end);
            let (client, accepted) = all.next().unwrap();
            let (outcome, connection) =
                tokio::join!(dispatcher.dispatch(accepted), incoming.next());
            outcome.unwrap();
            workers.push((incoming, client, connection));
        }
        // A third connection is recalled from both, and offered to neither of them again.
        let (_client, accepted) = all.next().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        let rejected =
            || dispatcher.stats().workers.iter().map(|worker| worker.rejected).sum::<u64>();
        until("both have rejected it", || rejected() == 2).await;
        assert!(timeout(20 * interval, &mut outcome).await.is_err());
        assert_eq!(rejected(), 2);
        // One of the applications asks, and gets it.
        assert!(workers[0].0.next().await.is_some());
        outcome.await.unwrap();
    });
}

/// The application blocks one of several threads. The connections that the worker has not adopted
/// are recalled, and the worker is not cut off.
#[test]
fn a_worker_whose_application_blocks_for_long_is_recalled_and_goes_on() {
    for kind in KINDS {
        run_in(some_threads(), async move {
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(50))
                .hang_timeout(Duration::from_secs(3))
                .recall_after(Duration::from_millis(100))
                .build();
            let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
            let busy = dispatcher.add_worker(dispatcher_end);
            // The worker's application takes a connection, and then blocks until it is released.
            let (release, released) = std::sync::mpsc::channel();
            let (began, beginning) = tokio::sync::oneshot::channel();
            let worker_end = OwnedFd::from(worker_end);
            let worker = std::thread::spawn(move || {
                run_in(some_threads(), async move {
                    let application = async move {
                        let mut incoming = Incoming::new(Socket::try_from(worker_end).unwrap());
                        drop(incoming.next().await);
                        began.send(()).unwrap();
                        released.recv().unwrap(); // blocks a thread of the runtime
                        drop(incoming.next().await);
                        let handle = incoming.handle();
                        drop(incoming);
                        handle.ended().await
                    };
                    tokio::spawn(application).await.unwrap()
                })
            });
            // Two more connections are recalled from that worker, and another one adopts them.
            let mut all = connections(4).await.into_iter();
            dispatcher.dispatch(all.next().unwrap().1).await.unwrap();
            beginning.await.unwrap();
            let waiting = Vec::from_iter(
                all.by_ref().take(2).map(|(_, accepted)| dispatcher.dispatch(accepted)),
            );
            until("the connections were rejected", || dispatcher.stats().workers[0].rejected >= 2)
                .await;
            let mut other = Raw::start(&dispatcher, kind, 2).await;
            other.offers(2).await;
            other.adopt(2).await;
            for outcome in join_all(waiting).await {
                assert_eq!(outcome.unwrap(), other.id);
            }
            // The application blocks for longer than a worker may be silent. No worker is cut off.
            assert!(timeout(Duration::from_secs(4), other.ended()).await.is_err());
            assert_eq!(dispatcher.stats().retired, Default::default());
            // When the application goes on, it gets the next connection.
            release.send(()).unwrap();
            assert_eq!(dispatcher.dispatch(all.next().unwrap().1).await.unwrap(), busy);
            worker.join().unwrap();
        });
    }
}

/// The messages show that the worker does not hang. So it is cut off only because it does not
/// answer the RECALL.
///
/// Rules: W-RECALL-TIME.
#[test]
fn a_worker_that_sends_messages_but_no_answers_is_cut_off() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(20))
            .hang_timeout(Duration::from_secs(1))
            .recall_after(Duration::from_millis(20))
            .build();
        let mut bad = Raw::start(&dispatcher, kind, 2).await;
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(2).await.into_iter().unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let sending = async {
            while bad.framed.send(FromWorker::Demand { total: 2 }).await.is_ok() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let cut_off =
            until("the worker was cut off", || dispatcher.stats().retired.misbehaved == 1);
        tokio::join!(sending, cut_off);
        let mut good = Raw::start(&dispatcher, kind, 2).await;
        good.offers(2).await;
        good.adopt(2).await;
        assert!(
            join_all(outcomes)
                .await
                .into_iter()
                .all(|outcome| outcome.is_ok_and(|worker| worker == good.id))
        );
    });
}
