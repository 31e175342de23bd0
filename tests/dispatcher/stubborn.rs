//! Workers that neither die nor fall silent, and settings without an end.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use fdwire::{
    SocketKind,
    handoff::{
        Accepted, Dispatcher,
        protocol::{FromWorker, RejectReason},
    },
};
use futures::{FutureExt, SinkExt, future::join_all};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout},
    sys::{
        signal::kill,
        socket::{MsgFlags, send},
    },
    unistd::Pid,
};
use tokio::{process::Command, time::sleep};

use crate::{
    both,
    common::{encoded, run},
    raw_worker::{Raw, connections, serve, until},
};

/// Its messages keep it from being taken for one that hangs.
///
/// Rules: W-RECALL-TIME.
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
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
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
        assert!(
            join_all(outcomes)
                .await
                .into_iter()
                .all(|outcome| outcome.is_ok_and(|worker| worker == good.id))
        );
    });
}

/// All of them share one thread with the dispatcher.
#[test]
fn a_worker_that_floods_the_dispatcher_leaves_others_their_turns() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let flooding = Raw::start(&dispatcher, kind, 0).await;
        let socket = OwnedFd::from(flooding.framed.into_parts().socket);
        std::thread::spawn(move || {
            let load = encoded(&[5, 0, 0, 0, 0, 0, 0, 0, 0], 0).repeat(3000);
            let mut poll = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            loop {
                match send(socket.as_raw_fd(), &load, MsgFlags::MSG_NOSIGNAL) {
                    Ok(_) => {}
                    Err(Errno::EAGAIN) => drop(nix::poll::poll(&mut poll, PollTimeout::NONE)),
                    Err(_) => return,
                }
            }
        });
        let mut worker = Raw::start(&dispatcher, kind, 50).await;
        for (_client, accepted) in connections(50).await {
            let outcome = dispatcher.dispatch(accepted);
            worker.offer().await.unwrap();
            worker.adopt(1).await;
            assert_eq!(outcome.await.unwrap(), worker.id);
        }
        assert_eq!(dispatcher.stats().retired, Default::default());
    });
}

#[test]
fn times_may_be_without_end() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::MAX)
            .hang_timeout(Duration::MAX)
            .recall_after(Duration::MAX)
            .max_fences(1, Duration::MAX)
            .build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap();
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), worker.id);

        let mut other = Raw::start(&dispatcher, kind, 1).await;
        let (removed, ()) =
            tokio::join!(dispatcher.remove_worker(other.id, Some(Duration::MAX)), other.leave());
        assert!(removed);
        tokio::join!(dispatcher.drain(Some(Duration::MAX)), worker.leave());
        assert_eq!(dispatcher.stats().retired.drained, 2);
    });
}

/// Rules: W-DRAIN-TIME.
#[test]
fn the_limit_of_the_last_drain_counts() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        let _offer = worker.offer().await.unwrap();
        assert!(dispatcher.drain(None).now_or_never().is_none());
        let work = async {
            worker.told().await;
            // Now nothing is left unanswered, which the first drain has waited for.
            worker.adopt(1).await;
            outcome.await.unwrap();
            worker.ended().await;
        };
        tokio::join!(dispatcher.drain(Some(Duration::from_millis(400))), work);
        assert_eq!(dispatcher.stats().retired.overdue, 1);
    });
}

/// A worker that has no time for one connection is not sent those that were meant for it and are
/// not on their way.
#[test]
fn after_a_refusal_nothing_is_sent_that_was_only_planned() {
    both(async |kind| {
        const CONNECTIONS: u32 = 120;
        let dispatcher =
            Dispatcher::builder().recall_after(Duration::MAX).hang_timeout(Duration::MAX).build();
        let mut first = Raw::start(&dispatcher, kind, CONNECTIONS.into()).await;
        let (_clients, outcomes): (Vec<_>, Vec<_>) = connections(CONNECTIONS)
            .await
            .into_iter()
            .map(|(client, accepted)| {
                // So long that a third of them fills the queues on the way.
                (
                    client,
                    dispatcher.dispatch(Accepted::from(accepted).with_prefix(vec![0; 10 << 10])),
                )
            })
            .unzip();
        drop(first.offer().await.unwrap());
        first.reject(1, RejectReason::Recalled).await;
        until("it was heard", || dispatcher.stats().workers[0].rejected == 1).await;
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

/// An offer that is not even sent is not held against a connection.
#[test]
fn only_offers_that_were_sent_count() {
    both(async |kind| {
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
        until("it was cut off", || dispatcher.stats().retired.hung == 1).await;
        let mut sent = 0;
        while silent.offer().await.is_some() {
            sent += 1;
        }
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
        // The last one may have been sent in part. On a stream, the descriptors of those behind it
        // may have gone ahead.
        assert!(given_back >= sent, "{sent} were sent, {given_back} given back");
        assert!(
            given_back <= sent + 1 || kind == SocketKind::Stream,
            "{sent} were sent, {given_back} given back"
        );
    });
}

/// A program that takes no notice of its standard input, say.
#[test]
fn a_process_that_never_said_hello_does_not_outlive_its_removal() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("600").kill_on_drop(true);
            command
        };
        let id = dispatcher.spawn_worker(sleep()).unwrap();
        let pid = Pid::from_raw(dispatcher.stats().workers[0].pid.unwrap() as i32);
        assert!(dispatcher.remove_worker(id, None).await);
        until("it was killed and reaped", || kill(pid, None).is_err()).await;
        dispatcher.spawn_worker(sleep()).unwrap();
        dispatcher.drain(None).await;
    });
}

/// It has asked for more than it can take. Connections wait for it to ask again, rather than run
/// out of offers.
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
            until("it was heard", || dispatcher.stats().waiting == 1).await;
            assert_eq!(dispatcher.stats().workers[0].credit, 0);
            full.say(FromWorker::Demand { total: u64::MAX }).await;
        }
        let offer = full.offer().await.unwrap();
        full.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), full.id);
        drop(serve(offer, "at last").unwrap());
        assert_eq!(client.answer().await, "at last");
    });
}
