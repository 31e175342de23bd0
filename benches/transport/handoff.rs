//! Connections that one process accepts and another one answers.
//!
//! There are three processes: a client, the one that measures and accepts, and a worker. The client
//! keeps several connections open. On each it sends a request (if there is one), reads to the end,
//! and checks the answer. The client's CPU time is not counted.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    net::{self, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
};

use bytes::Bytes;
use futures::future::{FutureExt, LocalBoxFuture};
use nix::{
    libc::linger,
    sys::socket::{setsockopt, sockopt},
};
use tokio::net::TcpListener;

use crate::{
    contenders::{Link, Load, Received, Setup},
    ends::End,
    processes::{Control, Helper},
};

/// The bytes at the end of the answer to a client.
pub(crate) const ANSWER: &[u8] = b"hello";

/// The behaviour of a client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClientLoad {
    /// The number of connections that it keeps open.
    pub(crate) window: usize,
    /// The bytes that it sends first on each connection.
    pub(crate) request: &'static str,
}

fn answer(connection: OwnedFd) {
    net::TcpStream::from(connection).write_all(ANSWER).expect("the client is there");
}

/// Accepts connections and sends them to the worker. Connections that were accepted together are
/// sent together.
struct Front<L> {
    link: L,
    load: Load,
    metadata: Bytes,
    listener: TcpListener,
    client: Helper,
}

pub(crate) fn front<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    front_for::<L>(socket, setup, ClientLoad { window: 64, request: "" })
}

pub(crate) fn front_for<L: Link>(socket: OwnedFd, setup: Setup, load: ClientLoad) -> Box<dyn End> {
    let (listener, client) = listen(load);
    Box::new(Front {
        link: L::new(socket, setup),
        load: setup.load,
        metadata: vec![7; setup.load.bytes].into(),
        listener: TcpListener::from_std(listener).expect("the socket can be registered"),
        client,
    })
}

/// Makes a listener, and starts a client that connects to it. The client begins when it receives
/// the number of connections to make.
pub(crate) fn listen(load: ClientLoad) -> (net::TcpListener, Helper) {
    let listener = net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.set_nonblocking(true).expect("it is a socket");
    let address = listener.local_addr().expect("it is bound");
    (listener, Helper::client(address, load))
}

impl<L: Link> End for Front<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, load, metadata, listener, client } = self;
        let run = async move {
            client.control.send(count as u64);
            let mut accepted = 0;
            while accepted < count {
                // Wait for one connection, and take those that are there too, up to a batch.
                let mut next = Some(listener.accept().await);
                let mut batch = 0;
                while let Some(connection) = next {
                    let connection =
                        connection.expect("accepting").0.into_std().expect("deregistering");
                    link.send_socket(metadata, connection.into()).await;
                    (accepted, batch) = (accepted + 1, batch + 1);
                    let more = batch < load.batch && accepted < count;
                    next = if more { listener.accept().now_or_never() } else { None };
                }
                link.flush().await;
            }
            client.control.receive_in_runtime().await;
        };
        run.boxed_local()
    }
}

/// Answers the connections that it receives.
struct Worker<L> {
    link: L,
    load: Load,
}

pub(crate) fn worker<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    Box::new(Worker { link: L::new(socket, setup), load: setup.load })
}

impl<L: Link> End for Worker<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, load } = self;
        let run = async move {
            let (mut received, mut answered) = (Received::default(), 0);
            while answered < count || received.bytes < count * load.bytes {
                link.recv(&mut received).await;
                answered += received.fds.len();
                received.fds.drain(..).for_each(answer);
            }
            assert_eq!((received.bytes, answered), (count * load.bytes, count));
        };
        run.boxed_local()
    }
}

/// No hand-over: the process that accepts also answers.
pub(crate) struct InOneProcess;

impl Link for InOneProcess {
    fn new(_: OwnedFd, _: Setup) -> Self {
        Self
    }

    async fn send(&mut self, _: &Bytes, connection: Option<OwnedFd>) {
        connection.into_iter().for_each(answer);
    }

    async fn flush(&mut self) {}

    async fn recv(&mut self, _: &mut Received) {
        unreachable!("there is no worker");
    }
}

/// Runs the client's process.
pub(crate) fn run_client(address: SocketAddr, window: usize, request: &str, mut control: Control) {
    let connect = || {
        let mut connection = net::TcpStream::connect(address).expect("the front listens");
        // No connection is left in TIME_WAIT, or there would be no free ports after a while.
        setsockopt(&connection, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })
            .expect("it is a socket");
        connection.write_all(request.as_bytes()).expect("the front or the worker reads");
        connection
    };
    while let Some(count) = control.receive() {
        let mut open = VecDeque::with_capacity(window);
        let mut left = count;
        while left > 0 || !open.is_empty() {
            while left > 0 && open.len() < window {
                open.push_back(connect());
                left -= 1;
            }
            // The answer ends with the connection. A new one takes its place.
            if let Some(mut oldest) = open.pop_front() {
                let mut got = Vec::with_capacity(256);
                oldest.read_to_end(&mut got).expect("an answer");
                assert!(got.ends_with(ANSWER), "{}", got.escape_ascii());
            }
        }
        control.send(count);
    }
}
