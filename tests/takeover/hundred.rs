//! Clients of HTTP/1.1 and HTTP/2 while their server is restarted a hundred times.

use std::{
    error::Error as _,
    io::{Read, Write},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    pin::pin,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use fdwire::takeover::{self, Gated, Listeners, Options};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response,
    client::conn::{TrySendError, http1, http2},
    header::{CONNECTION, HOST},
    server::conn as serve_conn,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{common::*, control_path, process::Process};

const ROLE: &str = "hundred::a_hundred_restarts_fail_no_request_of_any_client";
const RESTARTS: usize = 100;

type Body = Full<Bytes>;

/// The state of a server that its connections share.
#[derive(Clone)]
struct State {
    open: watch::Sender<usize>,
    is_draining: watch::Sender<bool>,
}

/// Is a server process with a listener for HTTP/1.1 and one for HTTP/2.
async fn serve(socket: OwnedFd) {
    // Take the listeners of the running process, or be the first.
    let mut parent = UnixStream::from(socket);
    parent.read_exact(&mut [0]).unwrap();
    let mut report = |report: &str| parent.write_all(format!("{report}\n").as_bytes()).unwrap();
    let path = PathBuf::from(std::env::var_os("FDWIRE_PATH").unwrap());
    let bind = || {
        let mut listeners = Listeners::new();
        for name in ["http1", "http2"] {
            listeners.add(name, std::net::TcpListener::bind(std::env::var(name).unwrap())?)?;
        }
        Ok(listeners)
    };
    let server = takeover::bind_or_take(&path, Options::default(), bind)
        .await
        .unwrap()
        .ready()
        .await
        .unwrap();
    // Serve until another process takes over, and finish the open connections.
    let state = State { open: watch::Sender::new(0), is_draining: watch::Sender::new(false) };
    for (name, is_http2) in [("http1", false), ("http2", true)] {
        tokio::spawn(accept(server.gated(name, 0).unwrap(), is_http2, state.clone()));
    }
    server.confirmed().await;
    report("serves");
    server.replaced().await;
    state.is_draining.send_replace(true);
    state.open.subscribe().wait_for(|&open| open == 0).await.unwrap();
    assert!(server.drained().await);
    report("left");
}

async fn accept(listener: Gated<TcpListener>, is_http2: bool, state: State) {
    while let Ok((connection, _)) = listener.accept().await {
        let state = state.clone();
        state.open.send_modify(|open| *open += 1);
        tokio::spawn(async move {
            let answer =
                service_fn(|_| std::future::ready(Ok::<_, hyper::Error>(answer(&state, is_http2))));
            let io = TokioIo::new(connection);
            if is_http2 {
                let builder = serve_conn::http2::Builder::new(TokioExecutor::new());
                let mut connection = pin!(builder.serve_connection(io, answer));
                let mut is_draining = state.is_draining.subscribe();
                let draining = async { drop(is_draining.wait_for(|&it| it).await) };
                tokio::select! {
                    _ = &mut connection => {}
                    () = draining => {
                        connection.as_mut().graceful_shutdown(); // GOAWAY
                        let _ = connection.await;
                    }
                }
            } else {
                let _ = serve_conn::http1::Builder::new().serve_connection(io, answer).await;
            }
            state.open.send_modify(|open| *open -= 1);
        });
    }
}

/// Answers a request. A client of HTTP/1.1 learns from its answer when it is the last.
fn answer(state: &State, is_http2: bool) -> Response<Body> {
    let mut response = Response::new(Full::from(std::process::id().to_string()));
    if !is_http2 && *state.is_draining.borrow() {
        response.headers_mut().insert(CONNECTION, "close".parse().unwrap());
    }
    response
}

/// The numbers of answers and connections of one kind of client.
#[derive(Default)]
struct Seen {
    answers: AtomicUsize,
    connections: AtomicUsize,
}

/// The outcome of a request that has not failed. A request that no server has seen is sent again:
/// its connection had ended before.
enum Outcome {
    Answered,
    NotSent,
}

/// Returns true if a server that has sent GOAWAY has not seen a request (RFC 9113, section 6.8).
fn is_goodbye(error: &hyper::Error) -> bool {
    let source = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    source.is_some_and(|error| error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
}

fn request(keep: bool) -> Request<Body> {
    let mut request = Request::new(Body::default());
    request.headers_mut().insert(HOST, "localhost".parse().unwrap());
    if !keep {
        request.headers_mut().insert(CONNECTION, "close".parse().unwrap());
    }
    request
}

/// Checks the answer of a request, which is the server's process id.
async fn outcome(
    sent: Result<Response<hyper::body::Incoming>, TrySendError<Request<Body>>>,
) -> Result<Outcome, String> {
    match sent {
        Ok(response) => {
            let body =
                response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            body.iter()
                .all(u8::is_ascii_digit)
                .then_some(Outcome::Answered)
                .ok_or_else(|| format!("{body:?}"))
        }
        Err(mut error) => match error.take_message() {
            Some(_) => Ok(Outcome::NotSent),
            None if is_goodbye(error.error()) => Ok(Outcome::NotSent),
            None => Err(format!("{:?}", error.into_error())),
        },
    }
}

/// Sends requests with HTTP/1.1 until one fails, and returns the failure. If `keep` is false, each
/// has a connection of its own. Otherwise a connection is used until the server ends it.
async fn http1_client(address: SocketAddr, keep: bool, seen: Arc<Seen>) -> String {
    let client = async || -> Result<(), String> {
        let connection =
            TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
        let handshake = http1::handshake::<_, Body>(TokioIo::new(connection)).await;
        let (mut sender, driver) = handshake.map_err(|error| error.to_string())?;
        tokio::spawn(driver);
        seen.connections.fetch_add(1, Ordering::SeqCst);
        while sender.ready().await.is_ok() {
            match outcome(sender.try_send_request(request(keep)).await).await? {
                Outcome::Answered => seen.answers.fetch_add(1, Ordering::SeqCst),
                Outcome::NotSent => break,
            };
        }
        Ok(())
    };
    loop {
        if let Err(failure) = client().await {
            return failure;
        }
    }
}

/// Sends requests with HTTP/2 until one fails, and returns the failure.
async fn http2_client(address: SocketAddr, seen: Arc<Seen>) -> String {
    let client = async || -> Result<(), String> {
        let connection =
            TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
        let handshake =
            http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(connection)).await;
        let (mut sender, driver) = handshake.map_err(|error| error.to_string())?;
        tokio::spawn(driver);
        seen.connections.fetch_add(1, Ordering::SeqCst);
        while sender.ready().await.is_ok() {
            let mut request = Request::new(Body::default());
            *request.uri_mut() = "http://localhost/".parse().unwrap();
            match outcome(sender.try_send_request(request).await).await? {
                Outcome::Answered => seen.answers.fetch_add(1, Ordering::SeqCst),
                Outcome::NotSent => break,
            };
        }
        Ok(())
    };
    loop {
        if let Err(failure) = client().await {
            return failure;
        }
    }
}

#[test]
fn a_hundred_restarts_fail_no_request_of_any_client() {
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(serve(socket));
    }
    // A server process starts.
    let (_directory, path) = control_path();
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = [free(), free()];
    let start = || {
        let [http1, http2] = addresses.map(|address| address.to_string());
        let mut command = Command::new("/proc/self/exe");
        command.env("FDWIRE_PATH", &path).env("http1", http1).env("http2", http2);
        let mut process = Process::start_role(command, ROLE);
        process.go();
        process.expect("serves");
        process
    };
    let mut serving = start();

    // Two clients of each kind send requests.
    let runtime = one_worker();
    let kinds: [(&str, Arc<Seen>); 3] =
        ["one-shot", "keep-alive", "HTTP/2"].map(|name| (name, Arc::default()));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let [one_shot, keep_alive, http2] = kinds.each_ref().map(|(_, seen)| Arc::clone(seen));
        clients.spawn_on(http1_client(addresses[0], false, one_shot), runtime.handle());
        clients.spawn_on(http1_client(addresses[0], true, keep_alive), runtime.handle());
        clients.spawn_on(http2_client(addresses[1], http2), runtime.handle());
    }
    let mut failures = Vec::new();
    let mut check = |clients: &mut tokio::task::JoinSet<String>| {
        while let Some(failure) = clients.try_join_next() {
            failures.push(failure.unwrap());
        }
        assert!(failures.is_empty(), "{failures:?}");
    };
    // The server is replaced, each time after clients of each kind have got answers from it.
    for _ in 0..RESTARTS {
        let before = kinds.each_ref().map(|(_, seen)| seen.answers.load(Ordering::SeqCst));
        while kinds
            .iter()
            .zip(before)
            .any(|((_, seen), before)| seen.answers.load(Ordering::SeqCst) < before + 10)
        {
            check(&mut clients);
            std::thread::yield_now();
        }
        let next = start();
        serving.expect("left");
        assert!(serving.child.wait().unwrap().success());
        serving = next;
    }
    // No request has failed, and each kind of client has seen every restart.
    check(&mut clients);
    for (name, seen) in &kinds {
        let [answers, connections] =
            [&seen.answers, &seen.connections].map(|number| number.load(Ordering::SeqCst));
        println!(
            "{name}: {answers} answers over {connections} connections, \
             no failure in {RESTARTS} restarts"
        );
        assert!(connections > RESTARTS, "{name}: {connections} connections");
    }
}
