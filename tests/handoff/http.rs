//! Real requests: axum and hyper serve connections that are handed over.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, pin::pin};

use fdwire::{
    SocketKind,
    handoff::{
        Connection, Incoming, IncomingEnd, IncomingHandle,
        protocol::{FromWorker, ToWorker},
    },
};
use futures::{FutureExt, SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{
    Request, Response, body::Bytes, client::conn::http1::SendRequest, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    select,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{
    common::counted,
    raw_dispatcher::{offer_of, pair},
};

/// Starts a front that hands all its connections to one worker. Returns its address, the worker,
/// and a channel that makes the front send a DRAIN. The front's task ends with the worker's
/// GOODBYE, and returns how many connections the worker has adopted.
async fn front(kind: SocketKind) -> (SocketAddr, Incoming, oneshot::Sender<()>, JoinHandle<u64>) {
    // The front listens, and the returned channel has its end in the front's task.
    let (mut dispatcher, incoming) = pair(kind, Incoming::builder()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (drain, draining) = oneshot::channel();
    let mut draining = draining.into_stream();
    let front = tokio::spawn(async move {
        // A connection is accepted only for an offer that the worker has asked for. The front keeps
        // its own copy until the worker has adopted the connection.
        let mut unanswered = VecDeque::new();
        let (mut demand, mut offered, mut adopted) = (0, 0, 0);
        loop {
            select! {
                Ok((stream, _)) = listener.accept(), if offered < demand => {
                    let stream = stream.into_std().unwrap();
                    let offer = dispatcher.number(offer_of(&stream));
                    dispatcher.framed.send(offer).await.unwrap();
                    unanswered.push_back(stream);
                    offered += 1;
                }
                Some(message) = dispatcher.framed.next() => match message.unwrap() {
                    FromWorker::Demand { total } => demand = total,
                    FromWorker::Adopted { count, .. } => {
                        drop(unanswered.drain(..count as usize));
                        adopted += u64::from(count);
                    }
                    FromWorker::Goodbye => return adopted,
                    _ => {}
                },
                Some(Ok(())) = draining.next() => {
                    dispatcher.send(ToWorker::Drain { within: None }).await
                }
            }
        }
    });
    (address, incoming, drain, front)
}

async fn client(address: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Sends a request. Returns the answer, and whether the connection ends with it.
async fn get(client: &mut SendRequest<Empty<Bytes>>, path: &str) -> (String, bool) {
    client.ready().await.unwrap();
    let request = Request::get(path).header("host", "x").body(Empty::new()).unwrap();
    let response = client.send_request(request).await.unwrap();
    let last = response.headers().get("connection").is_some_and(|value| value == "close");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (String::from_utf8(body.to_vec()).unwrap(), last)
}

#[cfg(feature = "axum")]
#[test]
fn axum_serves_handed_over_connections_and_drains() {
    use axum::{Router, extract::ConnectInfo, routing};
    use fdwire::handoff::Address;

    counted(async |kind| {
        // axum serves the worker's connections.
        let (address, incoming, drain, front) = front(kind).await;
        let handle = incoming.handle();
        let answer =
            |ConnectInfo(peer): ConnectInfo<Address>| async move { format!("you are {peer}") };
        let app = Router::new().route("/", routing::get(answer));
        let app = app.into_make_service_with_connect_info::<Address>();
        let requested = handle.drain_requested();
        let server = tokio::spawn(async {
            axum::serve(incoming, app).with_graceful_shutdown(requested).await.unwrap()
        });

        // Clients get answers, with their own addresses.
        for _ in 0..20 {
            let (answer, last) = get(&mut client(address).await, "/").await;
            assert!(answer.starts_with("you are 127.0.0.1:") && !last, "{answer}");
        }
        let mut kept_alive = client(address).await;
        get(&mut kept_alive, "/").await;
        get(&mut kept_alive, "/").await;
        // A drain ends the server, and the idle connection that was kept alive.
        drain.send(()).unwrap();
        handle.drain_requested().await;
        server.await.unwrap();
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        assert_eq!(front.await.unwrap(), 21);
    });
}

#[test]
fn hyper_ends_kept_alive_connections_with_their_next_answer_when_it_drains() {
    counted(async |kind| {
        let (address, mut incoming, drain, front) = front(kind).await;
        let handle = incoming.handle();
        let (received, mut receiving) = mpsc::channel(1);
        let server = {
            let handle = handle.clone();
            tokio::spawn(async move {
                while let Some(connection) = incoming.next().await {
                    tokio::spawn(serve(connection, handle.clone(), received.clone()));
                }
            })
        };
        let mut kept_alive = client(address).await;
        assert_eq!(get(&mut kept_alive, "/").await, ("hello".to_owned(), false));

        // The drain begins while a request is being answered.
        let ((answer, last), ()) = tokio::join!(get(&mut kept_alive, "/slow"), async {
            receiving.recv().await.unwrap();
            drain.send(()).unwrap();
        });
        assert_eq!((&answer[..], last), ("hello", true));
        server.await.unwrap();
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        assert_eq!(front.await.unwrap(), 1);
    });
}

/// Serves a connection. A request of `/slow` is reported by `received`, and answered only when a
/// drain has been requested.
async fn serve(connection: Connection, handle: IncomingHandle, received: mpsc::Sender<()>) {
    let requested = handle.drain_requested();
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (slow, received, requested) =
            (request.uri() == "/slow", received.clone(), handle.drain_requested());
        async move {
            if slow {
                received.send(()).await.unwrap();
                requested.await;
                tokio::task::yield_now().await;
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hello"))))
        }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(connection), service);
    let mut connection = pin!(connection);
    select! {
        served = connection.as_mut() => return served.unwrap(),
        () = requested => connection.as_mut().graceful_shutdown(),
    }
    connection.await.unwrap();
}
