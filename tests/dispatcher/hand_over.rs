//! The choice of a worker for a connection, and what arrives at the worker.

use std::{collections::BTreeSet, os::fd::OwnedFd, time::Duration};

use fdwire::{
    SocketKind,
    handoff::{
        Accepted, Address, Dispatcher, NotDispatched, Strategy,
        protocol::{FromWorker, RejectReason},
    },
};
use futures::{FutureExt, future::join_all};
use nix::{
    libc,
    sys::socket::{self, AddressFamily, SockFlag, SockType, setsockopt, sockopt},
};
use tokio::net::{UnixListener, UnixStream};

use crate::{
    both,
    common::run,
    raw_worker::{Raw, connections, serve, until},
};

#[test]
fn a_connection_comes_with_its_addresses_prefix_and_metadata() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 2).await;
        let (client, mut accepted) = connections(1).await.pop().unwrap();
        let (peer, local) = (accepted.peer_addr().unwrap(), accepted.local_addr().unwrap());
        let mut read = [0; 3];
        tokio::io::AsyncReadExt::read_exact(&mut accepted, &mut read).await.unwrap();
        let outcome = dispatcher
            .dispatch(Accepted::from(accepted).with_prefix(read.to_vec()).metadata("tenant 7"));
        let offer = worker.offer().await.unwrap();
        assert_eq!((&offer.peer, &offer.local), (&peer.into(), &local.into()));
        assert_eq!((&offer.prefix[..], &offer.metadata[..]), (&read[..], &b"tenant 7"[..]));
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), worker.id);
        assert_eq!(serve(offer, "hello").unwrap().0, 0);
        assert_eq!(client.answer().await, "hello", "the dispatcher has no copy left");

        let (ours, theirs) = UnixStream::pair().unwrap();
        let outcome = dispatcher.dispatch(theirs);
        let offer = worker.offer().await.unwrap();
        assert_eq!(offer.peer, fdwire::handoff::Address::Unnamed);
        worker.adopt(1).await;
        outcome.await.unwrap();
        drop(ours);
    });
}

#[test]
fn the_least_loaded_worker_gets_the_next_connection() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut a = Raw::start(&dispatcher, SocketKind::SeqPacket, 100).await;
        let mut b = Raw::start(&dispatcher, SocketKind::SeqPacket, 100).await;
        let mut all = connections(6).await.into_iter();
        let mut next = || dispatcher.dispatch(all.next().unwrap().1);
        let (first, second) = (next(), next());
        let offers = (a.offer().await.unwrap(), b.offer().await.unwrap());
        a.adopt(1).await;
        b.adopt(1).await;
        join_all([first, second]).await;
        // The first worker has finished its connection, so it gets the next one.
        a.send(FromWorker::Load { finished: 1 }).await;
        until("the load was received", || dispatcher.stats().workers[0].active == 0).await;
        let third = next();
        let _third = a.offer().await.unwrap();
        a.adopt(1).await;
        assert_eq!(third.await.unwrap(), a.id);
        drop(offers);
    });
}

#[test]
fn round_robin_takes_turns_whatever_the_load() {
    run(async {
        let dispatcher = Dispatcher::builder().strategy(Strategy::RoundRobin).build();
        let mut workers = Vec::new();
        for _ in 0..3 {
            workers.push(Raw::start(&dispatcher, SocketKind::SeqPacket, 2).await);
        }
        let outcomes =
            connections(6).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted));
        let outcomes = Vec::from_iter(outcomes);
        for worker in &mut workers {
            worker.offers(2).await;
            worker.adopt(2).await;
        }
        let ids = Vec::from_iter(join_all(outcomes).await.into_iter().map(Result::unwrap));
        assert_eq!(ids[..3], ids[3..]);
        assert_eq!(BTreeSet::from_iter(ids).len(), 3);
    });
}

#[test]
fn a_key_sticks_to_its_worker_and_overflows_to_one_other() {
    run(async {
        let dispatcher =
            Dispatcher::builder().strategy(Strategy::ByKey).ping_interval(Duration::MAX).build();
        // Four workers have room for three connections each. Six connections have the same key.
        let mut workers = Vec::new();
        for _ in 0..4 {
            workers.push(Raw::start(&dispatcher, SocketKind::SeqPacket, 3).await);
        }
        let all = connections(6)
            .await
            .into_iter()
            .map(|(_, accepted)| dispatcher.dispatch(Accepted::from(accepted).key("k")));
        let outcomes = Vec::from_iter(all);
        let unanswered =
            || Vec::from_iter(dispatcher.stats().workers.iter().map(|worker| worker.unanswered));
        let mut sorted = unanswered();
        sorted.sort_unstable();
        assert_eq!(
            sorted,
            [0, 0, 3, 3],
            "the first worker of the key has room for three, and the second gets the others"
        );
        drop(outcomes);
        // Without a key, the client's address is the key. It is the same for all.
        let dispatcher = Dispatcher::builder().strategy(Strategy::ByKey).build();
        let _workers = (
            Raw::start(&dispatcher, SocketKind::SeqPacket, 9).await,
            Raw::start(&dispatcher, SocketKind::SeqPacket, 9).await,
        );
        let _outcomes = Vec::from_iter(
            connections(5).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        let mut sorted =
            Vec::from_iter(dispatcher.stats().workers.iter().map(|worker| worker.unanswered));
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 5]);
    });
}

#[test]
fn a_connection_waits_for_a_worker_with_room() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let (client, accepted) = connections(1).await.pop().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        assert!((&mut outcome).now_or_never().is_none());
        assert_eq!(dispatcher.stats().waiting, 1);
        let mut worker = Raw::start(&dispatcher, kind, 0).await;
        worker.send(FromWorker::Demand { total: 1 }).await;
        let offer = worker.offer().await.unwrap();
        worker.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), worker.id);
        serve(offer, "x").unwrap();
        assert_eq!(client.answer().await, "x");
    });
}

#[test]
fn connections_that_a_worker_rejects_go_to_another() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut a = Raw::start(&dispatcher, kind, 5).await;
        let outcomes = Vec::from_iter(
            connections(5).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        a.offers(5).await;
        let mut b = Raw::start(&dispatcher, kind, 5).await;
        a.reject(1, RejectReason::Full).await;
        a.reject(1, RejectReason::Unusable).await;
        a.adopt(1).await;
        a.send(FromWorker::Draining).await;
        a.reject(2, RejectReason::Draining).await;
        b.offers(4).await;
        b.adopt(4).await;
        let ids = Vec::from_iter(join_all(outcomes).await.into_iter().map(Result::unwrap));
        assert_eq!(ids, [b.id, b.id, a.id, b.id, b.id]);
        a.send(FromWorker::Goodbye).await;
        until("the worker has left", || dispatcher.stats().retired.drained == 1).await;
        assert_eq!(dispatcher.stats().offered_again, 4);
    });
}

#[test]
fn permits_keep_slots_free() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 2).await;
        // Two permits have both slots of the worker.
        let mut all = connections(3).await.into_iter().map(|(_, accepted)| accepted);
        let permit = dispatcher.reserve().await.unwrap();
        let other = dispatcher.reserve().await.unwrap();
        assert!(
            dispatcher.reserve().now_or_never().is_none(),
            "both slots are taken, and dropping the future undoes its waiting"
        );
        // A connection with a permit goes first. Another one gets the slot of a dropped permit.
        let waits = dispatcher.dispatch(all.next().unwrap());
        let goes = permit.dispatch(all.next().unwrap());
        worker.offers(1).await;
        worker.adopt(1).await;
        goes.await.unwrap();
        assert_eq!(dispatcher.stats().waiting, 1);
        drop(other);
        worker.offers(1).await;
        worker.adopt(1).await;
        waits.await.unwrap();

        // A permit is granted when the worker asks for more.
        let reserve = dispatcher.reserve();
        let more = async {
            worker.send(FromWorker::Demand { total: 3 }).await;
        };
        let (permit, ()) = tokio::join!(reserve, more);
        let _goes = permit.unwrap().dispatch(all.next().unwrap());
        worker.offer().await.unwrap();
    });
}

#[test]
fn a_connection_whose_prefix_is_too_long_is_given_back() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let error = dispatcher
            .dispatch(Accepted::from(accepted).with_prefix(vec![0; 2 << 20]))
            .await
            .unwrap_err();
        assert!(matches!(
            error.reason,
            NotDispatched::Unsendable(fdwire::Error::FrameTooLong { .. })
        ));
        error.connection.into_socket().unwrap();
    });
}

#[test]
fn unix_connections_are_served_too() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 5).await;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = async {
            let _client = UnixStream::connect(&path).await.unwrap();
            let offer = worker.offer().await.unwrap();
            assert_eq!(offer.transport, fdwire::handoff::Transport::UnixStream);
            assert_eq!(offer.local, fdwire::handoff::Address::Path(path.clone()));
            worker.adopt(1).await;
            until("the connection is adopted", || dispatcher.stats().adopted == 1).await;
        };
        tokio::select! {
            outcome = dispatcher.serve(listener) => outcome.unwrap(),
            () = client => {}
        }
    });
}

/// The socket is a listener, or is not connected. Without a check, only the worker's application
/// would find out.
#[test]
fn a_socket_that_is_no_connection_is_given_back() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let directory = tempfile::tempdir().unwrap();
        let unix_listener =
            std::os::unix::net::UnixListener::bind(directory.path().join("listener")).unwrap();
        let (family, kind) = (AddressFamily::Inet, SockType::Stream);
        let unconnected = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let sockets: [Accepted; 3] = [
            std::net::TcpStream::from(OwnedFd::from(
                std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
            ))
            .into(),
            std::os::unix::net::UnixStream::from(OwnedFd::from(unix_listener)).into(),
            std::net::TcpStream::from(unconnected).into(),
        ];
        for socket in sockets {
            let refused = dispatcher.dispatch(socket).await.unwrap_err();
            assert!(matches!(refused.reason, NotDispatched::NotConnected), "{refused:?}");
            refused.connection.into_socket().unwrap();
        }
    });
}

#[test]
fn a_client_that_has_gone_before_its_connection_is_handed_over_has_no_address() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (client, accepted) = connections(1).await.pop().unwrap();
        let local = accepted.local_addr().unwrap();
        let reset = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&client.0, sockopt::Linger, &reset).unwrap();
        drop(client);
        until("the client has gone", || accepted.peer_addr().is_err()).await;
        let outcome = dispatcher.dispatch(accepted);
        let offer = worker.offer().await.unwrap();
        worker.adopt(1).await;
        outcome.await.unwrap();
        assert_eq!((offer.peer, offer.local), (Address::Unnamed, local.into()));
    });
}
