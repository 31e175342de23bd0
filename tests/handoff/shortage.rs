//! Workers that run out of descriptors, get unusable offers, or lose their runtime.

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
    // The worker's process, which holds each connection until its client sends something.
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
        // The dispatcher offers as many connections as the worker asks for.
        let (a, b) = Socket::pair(kind).unwrap();
        let mut child = spawn_role(ROLE, None, b.into());
        let mut dispatcher = RawDispatcher::greet(a).await;
        let mut clients = Vec::new();
        loop {
            for _ in clients.len() as u64..dispatcher.demand {
                clients.push(dispatcher.offer().await.0);
                dispatcher.expect_adopted(1).await;
            }
            // No more demand comes if all of it was met when the worker answered this ping.
            dispatcher.settle().await;
            if dispatcher.demand > 0 && dispatcher.demand == clients.len() as u64 {
                break;
            }
        }
        let served = clients.len();
        assert!((30..60).contains(&served), "{served} connections with 64 descriptors");
        // When they have ended, the worker asks for more.
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
        // The worker drains, and its process ends.
        dispatcher.send(ToWorker::Drain { within: None }).await;
        dispatcher.expect(FromWorker::Draining).await;
        client.shutdown().await.unwrap();
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(child.wait().unwrap().success());
    });
}

/// Serves one connection, and opens as many files as possible while that is open. Then it serves
/// others.
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

async fn receive(client: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// When the worker asked for offers, it had descriptors for them. It rejects those whose
/// descriptors the kernel has lost.
///
/// Rules: W-CTRUNC.
#[test]
fn offers_for_which_the_application_has_left_no_descriptors_are_rejected() {
    const ROLE: &str =
        "shortage::offers_for_which_the_application_has_left_no_descriptors_are_rejected";
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(async {
            setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
            greedy_application(Incoming::new(Socket::try_from(socket).unwrap())).await;
        });
    }
    counted(async |kind| {
        // The worker's application has used up all descriptors.
        let (a, b) = Socket::pair(kind).unwrap();
        let mut child = spawn_role(ROLE, None, b.into());
        let mut dispatcher = RawDispatcher::greet(a).await;
        let (mut first, _) = dispatcher.offer().await;
        dispatcher.expect_adopted(1).await;
        assert_eq!(receive(&mut first, 4).await, b"full");

        // Several offers come at once, so one receive loses all their descriptors. The worker
        // rejects them.
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
                "a connection was ended or used"
            );
        }

        // When there are descriptors again, the worker asks for offers, and serves.
        drop(first);
        dispatcher.demand = 0; // the rejection has cancelled the demand
        while dispatcher.demand == 0 || dispatcher.finished == 0 {
            dispatcher.settle().await;
        }
        let (mut client, _copy) = dispatcher.offer().await;
        assert_eq!(receive(&mut client, 5).await, b"hello");
        dispatcher.expect_adopted(1).await;
        dispatcher.send(ToWorker::Drain { within: None }).await;
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(child.wait().unwrap().success());
    });
}

/// If the worker adopted it, a thread of its runtime would wait for the client.
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

/// The runtime of a worker ends while offers wait. Their connections are left as they were.
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
