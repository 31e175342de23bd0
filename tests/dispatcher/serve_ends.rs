//! The end of `serve`: after a drain, when it is dropped, and with a runtime.

use std::{
    net::SocketAddr,
    os::fd::AsRawFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use fdwire::{
    Socket, SocketKind,
    handoff::{Dispatcher, Incoming, protocol::FromWorker},
};
use futures::{FutureExt, future::join_all};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{
    common::{one_thread, run, run_in, some_threads},
    descriptors::alone,
    raw_worker::{Client, Raw, serve, until},
};

/// Adds a worker in this process, with room for this many connections at a time.
fn worker(dispatcher: &Dispatcher, room: usize) -> Incoming {
    let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
    dispatcher.add_worker(dispatcher_end);
    Incoming::builder().max_connections(room).build(worker_end)
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn a_drain_hands_over_the_clients_in_the_backlog() {
    for runtime in [one_thread, some_threads] {
        run_in(runtime(), async {
            const WAITING: usize = 100; // a listener has room for 128
            let dispatcher = Dispatcher::builder().build();
            let mut incoming = worker(&dispatcher, 1);
            let (listener, address) = listen().await;
            let serving = dispatcher.serve(listener);
            let ending = async {
                // One client takes the only slot, so all others wait in the backlog.
                let _first = TcpStream::connect(address).await.unwrap();
                let first = incoming.next().await.unwrap();
                let mut clients = Vec::new();
                for _ in 0..WAITING {
                    clients.push(TcpStream::connect(address).await.unwrap());
                }
                assert_eq!(dispatcher.stats().dispatched, 1);

                // A drain begins, and all of them are served.
                let mut drain = Box::pin(dispatcher.drain(None));
                assert!(drain.as_mut().now_or_never().is_none());
                drop(first);
                let answering = async {
                    while let Some(mut connection) = incoming.next().await {
                        connection.write_all(b"hello").await.unwrap();
                    }
                };
                let answers = join_all(clients.iter_mut().map(async |client| {
                    let mut answer = String::new();
                    client.read_to_string(&mut answer).await.unwrap();
                    answer
                }));
                let (answers, ..) = tokio::join!(answers, answering, drain);
                assert!(answers.iter().all(|answer| answer == "hello"));
            };
            // Then the listener is closed.
            let (served, ()) = tokio::join!(serving, ending);
            served.unwrap();
            assert!(TcpStream::connect(address).await.is_err());
            let stats = dispatcher.stats();
            assert_eq!((stats.adopted, stats.lost), (WAITING as u64 + 1, 0));
        });
    }
}

/// The clients of the backlog have waited longest, so they come first when a full worker asks for
/// connections again.
#[test]
fn a_drain_hands_over_the_oldest_clients_of_the_backlog_first() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let (listener, address) = listen().await;
        let serving = dispatcher.serve(listener);
        let ending = async {
            let mut clients = vec![Client::connect(address, 0).await];
            let first = worker.offer().await.unwrap();
            for serial in 1..20 {
                clients.push(Client::connect(address, serial).await);
            }
            let mut drain = pin!(dispatcher.drain(None));
            assert!(drain.as_mut().now_or_never().is_none());
            until("all are accepted", || dispatcher.stats().waiting == 19).await;
            worker.send(FromWorker::Demand { total: 20 }).await;
            let mut offers = vec![first];
            offers.extend(worker.offers(19).await);
            let serials = offers.into_iter().map(|offer| serve(offer, "served").unwrap().0);
            assert_eq!(Vec::from_iter(serials), Vec::from_iter(0..20));
            worker.adopt(20).await;
            tokio::join!(drain, worker.leave());
        };
        let (served, ()) = tokio::join!(serving, ending);
        served.unwrap();
    });
}

#[test]
fn the_backlog_does_not_keep_a_drain_from_its_deadline() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut incoming = worker(&dispatcher, 1);
        let (listener, address) = listen().await;
        let serving = dispatcher.serve(listener);
        let ending = async {
            let _first = TcpStream::connect(address).await.unwrap();
            let _busy = incoming.next().await.unwrap();
            let mut waits = TcpStream::connect(address).await.unwrap();
            dispatcher.drain(Some(Duration::from_millis(200))).await;
            assert_eq!(waits.read(&mut [0]).await.unwrap(), 0);
        };
        let (served, ()) = tokio::join!(serving, ending);
        served.unwrap();
        assert_eq!(dispatcher.stats().lost, 1);
    });
}

/// The test has a process of its own. Otherwise a child that another test is starting could have a
/// copy of the listener for a moment.
#[test]
fn the_listener_is_closed_at_once_when_serve_is_dropped() {
    alone("serve_ends::the_listener_is_closed_at_once_when_serve_is_dropped", async {
        for runtime in [one_thread, some_threads] {
            let test = move || run_in(runtime(), serve_again_and_again());
            tokio::task::spawn_blocking(test).await.unwrap();
        }
    });
}

async fn serve_again_and_again() {
    let dispatcher = Dispatcher::builder().build();
    let _worker = worker(&dispatcher, 1000);
    let (mut listener, address) = listen().await;
    for _ in 0..50 {
        let fd = listener.as_raw_fd();
        {
            let mut serving = Box::pin(dispatcher.serve(listener));
            assert!(serving.as_mut().now_or_never().is_none());
            let _client = TcpStream::connect(address).await.unwrap();
        }
        // The port is free at once, and so is the number of the descriptor.
        listener = TcpListener::bind(address).await.unwrap_or_else(|error| panic!("{fd}: {error}"));
    }
}

#[test]
fn accepted_connections_are_handed_over_when_serve_is_dropped() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut incoming = worker(&dispatcher, 10);
        let (listener, address) = listen().await;
        let mut serving = Box::pin(dispatcher.serve(listener));
        assert!(serving.as_mut().now_or_never().is_none());
        let _client = TcpStream::connect(address).await.unwrap();
        let mut next = pin!(incoming.next());
        assert!(next.as_mut().now_or_never().is_none()); // the worker has asked for connections
        until("the connection is accepted", || dispatcher.stats().dispatched == 1).await;
        drop(serving);
        assert!(next.await.is_some());
    });
}

/// `serve` may be called in another runtime than that of the dispatcher, and that runtime may end.
#[test]
fn a_dispatcher_serves_from_any_runtime() {
    let at_home = some_threads();
    let dispatcher = at_home.block_on(async { Dispatcher::builder().build() });
    let mut incoming = at_home.block_on(async { worker(&dispatcher, 10) });
    let elsewhere = one_thread();
    elsewhere.block_on(async {
        let (listener, address) = listen().await;
        let mut serving = Box::pin(dispatcher.serve(listener));
        assert!(serving.as_mut().now_or_never().is_none());
        let _client = TcpStream::connect(address).await.unwrap();
        assert!(incoming.next().await.is_some());
    });
    drop(elsewhere);
    at_home.block_on(async {
        drop(incoming);
        dispatcher.drain(None).await;
    });
}

/// When the runtime ends, so do the dispatcher's accept loops and links.
#[test]
fn a_dispatcher_ends_with_its_runtime() {
    let at_home = some_threads();
    let dispatcher = at_home.block_on(async { Dispatcher::builder().build() });
    let elsewhere = one_thread();
    let mut incoming = elsewhere.block_on(async { worker(&dispatcher, 10) });
    let has_ended = Arc::new(AtomicBool::new(false));
    elsewhere.block_on(async {
        let (listener, _) = listen().await;
        let serving = dispatcher.serve(listener);
        let ending = async {
            sleep(Duration::from_millis(20)).await;
            at_home.shutdown_background();
            has_ended.store(true, SeqCst);
        };
        let (served, ()) = tokio::join!(serving, ending);
        assert!(has_ended.load(SeqCst));
        assert_eq!(served.unwrap_err().kind(), std::io::ErrorKind::Other);
        assert!(incoming.next().await.is_none());
    });
}
