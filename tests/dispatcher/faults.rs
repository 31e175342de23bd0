//! Workers that break the protocol, flood the dispatcher, or do not answer.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use fdwire::{
    Framed, Socket, SocketKind,
    handoff::{
        Dispatcher, NotDispatched, Unadopted,
        protocol::{FromWorker, RejectReason, WorkerCodec},
    },
};
use futures::{SinkExt, StreamExt, future::join_all};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{MsgFlags, send},
};

use crate::{
    both,
    common::{encoded, marked, raw_send},
    raw_worker::{Raw, adopted, connections, serve, until},
};

/// Has a worker misbehave with `how` while it has two offers. Checks that it is cut off, and that
/// another worker serves its connections.
async fn misbehaves(kind: SocketKind, how: impl AsyncFnOnce(Raw) -> Raw) {
    let dispatcher = Dispatcher::builder().build();
    let mut bad = Raw::start(&dispatcher, kind, 2).await;
    let (clients, accepted): (Vec<_>, Vec<_>) = connections(2).await.into_iter().unzip();
    let outcomes =
        Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
    let copies = bad.offers(2).await;
    let mut bad = how(bad).await;
    bad.ended().await;
    until("the worker was cut off", || dispatcher.stats().retired.misbehaved == 1).await;

    let mut good = Raw::start(&dispatcher, kind, 2).await;
    let offers = good.offers(2).await;
    good.adopt(2).await;
    for outcome in outcomes {
        assert_eq!(outcome.await.unwrap(), good.id);
    }
    drop(copies);
    for offer in offers {
        let (_, stream) = serve(offer, "good").unwrap();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    for client in clients {
        assert_eq!(client.answer().await, "good");
    }
}

/// Rules: D-BREACH, P-FRAME, P-LENGTH, W-COUNT, W-DEMAND, W-LOAD, W-PONG, W-HELLO-ONCE.
#[test]
fn a_worker_that_misbehaves_is_cut_off_and_its_connections_go_to_another() {
    both(async |kind| {
        let garbage = |bytes: &'static [u8], fds: u32| {
            async move |raw: Raw| {
                let fds = Vec::from_iter((0..fds).map(marked));
                raw_send(raw.framed.socket(), bytes, &fds);
                raw
            }
        };
        misbehaves(kind, garbage(b"GET / HTTP/1.1\r\n\r\n", 0)).await;
        misbehaves(kind, garbage(b"\xFD\x10\0\0\0\x10\0\x01", 0)).await; // one byte too long
        misbehaves(kind, garbage(b"\xFD\x10\0\0\0\0\0\x01\x3E", 0)).await; // an unknown message
        // An ADOPTED without its fields.
        misbehaves(kind, garbage(b"\xFD\x10\0\0\0\0\0\x01\x03", 0)).await;
        misbehaves(kind, garbage(b"\xFD\x10\0\x01\0\0\0\x01\x07", 1)).await; // a descriptor
        // A descriptor that no frame claims.
        misbehaves(kind, garbage(b"\xFD\x10\0\0\0\0\0\x09\x02\0\0\0\0\0\0\0\x09", 1)).await;
        let sends = |message| {
            async move |mut raw: Raw| {
                raw.send(message).await;
                raw
            }
        };
        misbehaves(kind, sends(FromWorker::Adopted { first: 0, count: 3 })).await;
        misbehaves(
            kind,
            sends(FromWorker::Rejected { first: 0, count: u32::MAX, reason: RejectReason::Full }),
        )
        .await;
        misbehaves(kind, sends(FromWorker::Demand { total: 1 })).await;
        misbehaves(kind, sends(FromWorker::Load { finished: 1 })).await;
        misbehaves(kind, sends(FromWorker::Pong { nonce: 99 })).await;
        misbehaves(
            kind,
            sends(FromWorker::Hello { lowest: 1, highest: 1, max_fds: 1, open: None }),
        )
        .await;
    });
}

/// Rules: W-HELLO, W-HELLO-FDS, D-VERSION.
#[test]
fn a_worker_with_a_wrong_first_message_is_cut_off() {
    both(async |kind| {
        let first = [
            FromWorker::Hello { lowest: 2, highest: 9, max_fds: 1, open: None },
            FromWorker::Demand { total: 1 },
            FromWorker::Hello { lowest: 0, highest: 0, max_fds: 1, open: None },
            FromWorker::Hello { lowest: 1, highest: 1, max_fds: 0, open: None },
        ];
        for first in first {
            let dispatcher = Dispatcher::builder().build();
            let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
            dispatcher.add_worker(dispatcher_end);
            let mut framed = Framed::new(worker_end, WorkerCodec::default());
            framed.send(first).await.unwrap();
            assert!(framed.next().await.is_none());
            assert_eq!(dispatcher.stats().retired.misbehaved, 1);
        }
    });
}

/// The fault comes in the same call of `send`, right after an adoption.
///
/// Rules: D-LAST-WORDS, D-ADOPTED.
#[test]
fn answers_before_a_fault_count() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut bad = Raw::start(&dispatcher, kind, 2).await;
        let mut outcomes = Vec::from_iter(
            connections(2).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        bad.offers(2).await;
        raw_send(bad.framed.socket(), &[&adopted(0, 1)[..], b"garbage"].concat(), &[]);
        bad.ended().await;
        let mut good = Raw::start(&dispatcher, kind, 2).await;
        good.offers(1).await;
        good.adopt(1).await;
        assert_eq!(outcomes.remove(0).await.unwrap(), bad.id);
        assert_eq!(outcomes.remove(0).await.unwrap(), good.id);
    });
}

/// The workers die before they have answered any offer, so all connections are suspects at first.
#[test]
fn a_connection_that_its_workers_die_of_is_given_back_and_the_others_are_not() {
    both(async |kind| {
        // Two workers get all connections and die.
        const POISON: usize = 4;
        let dispatcher = Dispatcher::builder().max_offers(3).build();
        let (_clients, accepted): (Vec<_>, Vec<_>) = connections(10).await.into_iter().unzip();
        let mut outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let poison = outcomes.remove(POISON);
        for _ in 0..2 {
            let mut worker = Raw::start(&dispatcher, kind, 100).await;
            worker.offers(10).await;
            drop(worker);
            until("the death of the worker is noticed", || dispatcher.stats().workers.is_empty())
                .await;
        }
        // From now on, a worker gets one connection at a time. It dies of the fifth one.
        let mut worker = Raw::start(&dispatcher, kind, 100).await;
        for _ in 0..POISON {
            let _offer = worker.offer().await.unwrap();
            assert_eq!(dispatcher.stats().workers[0].unanswered, 1);
            worker.adopt(1).await;
        }
        worker.offer().await.unwrap();
        drop(worker);
        let error = poison.await.unwrap_err();
        assert!(matches!(
            error.reason,
            NotDispatched::TooManyOffers { offers: 3, last: Unadopted::Unanswered }
        ));
        error.connection.into_socket().unwrap();

        // The others are adopted.
        let mut worker = Raw::start(&dispatcher, kind, 100).await;
        for _ in POISON + 1..10 {
            worker.offer().await.unwrap();
            worker.adopt(1).await;
        }
        assert!(join_all(outcomes).await.into_iter().all(|outcome| outcome.is_ok()));
        assert_eq!((dispatcher.stats().given_back, dispatcher.stats().lost), (1, 0));
    });
}

#[test]
fn a_busy_worker_is_recalled_and_not_cut_off() {
    both(async |kind| {
        // A worker that answers pings has two offers unanswered. They are recalled.
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(20))
            .hang_timeout(Duration::from_secs(10))
            .recall_after(Duration::from_millis(100))
            .build();
        let mut busy = Raw::start(&dispatcher, kind, 2).await;
        let outcomes = Vec::from_iter(
            connections(2).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        let copies = busy.offers(2).await;
        while busy.recalled == 0 {
            busy.step().await.unwrap();
        }
        assert_eq!(busy.recalled, 2);
        drop(copies);
        // The worker rejects them, another one adopts them, and both workers go on.
        let mut free = Raw::start(&dispatcher, kind, 2).await;
        busy.reject(2, RejectReason::Recalled).await;
        free.offers(2).await;
        free.adopt(2).await;
        for outcome in outcomes {
            assert_eq!(outcome.await.unwrap(), free.id);
        }
        assert_eq!(dispatcher.stats().workers.len(), 2);
        assert_eq!(dispatcher.stats().retired, Default::default());
    });
}

/// The workers share one thread with the dispatcher.
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
