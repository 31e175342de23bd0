//! Connections that the application prepares before they are handed over.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use fdwire::{
    Socket, SocketKind,
    handoff::{Accepted, Connection, Dispatcher, Incoming, Strategy},
};
use futures::{FutureExt, future::pending};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

use crate::{common::run, raw_worker::until};

/// A worker in this process, which asks for connections all the time until it is dropped.
struct Worker(mpsc::UnboundedReceiver<Connection>);

impl Worker {
    fn start(dispatcher: &Dispatcher) -> Self {
        let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
        dispatcher.add_worker(dispatcher_end);
        let (connections, served) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut incoming = Incoming::new(worker_end);
            while let Some(connection) = incoming.next().await {
                if connections.send(connection).is_err() {
                    break;
                }
            }
        });
        Self(served)
    }

    async fn next(&mut self) -> Connection {
        self.0.recv().await.expect("the worker's link has not ended")
    }
}

async fn listen() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Connects a client and sends these bytes.
async fn client(address: std::net::SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(bytes).await.unwrap();
    client
}

/// Waits for the first byte, and leaves it in the socket.
async fn first_byte(stream: &TcpStream) -> Option<u8> {
    let mut first = [0];
    (stream.peek(&mut first).await.ok()? == 1).then_some(first[0])
}

async fn by_first_byte(stream: TcpStream) -> Option<Accepted> {
    let first = first_byte(&stream).await?;
    Some(Accepted::from(stream).key([first]))
}

#[test]
fn connections_are_routed_by_their_first_bytes_which_the_worker_still_reads() {
    run(async {
        // Three workers report the first bytes of each connection.
        let dispatcher = Dispatcher::builder().strategy(Strategy::ByKey).build();
        let (report, mut served) = mpsc::unbounded_channel();
        for number in 0..3 {
            let (mut worker, report) = (Worker::start(&dispatcher), report.clone());
            tokio::spawn(async move {
                loop {
                    let mut connection = worker.next().await;
                    let mut read = [0; 2];
                    connection.read_exact(&mut read).await.unwrap();
                    report.send((number, read)).unwrap();
                }
            });
        }
        let (listener, address) = listen().await;
        // Connections with the same first byte go to the same worker.
        let serving = dispatcher.serve_with(listener, by_first_byte);
        let routing = async {
            let mut workers = HashMap::new();
            for round in 0..5 {
                for route in 0..20 {
                    let _client = client(address, &[route, round]).await;
                    let (worker, read) = served.recv().await.unwrap();
                    assert_eq!(read, [route, round]);
                    assert_eq!(*workers.entry(route).or_insert(worker), worker);
                }
            }
            assert!(workers.values().any(|worker| *worker != workers[&0]));
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = routing => {}
        }
    });
}

#[test]
fn options_bytes_that_were_read_and_metadata_reach_the_worker() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        let serving = dispatcher.serve_with(listener, async |mut stream: TcpStream| {
            stream.set_nodelay(true).ok()?;
            let mut head = [0; 3];
            stream.read_exact(&mut head).await.ok()?;
            Some(Accepted::from(stream).with_prefix(head.to_vec()).metadata("tenant 7"))
        });
        let checking = async {
            let _client = client(address, b"GET /").await;
            let mut connection = worker.next().await;
            assert_eq!(connection.metadata(), "tenant 7");
            assert!(getsockopt(&connection, sockopt::TcpNoDelay).unwrap());
            let mut read = [0; 5];
            connection.read_exact(&mut read).await.unwrap();
            assert_eq!(&read, b"GET /");
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

#[test]
fn unix_connections_are_prepared_too() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Worker::start(&dispatcher);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("front");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = dispatcher.serve_with(listener, async |stream: UnixStream| {
            Some(Accepted::from(stream).metadata("unix"))
        });
        let checking = async {
            let _client = UnixStream::connect(&path).await.unwrap();
            assert_eq!(worker.next().await.metadata(), "unix");
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

#[test]
fn peers_that_send_nothing_hold_up_no_others_and_are_ended_in_time() {
    run(async {
        let dispatcher = Dispatcher::builder().prepare_timeout(Duration::from_secs(2)).build();
        let mut worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        let serving = dispatcher.serve_with(listener, by_first_byte);
        let checking = async {
            let mut silent = Vec::new();
            for _ in 0..100 {
                silent.push(client(address, b"").await);
            }
            for _ in 0..10 {
                let _client = client(address, b"a").await;
                worker.next().await;
            }
            for mut client in silent {
                assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
            }
            until("all are counted", || dispatcher.stats().lost == 100).await;
            until("all others are adopted", || dispatcher.stats().adopted == 10).await;
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

#[test]
fn no_more_connections_are_prepared_at_a_time_than_max_preparing() {
    run(async {
        let dispatcher = Dispatcher::builder().max_preparing(2).build();
        let mut worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        // The function that prepares counts how many connections are prepared at a time.
        let (begun, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let serving = dispatcher.serve_with(listener, {
            let (begun, at_once) = (Arc::clone(&begun), Arc::clone(&at_once));
            move |stream: TcpStream| {
                let (begun, at_once) = (Arc::clone(&begun), Arc::clone(&at_once));
                async move {
                    begun.fetch_add(1, SeqCst);
                    assert!(at_once.fetch_add(1, SeqCst) < 2);
                    first_byte(&stream).await?;
                    at_once.fetch_sub(1, SeqCst);
                    Some(stream.into())
                }
            }
        });
        let checking = async {
            // Six clients connect, and send their first byte one after the other.
            let mut clients = Vec::new();
            for _ in 0..6 {
                clients.push(client(address, b"").await);
            }
            for (index, mut client) in clients.into_iter().enumerate() {
                until("the next ones are prepared", || begun.load(SeqCst) >= (index + 2).min(6))
                    .await;
                client.write_all(b"a").await.unwrap();
                worker.next().await;
            }
            assert_eq!(dispatcher.stats().lost, 0);
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

/// The first connection makes the function panic, and the second one its future.
#[test]
fn a_panic_while_a_connection_is_prepared_ends_only_that_connection() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        let calls = AtomicUsize::new(0);
        let serving = dispatcher.serve_with(listener, move |stream: TcpStream| {
            let call = calls.fetch_add(1, SeqCst);
            assert_ne!(call, 0, "as tested");
            async move {
                assert_ne!(call, 1, "as tested");
                Some(stream.into())
            }
        });
        let checking = async {
            for _ in 0..2 {
                let mut client = client(address, b"").await;
                assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
            }
            let _client = client(address, b"").await;
            worker.next().await;
            until("the connection is adopted", || dispatcher.stats().adopted == 1).await;
            assert_eq!(dispatcher.stats().lost, 2);
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

#[test]
fn a_connection_that_the_application_declines_is_not_handed_over() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        let serving = dispatcher.serve_with(listener, async |mut stream: TcpStream| {
            if first_byte(&stream).await? == b'x' {
                stream.write_all(b"no").await.ok()?;
                return None;
            }
            Some(stream.into())
        });
        let checking = async {
            let mut unwanted = client(address, b"x").await;
            let mut answer = [0; 2];
            unwanted.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"no");
            let _client = client(address, b"a").await;
            worker.next().await;
            let stats = dispatcher.stats();
            assert_eq!((stats.dispatched, stats.lost), (1, 0));
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

/// The connections have been accepted, so they are not lost when `serve_with` is dropped, or when
/// the dispatcher drains.
#[test]
fn connections_that_are_being_prepared_when_serving_ends_are_handed_over() {
    for drains in [false, true] {
        run(async {
            // A connection is being prepared.
            let dispatcher = Dispatcher::builder().build();
            let mut worker = Worker::start(&dispatcher);
            let (listener, address) = listen().await;
            let (begin, mut begun) = mpsc::unbounded_channel();
            let serving = tokio::spawn({
                let dispatcher = dispatcher.clone();
                async move {
                    let prepare = move |stream: TcpStream| {
                        begin.send(()).unwrap();
                        by_first_byte(stream)
                    };
                    dispatcher.serve_with(listener, prepare).await
                }
            });
            let mut client = client(address, b"").await;
            begun.recv().await.unwrap();
            // Serving ends. A drain begins before it, or only after it.
            let mut drain = Box::pin(dispatcher.drain(None));
            if drains {
                assert!(drain.as_mut().now_or_never().is_none());
                serving.await.unwrap().unwrap();
            } else {
                serving.abort();
                assert!(serving.await.unwrap_err().is_cancelled());
            }
            // Then the client sends its first byte, and the connection is handed over.
            client.write_all(b"a").await.unwrap();
            drop(worker.next().await);
            assert_eq!(dispatcher.stats().lost, 0);
            drop(worker);
            drain.await;
        });
    }
}

/// However long the preparation may take, a drain does not wait for it beyond its own limit.
#[test]
fn a_connection_that_is_never_prepared_is_given_up_at_the_end_of_a_drain() {
    run(async {
        let dispatcher = Dispatcher::builder().prepare_timeout(Duration::from_secs(3600)).build();
        let _worker = Worker::start(&dispatcher);
        let (listener, address) = listen().await;
        let (begin, begun) = oneshot::channel();
        let begin = std::sync::Mutex::new(Some(begin));
        let serving = dispatcher.serve_with(listener, move |stream: TcpStream| {
            begin.lock().unwrap().take().unwrap().send(()).unwrap();
            async move {
                let () = pending().await;
                Some(stream.into())
            }
        });
        let ending = async {
            let _client = client(address, b"").await;
            begun.await.unwrap();
            dispatcher.drain(Some(Duration::from_millis(200))).await;
        };
        let (served, ()) = tokio::join!(serving, ending);
        served.unwrap();
    });
}
