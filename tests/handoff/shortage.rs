//! A worker that is out of something.

use std::{fs::File, os::fd::OwnedFd};

use fdwire::{
    Socket,
    handoff::{
        Incoming, IncomingEnd,
        protocol::{FromWorker, Offer, RejectReason, ToWorker},
    },
};
use futures::{FutureExt, SinkExt};
use nix::sys::resource::{Resource, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
};

use crate::{
    common::{counted, one_thread, role_socket, run, spawn_role},
    raw_dispatcher::{RawDispatcher, offer_of, pair},
};

#[test]
fn a_worker_asks_for_no_more_than_its_descriptors_allow() {
    const ROLE: &str = "shortage::a_worker_asks_for_no_more_than_its_descriptors_allow";
    if let Some(socket) = role_socket(ROLE) {
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        return run(async {
            let mut incoming = Incoming::new(Socket::try_from(socket).unwrap());
            let ended = incoming.handle().ended();
            while let Some(mut connection) = incoming.next().await {
                tokio::spawn(async move { connection.read(&mut [0]).await });
            }
            assert!(matches!(ended.await, IncomingEnd::Drained));
        });
    }
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut child = spawn_role(ROLE, None, b.into());
        let mut dispatcher = RawDispatcher::greet(a).await;
        let mut clients = Vec::new();
        loop {
            // No more demand than this comes: the last pong has been sent after all answers.
            for _ in clients.len() as u64..dispatcher.demand {
                clients.push(dispatcher.offer().await.0);
                dispatcher.expect_adopted(1).await;
            }
            dispatcher.settle().await;
            if dispatcher.demand > 0 && dispatcher.demand == clients.len() as u64 {
                break;
            }
        }
        let served = clients.len();
        assert!((30..60).contains(&served), "{served} connections with 64 descriptors");
        clients.clear();
        dispatcher.expect_finished(served as u64).await;
        let (mut client, copy) = loop {
            if dispatcher.demand > served as u64 {
                break dispatcher.offer().await;
            }
            dispatcher.settle().await;
        };
        drop(copy);
        dispatcher.expect_adopted(1).await;
        dispatcher.send(ToWorker::Drain { within: None }).await;
        dispatcher.expect(FromWorker::Draining).await;
        client.shutdown().await.unwrap();
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(child.wait().unwrap().success());
    });
}

/// Serves one connection, for which it opens files until it can open no more, and keeps them as
/// long as the connection.
async fn greedy_application(mut incoming: Incoming) {
    let ended = incoming.handle().ended();
    let mut first = incoming.next().await.unwrap();
    let files = Vec::from_iter(std::iter::from_fn(|| File::open("/dev/null").ok()));
    assert!(!files.is_empty());
    assert!(incoming.next().now_or_never().is_none()); // asks for more
    first.write_all(b"full").await.unwrap();
    assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
    drop((first, files));
    while let Some(mut connection) = incoming.next().await {
        connection.write_all(b"hello").await.unwrap();
    }
    assert!(matches!(ended.await, IncomingEnd::Drained));
}

async fn heard(client: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut heard = vec![0; count];
    client.read_exact(&mut heard).await.unwrap();
    heard
}

/// The descriptors that it had promised were free when it asked. What goes missing is known, and
/// goes back.
///
/// Rules: W-CTRUNC.
#[test]
fn offers_for_which_the_application_has_left_no_descriptors_go_back() {
    const ROLE: &str = "shortage::offers_for_which_the_application_has_left_no_descriptors_go_back";
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(async {
            setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
            greedy_application(Incoming::new(Socket::try_from(socket).unwrap())).await;
        });
    }
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut child = spawn_role(ROLE, None, b.into());
        let mut dispatcher = RawDispatcher::greet(a).await;
        let (mut first, _) = dispatcher.offer().await;
        dispatcher.expect_adopted(1).await;
        assert_eq!(heard(&mut first, 4).await, b"full");

        // All at once, so that one receive has several, and loses all of them.
        let mut lost = Vec::new();
        for _ in 0..5 {
            let (client, copy) = dispatcher.accept().await;
            let message = dispatcher.number(offer_of(&copy));
            dispatcher.framed.feed(message).await.unwrap();
            lost.push((client, copy));
        }
        dispatcher.framed.flush().await.unwrap();
        dispatcher.expect_rejected_in_parts(5, RejectReason::Full).await;
        for (client, _) in &mut lost {
            assert!(
                client.read(&mut [0]).now_or_never().is_none(),
                "the connection as such is left alone"
            );
        }

        // The worker serves again as soon as it can.
        drop(first);
        dispatcher.demand = 0; // void by the refusal
        while dispatcher.demand == 0 || dispatcher.finished == 0 {
            dispatcher.settle().await;
        }
        let (mut client, _copy) = dispatcher.offer().await;
        assert_eq!(heard(&mut client, 5).await, b"hello");
        dispatcher.expect_adopted(1).await;
        dispatcher.send(ToWorker::Drain { within: None }).await;
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(child.wait().unwrap().success());
    });
}

/// Otherwise a thread of the worker's runtime would wait for its client.
#[test]
fn a_blocking_connection_is_rejected_and_left_alone() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        assert!(incoming.next().now_or_never().is_none());
        let (mut client, copy) = dispatcher.accept().await;
        copy.set_nonblocking(false).unwrap();
        dispatcher.send_offer(Offer { metadata: "blocking".into(), ..offer_of(&copy) }).await;
        dispatcher.expect_rejected(1, RejectReason::Unusable).await;
        assert!(client.read(&mut [0]).now_or_never().is_none());
    });
}

/// A waiting connection is taken out of an event loop that is going away.
#[test]
fn a_runtime_may_end_while_offers_wait() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let socket = OwnedFd::from(b);
        let (end, ended) = oneshot::channel();
        let worker = std::thread::spawn(move || {
            let runtime = one_thread();
            let mut incoming =
                runtime.block_on(async { Incoming::new(socket.try_into().unwrap()) });
            runtime.block_on(async {
                assert!(incoming.next().now_or_never().is_none());
                ended.await.unwrap();
            });
            drop(runtime);
            assert!(incoming.next().now_or_never().is_some_and(|connection| connection.is_none()));
        });
        let mut dispatcher = RawDispatcher::greet(a).await;
        let mut offers = [dispatcher.offer().await, dispatcher.offer().await];
        dispatcher.settle().await;
        end.send(()).unwrap();
        worker.join().unwrap();
        assert_eq!(dispatcher.answer().await, None);
        for (client, _copy) in &mut offers {
            assert!(client.read(&mut [0]).now_or_never().is_none());
        }
    });
}
