//! The end of a worker, and of a dispatcher.

use std::{pin::pin, time::Duration};

use fdwire::{
    Socket,
    handoff::{Dispatcher, Incoming, NotDispatched, WorkerState, protocol::FromWorker},
};
use futures::FutureExt;

use crate::{
    both,
    common::run,
    raw_worker::{Raw, connections},
};

#[test]
fn a_drain_hands_over_waiting_connections_and_lets_workers_finish() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let outcomes = Vec::from_iter(
            connections(2).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        let work = async {
            // The second connection waits for room. Before it is handed over, no DRAIN is sent.
            worker.offer().await.unwrap();
            worker.adopt(1).await;
            assert!(!worker.drain_requested);
            worker.send(FromWorker::Demand { total: 2 }).await;
            worker.offer().await.unwrap();
            worker.adopt(1).await;
            worker.wait_for_drain().await;
            worker.send(FromWorker::Draining).await;
            worker.send(FromWorker::Load { finished: 2 }).await;
            worker.send(FromWorker::Goodbye).await;
            worker.ended().await;
        };
        tokio::join!(dispatcher.drain(None), work);
        for outcome in outcomes {
            outcome.await.unwrap();
        }
        // Afterwards, the dispatcher takes nothing new.
        let (_client, accepted) = connections(1).await.pop().unwrap();
        assert!(matches!(
            dispatcher.dispatch(accepted).await.unwrap_err().reason,
            NotDispatched::Draining
        ));
        assert!(dispatcher.reserve().await.is_none());
        assert_eq!(dispatcher.stats().retired.drained, 1);
    });
}

/// Nobody will take the connections that wait, because workers that come later get nothing.
#[test]
fn a_drain_without_workers_gives_back_waiting_connections() {
    run(async {
        for last_one_dropped in [false, true] {
            let dispatcher = Dispatcher::builder().build();
            let (_client, accepted) = connections(1).await.pop().unwrap();
            let outcome = dispatcher.dispatch(accepted);
            match last_one_dropped {
                true => drop(dispatcher),
                false => dispatcher.drain(None).await,
            }
            assert!(matches!(outcome.await.unwrap_err().reason, NotDispatched::Draining));
        }
    });
}

#[test]
fn a_drain_ends_though_the_last_worker_dies() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        worker.offer().await.unwrap();
        let mut drain = pin!(dispatcher.drain(None));
        assert!(drain.as_mut().now_or_never().is_none());
        drop(worker);
        drain.await;
        assert!(matches!(outcome.await.unwrap_err().reason, NotDispatched::Draining));
    });
}

#[test]
fn a_drain_ends_at_its_deadline() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut full = Raw::start(&dispatcher, kind, 0).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        tokio::join!(dispatcher.drain(Some(Duration::from_millis(200))), full.ended());
        assert!(full.drain_requested);
        assert!(matches!(outcome.await.unwrap_err().reason, NotDispatched::Draining));
        assert_eq!(dispatcher.stats().retired.overdue, 1);
        assert_eq!(dispatcher.stats().given_back, 1);
    });
}

#[test]
fn offers_that_a_drain_leaves_unanswered_are_given_back() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap();
        tokio::join!(dispatcher.drain(Some(Duration::from_millis(200))), worker.ended());
        assert!(matches!(outcome.await.unwrap_err().reason, NotDispatched::Draining));
    });
}

#[test]
fn a_drain_goes_on_when_nobody_waits_for_it() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        assert!(dispatcher.drain(None).now_or_never().is_none());
        worker.offer().await.unwrap();
        worker.adopt(1).await;
        outcome.await.unwrap();
        worker.leave().await;
        dispatcher.drain(None).await;
        assert_eq!(dispatcher.stats().retired.drained, 1);
    });
}

#[test]
fn the_last_clone_of_a_dispatcher_drains_when_it_is_dropped() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 0).await;
        drop(dispatcher.clone());
        drop(dispatcher);
        worker.leave().await;
    });
}

#[test]
fn a_removed_worker_is_drained_and_gets_nothing_more() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut a = Raw::start(&dispatcher, kind, 5).await;
        let id = a.id;
        let remove = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.remove_worker(id, None).await }
        });
        a.wait_for_drain().await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let _outcome = dispatcher.dispatch(accepted);
        assert_eq!(dispatcher.stats().workers[0].state, WorkerState::Draining);
        assert_eq!(dispatcher.stats().waiting, 1);
        a.send(FromWorker::Goodbye).await;
        assert!(remove.await.unwrap());
        assert!(!dispatcher.remove_worker(id, None).await);
    });
}

/// The application waits until the drain is nearly over, and then drops its connection. So the
/// dispatcher receives a GOODBYE in time.
#[test]
fn a_worker_that_ends_its_connections_right_before_the_deadline_leaves_in_order() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        dispatcher.add_worker(dispatcher_end);
        let mut incoming = Incoming::new(worker_end);
        let handle = incoming.handle();
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let adopted = dispatcher.dispatch(accepted);
        let connection = incoming.next().await.unwrap();
        adopted.await.unwrap();

        // The application waits until less than `margin` is left. An unlimited drain does not end
        // that wait.
        let margin = Duration::from_secs(3599);
        let mut over = Box::pin(handle.drain_over(margin));
        assert!(over.as_mut().now_or_never().is_none());
        let unlimited = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.drain(None).await }
        });
        handle.drain_requested().await;
        assert!(over.as_mut().now_or_never().is_none());
        // A drain with a limit of an hour does.
        let limited = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.drain(Some(Duration::from_secs(3600))).await }
        });
        over.await;
        drop(connection);
        unlimited.await.unwrap();
        limited.await.unwrap();
        let retired = dispatcher.stats().retired;
        assert_eq!((retired.drained, retired.overdue), (1, 0));
    });
}

/// Rules: W-DRAIN-TIME.
#[test]
fn the_time_limit_of_the_last_drain_counts() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap();
        assert!(dispatcher.drain(None).now_or_never().is_none());
        let work = async {
            worker.wait_for_drain().await;
            // No offer is left unanswered, for which the first drain has waited.
            worker.adopt(1).await;
            outcome.await.unwrap();
            worker.ended().await;
        };
        tokio::join!(dispatcher.drain(Some(Duration::from_secs(2))), work);
        assert_eq!(dispatcher.stats().retired.overdue, 1);
    });
}
