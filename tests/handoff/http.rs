//! Real requests: axum and hyper serve what is handed over.

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

/// Hands everything that it accepts to the worker, until it is told to drain; then waits for the
/// worker's goodbye.
async fn front(kind: SocketKind) -> (SocketAddr, Incoming, oneshot::Sender<()>, JoinHandle<u64>) {
    let (mut dispatcher, incoming) = pair(kind, Incoming::builder()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (drain, draining) = oneshot::channel();
    let mut draining = draining.into_stream();
    let front = tokio::spawn(async move {
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

/// The answer, and whether the connection ends with it.
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
fn axum_serves_and_drains() {
    use axum::{Router, extract::ConnectInfo, routing};
    use fdwire::handoff::Address;

    counted(async |kind| {
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

        for _ in 0..20 {
            let (answer, last) = get(&mut client(address).await, "/").await;
            assert!(answer.starts_with("you are 127.0.0.1:") && !last, "{answer}");
        }
        let mut kept_alive = client(address).await;
        get(&mut kept_alive, "/").await;
        get(&mut kept_alive, "/").await;
        drain.send(()).unwrap();
        handle.drain_requested().await;
        server.await.unwrap(); // the connection that was kept alive was idle, and has been ended
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        assert_eq!(front.await.unwrap(), 21);
    });
}

#[test]
fn hyper_serves_and_ends_what_is_kept_alive_with_its_next_answer() {
    counted(async |kind| {
        let (address, mut incoming, drain, front) = front(kind).await;
        let handle = incoming.handle();
        let (asked, mut asking) = mpsc::channel(1);
        let server = {
            let handle = handle.clone();
            tokio::spawn(async move {
                while let Some(connection) = incoming.next().await {
                    tokio::spawn(serve(connection, handle.clone(), asked.clone()));
                }
            })
        };
        let mut kept_alive = client(address).await;
        assert_eq!(get(&mut kept_alive, "/").await, ("hello".to_owned(), false));

        // A request that is being answered when the drain begins.
        let ((answer, last), ()) = tokio::join!(get(&mut kept_alive, "/slow"), async {
            asking.recv().await.unwrap();
            drain.send(()).unwrap();
        });
        assert_eq!((&answer[..], last), ("hello", true));
        server.await.unwrap();
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        assert_eq!(front.await.unwrap(), 1);
    });
}

/// Answers; what is slow only when a drain has been requested, which is made known by `asked`.
async fn serve(connection: Connection, handle: IncomingHandle, asked: mpsc::Sender<()>) {
    let requested = handle.drain_requested();
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (slow, asked, requested) =
            (request.uri() == "/slow", asked.clone(), handle.drain_requested());
        async move {
            if slow {
                asked.send(()).await.unwrap();
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
