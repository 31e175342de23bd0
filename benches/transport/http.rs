//! A whole HTTP server, one request for each connection: in the process that accepts, behind this
//! crate's hand-off layer, and behind bare calls.

use std::{convert::Infallible, net, os::fd::OwnedFd};

use bytes::Bytes;
use fdwire::{
    Socket,
    handoff::{Dispatcher, Incoming},
};
use futures::future::{FutureExt, LocalBoxFuture};
use http_body_util::Full;
use hyper::{Response, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    select,
    task::JoinSet,
};

use crate::{
    contenders::{Link, Load, Received, Setup},
    ends::End,
    handoff::{ANSWER, ClientLoad, front_for, listen},
    processes::Helper,
};

/// Returns a client that sends one request on each connection.
pub(crate) fn http_client(window: usize) -> ClientLoad {
    ClientLoad { window, request: "GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n" }
}

/// Serves one connection: the same server for all contenders.
pub(crate) async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let answer =
        async |_| Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER))));
    let served =
        http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
    served.expect("a request and its answer");
}

/// Accepts and serves in the same process.
struct OneProcess {
    listener: TcpListener,
    client: Helper,
}

pub(crate) fn one_process<const WINDOW: usize>(_: OwnedFd, _: Setup) -> Box<dyn End> {
    let (listener, client) = listen(http_client(WINDOW));
    Box::new(OneProcess {
        listener: TcpListener::from_std(listener).expect("the socket can be registered"),
        client,
    })
}

impl End for OneProcess {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { listener, client } = self;
        let run = async move {
            client.control.send(count as u64);
            let mut serving = JoinSet::new();
            for _ in 0..count {
                serving.spawn(serve(listener.accept().await.expect("accepting").0));
            }
            serving.join_all().await;
            client.control.receive_in_runtime().await;
        };
        run.boxed_local()
    }
}

/// Accepts and hands over with the hand-off layer, which promises that no connection is lost.
struct Front {
    dispatcher: Dispatcher,
    listener: net::TcpListener,
    client: Helper,
}

pub(crate) fn dispatcher<const WINDOW: usize>(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    let dispatcher = Dispatcher::new();
    dispatcher.add_worker(Socket::try_from(socket).expect("a connected Unix socket"));
    let (listener, client) = listen(http_client(WINDOW));
    Box::new(Front { dispatcher, listener, client })
}

impl End for Front {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { dispatcher, listener, client } = self;
        let run = async move {
            client.control.send(count as u64);
            let listener = listener.try_clone().expect("a descriptor is free");
            select! {
                ended = dispatcher.serve(listener) => {
                    panic!("the dispatcher has ended by itself: {ended:?}")
                }
                _ = client.control.receive_in_runtime() => {}
            }
        };
        run.boxed_local()
    }
}

/// Serves the connections that the hand-off layer brings.
struct Worker {
    incoming: Incoming,
    /// The most connections taken at a time.
    batch: usize,
}

pub(crate) fn incoming<const BATCH: usize>(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(Worker { incoming: take_connections(socket), batch: BATCH })
}

fn take_connections(socket: OwnedFd) -> Incoming {
    Incoming::new(Socket::try_from(socket).expect("a connected Unix socket"))
}

async fn serve_incoming(incoming: &mut Incoming, count: usize, batch: usize) {
    let (mut serving, mut left) = (JoinSet::new(), count);
    while left > 0 {
        // Take the connections that are there, up to a batch, and serve each in a task.
        let connections =
            incoming.next_batch(left.min(batch)).await.expect("the dispatcher is there");
        left -= connections.len();
        connections.into_iter().for_each(|connection| drop(serving.spawn(serve(connection))));
    }
    serving.join_all().await;
}

impl End for Worker {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        serve_incoming(&mut self.incoming, count, self.batch).boxed_local()
    }
}

/// The same worker in a spawned task, which has the `Incoming` while it runs.
struct WorkerInTask(Option<Incoming>);

pub(crate) fn incoming_in_task(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(WorkerInTask(Some(take_connections(socket))))
}

impl End for WorkerInTask {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let mut incoming = self.0.take().expect("no run is under way");
        let serving = tokio::spawn(async move {
            serve_incoming(&mut incoming, count, 1).await;
            incoming
        });
        async { self.0 = Some(serving.await.expect("no panic")) }.boxed_local()
    }
}

/// Accepts, and sends each connection with one `sendmsg`. It promises nothing: a connection is lost
/// if the worker dies before it has served it.
pub(crate) fn front<L: Link, const WINDOW: usize>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    front_for::<L>(socket, setup, http_client(WINDOW))
}

/// Serves the connections that it receives with bare calls.
struct BareWorker<L> {
    link: L,
    load: Load,
    /// Whether it acknowledges connections, with one byte for each, before it serves them.
    acknowledges: bool,
}

pub(crate) fn worker<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    Box::new(BareWorker { link: L::new(socket, setup), load: setup.load, acknowledges: false })
}

pub(crate) fn acknowledging<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    Box::new(BareWorker { link: L::new(socket, setup), load: setup.load, acknowledges: true })
}

impl<L: Link> End for BareWorker<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, load, acknowledges } = self;
        let run = async move {
            let answer = Bytes::from_static(&[7]);
            let (mut serving, mut received, mut served) = (JoinSet::new(), Received::default(), 0);
            while served < count || received.bytes < count * load.bytes {
                link.recv(&mut received).await;
                // One call acknowledges everything that has arrived by now.
                if *acknowledges {
                    while link.recv(&mut received).now_or_never().is_some() {}
                    for _ in &received.fds {
                        link.send(&answer, None).await;
                    }
                    link.flush().await;
                }
                // Serve each connection in a task.
                served += received.fds.len();
                for connection in received.fds.drain(..) {
                    let connection = net::TcpStream::from(connection);
                    connection.set_nonblocking(true).expect("it is a socket");
                    serving.spawn(serve(
                        TcpStream::from_std(connection).expect("the socket can be registered"),
                    ));
                }
            }
            serving.join_all().await;
        };
        run.boxed_local()
    }
}
