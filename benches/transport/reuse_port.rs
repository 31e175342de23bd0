//! The same HTTP server without a hand-off: two processes listen at one address (`SO_REUSEPORT`,
//! socket(7)), and the kernel gives each connection to one of them. Connections that wait in the
//! queue of a process are lost if it dies, unless `net.ipv4.tcp_migrate_req` is set.

use std::{
    io::Write,
    net::SocketAddr,
    os::{fd::OwnedFd, unix},
    sync::Arc,
};

use futures::future::{FutureExt, LocalBoxFuture};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, UnixStream},
    select,
    sync::oneshot,
    task::JoinSet,
};

use crate::{
    contenders::Setup,
    ends::End,
    http::{http_client, serve},
    processes::Helper,
};

const BACKLOG: u32 = 1024;

fn listen(address: SocketAddr) -> TcpListener {
    let socket = TcpSocket::new_v4().expect("a descriptor is free");
    socket.set_reuseport(true).expect("Linux has the option");
    socket.bind(address).expect("nobody else uses the port");
    socket.listen(BACKLOG).expect("it is bound")
}

fn register(socket: unix::net::UnixStream) -> UnixStream {
    UnixStream::from_std(socket).expect("the socket can be registered")
}

/// Accepts and serves until `end` is ready, and finishes the connections that it has accepted.
async fn serve_until(listener: &TcpListener, end: impl Future) {
    let mut end = std::pin::pin!(end);
    let mut serving = JoinSet::new();
    loop {
        select! {
            accepted = listener.accept() => {
                serving.spawn(serve(accepted.expect("accepting").0));
            }
            _ = &mut end => break,
        }
    }
    serving.join_all().await;
}

/// The same, in a spawned task if `in_task` is true.
async fn serve_in(in_task: bool, listener: &Arc<TcpListener>, end: impl Future) {
    if !in_task {
        return serve_until(listener, end).await;
    }
    let listener = Arc::clone(listener);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move { serve_until(&listener, stopped).await });
    end.await;
    drop(stop);
    serving.await.expect("no panic");
}

/// The process that starts the client, and notifies the other process when the client is done.
struct Near {
    listener: Arc<TcpListener>,
    in_task: bool,
    peer: UnixStream,
    client: Helper,
}

pub(crate) fn near<const WINDOW: usize>(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(make_near(socket, WINDOW, false))
}

pub(crate) fn near_in_task<const WINDOW: usize>(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(make_near(socket, WINDOW, true))
}

fn make_near(socket: OwnedFd, window: usize, in_task: bool) -> Near {
    let listener = listen(([127, 0, 0, 1], 0).into());
    let address = listener.local_addr().expect("it is bound");
    let mut peer = unix::net::UnixStream::from(socket);
    peer.write_all(&address.port().to_ne_bytes()).expect("the other process is there");
    let peer = register(peer);
    Near {
        listener: Arc::new(listener),
        in_task,
        peer,
        client: Helper::client(address, http_client(window)),
    }
}

impl End for Near {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { listener, in_task, peer, client } = self;
        let run = async move {
            client.control.send(count as u64);
            serve_in(*in_task, listener, client.control.receive_in_runtime()).await;
            peer.write_all(b"e").await.expect("the other process is there");
        };
        run.boxed_local()
    }
}

/// The other process.
struct Far {
    /// `None` until the first run has read the port.
    listener: Option<Arc<TcpListener>>,
    in_task: bool,
    peer: UnixStream,
}

pub(crate) fn far(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(Far { listener: None, in_task: false, peer: register(socket.into()) })
}

pub(crate) fn far_in_task(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(Far { listener: None, in_task: true, peer: register(socket.into()) })
}

impl End for Far {
    fn run(&mut self, _: usize) -> LocalBoxFuture<'_, ()> {
        let Self { listener, in_task, peer } = self;
        let run = async move {
            if listener.is_none() {
                let mut port = [0; 2];
                peer.read_exact(&mut port).await.expect("the other process is there");
                *listener =
                    Some(Arc::new(listen(([127, 0, 0, 1], u16::from_ne_bytes(port)).into())));
            }
            let listener = listener.as_ref().expect("made above");
            serve_in(*in_task, listener, peer.read_exact(&mut [0])).await;
        };
        run.boxed_local()
    }
}
