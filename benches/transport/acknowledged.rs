//! The floor of any hand-off that loses no connection: bare calls, and a worker that acknowledges
//! the connections that it receives.
//!
//! The worker answers with one byte for each connection before it serves it. Connections that it
//! received together get their bytes in one call. The front keeps its copy of a connection until it
//! has read the answer, and then closes it. Nothing else is checked.

use std::{
    collections::VecDeque,
    mem,
    os::fd::{AsFd, OwnedFd},
};

use bytes::Bytes;
use futures::future::{FutureExt, LocalBoxFuture};
use tokio::{net::TcpListener, select};

use crate::{
    contenders::{Bare, Link, Received, Setup},
    ends::End,
    handoff::listen,
    http::http_client,
    processes::Helper,
};

/// Accepts, sends, and keeps its copies until they are acknowledged.
struct Front {
    link: Bare,
    metadata: Bytes,
    listener: TcpListener,
    client: Helper,
}

pub(crate) fn front<const WINDOW: usize>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    let (listener, client) = listen(http_client(WINDOW));
    Box::new(Front {
        link: Bare::new(socket, setup),
        metadata: vec![7; setup.load.bytes].into(),
        listener: TcpListener::from_std(listener).expect("the socket can be registered"),
        client,
    })
}

impl End for Front {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, metadata, listener, client } = self;
        let run = async move {
            client.control.send(count as u64);
            let (mut accepted, mut kept) = (0, VecDeque::new());
            let mut answers = Received::default();
            while accepted < count || !kept.is_empty() {
                select! {
                    // Send a copy of the next connection, and keep the connection.
                    connection = listener.accept(), if accepted < count => {
                        let connection =
                            connection.expect("accepting").0.into_std().expect("deregistering");
                        link.send_copy(metadata, connection.as_fd()).await;
                        kept.push_back(connection);
                        accepted += 1;
                    }
                    // Each byte acknowledges the oldest connection that is kept.
                    () = link.recv(&mut answers) => {
                        kept.drain(..mem::take(&mut answers.bytes));
                    }
                }
            }
            client.control.receive_in_runtime().await;
        };
        run.boxed_local()
    }
}
