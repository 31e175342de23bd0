//! The dispatcher's process is killed while workers serve. They finish what they have adopted, and
//! then end.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fs::{self, OpenOptions},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use fdwire::{
    SocketKind,
    handoff::{Connection, Dispatcher, Incoming, IncomingHandle, WorkerCommand},
};
use futures::future::join_all;
use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::{rt::TokioIo, server::graceful::GracefulShutdown};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    time::sleep,
};

use crate::{
    common::{KINDS, run},
    raw_worker::until,
};

const FRONT: &str = "orphans::front_process";
const WORKER: &str = "orphans::worker_process";

/// Returns the command of a process of this test, whose files are in the directory.
fn command(role: &str, application: &str, directory: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([role, "--exact", "--nocapture"]).env("FDWIRE_ROLE", role);
    command.env("FDWIRE_APPLICATION", application).env("FDWIRE_DIRECTORY", directory);
    command.stdout(Stdio::null());
    command
}

fn is_role(role: &str) -> bool {
    std::env::var("FDWIRE_ROLE").as_deref() == Ok(role)
}

fn directory() -> PathBuf {
    std::env::var_os("FDWIRE_DIRECTORY").unwrap().into()
}

/// Is the front, which accepts connections and starts two workers.
#[test]
fn front_process() {
    if !is_role(FRONT) {
        return;
    }
    let (application, directory) = (std::env::var("FDWIRE_APPLICATION").unwrap(), directory());
    let kind = if std::env::var_os("FDWIRE_STREAM").is_some() {
        SocketKind::Stream
    } else {
        SocketKind::SeqPacket
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let dispatcher = Dispatcher::builder().build();
        for _ in 0..2 {
            let worker = WorkerCommand::from(command(WORKER, &application, &directory));
            dispatcher.spawn_worker(worker.restart(true).socket_kind(kind)).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        fs::write(directory.join("starting"), listener.local_addr().unwrap().to_string()).unwrap();
        fs::rename(directory.join("starting"), directory.join("address")).unwrap();
        dispatcher.serve(listener).await.unwrap();
    });
}

/// Is a worker, with one of the programs that README and the examples show.
#[test]
fn worker_process() {
    if !is_role(WORKER) {
        return;
    }
    let pid = std::process::id().to_string();
    fs::write(directory().join(format!("worker-{pid}")), pid).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        match std::env::var("FDWIRE_APPLICATION").unwrap().as_str() {
            "loop" => plain_loop().await,
            "hyper" => with_hyper().await,
            #[cfg(feature = "axum")]
            "axum" => with_axum().await,
            other => panic!("no application {other}"),
        }
    });
    std::process::exit(0);
}

async fn plain_loop() {
    let mut incoming = Incoming::from_stdin().unwrap();
    let handle = incoming.handle();
    let ended = handle.ended();
    tokio::spawn(async move {
        while let Some(connection) = incoming.next().await {
            tokio::spawn(answer_one(connection, handle.clone()));
        }
    });
    ended.await;
}

async fn answer_one(mut connection: Connection, handle: IncomingHandle) {
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    while !request.ends_with(b"\r\n\r\n") {
        match connection.read(&mut buffer).await {
            Ok(bytes) if bytes > 0 => request.extend_from_slice(&buffer[..bytes]),
            _ => return,
        }
    }
    let path = String::from_utf8(request).unwrap().split(' ').nth(1).unwrap().to_owned();
    let body = answer(&path, handle).await;
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    connection.write_all((head + &body).as_bytes()).await.unwrap();
    connection.shutdown().await.unwrap();
}

async fn with_hyper() {
    let mut incoming = Incoming::from_stdin().unwrap();
    let handle = incoming.handle();
    let serving = GracefulShutdown::new();
    while let Some(connection) = incoming.next().await {
        let handle = handle.clone();
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            let handle = handle.clone();
            async move {
                let body = answer(request.uri().path(), handle).await;
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(body))))
            }
        });
        tokio::spawn(
            serving
                .watch(http1::Builder::new().serve_connection(TokioIo::new(connection), service)),
        );
    }
    serving.shutdown().await;
    handle.ended().await;
}

#[cfg(feature = "axum")]
async fn with_axum() {
    use axum::{Router, extract::Path, routing::get};

    let incoming = Incoming::from_stdin().unwrap();
    let handle = incoming.handle();
    let answer = move |Path(serial): Path<String>| answer_of(serial, handle.clone());
    incoming.serve_axum(Router::new().route("/{serial}", get(answer))).await;
}

#[cfg(feature = "axum")]
async fn answer_of(serial: String, handle: IncomingHandle) -> String {
    answer(&format!("/{serial}"), handle).await
}

/// Logs a request and answers it: `/0` at once, and others only after the dispatcher has ended.
async fn answer(path: &str, handle: IncomingHandle) -> String {
    let mut log =
        OpenOptions::new().append(true).create(true).open(directory().join("requests")).unwrap();
    log.write_all(format!("{path}\n").as_bytes()).unwrap();
    if path != "/0" {
        handle.drain_requested().await;
        // A worker that does not wait for its requests would end within this time. There is no
        // event to wait for, because nothing must happen.
        sleep(Duration::from_millis(300)).await;
    }
    format!("answer to {path}")
}

async fn send(stream: &mut TcpStream, serial: u32) -> std::io::Result<()> {
    stream.write_all(format!("GET /{serial} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await
}

/// Sends a request. Returns all that the client receives until the end, which may be a reset.
async fn get(address: SocketAddr, serial: u32) -> (u32, String) {
    let mut received = Vec::new();
    if let Ok(mut stream) = TcpStream::connect(address).await
        && send(&mut stream, serial).await.is_ok()
    {
        let _ = stream.read_to_end(&mut received).await;
    }
    (serial, String::from_utf8(received).unwrap())
}

fn requests(directory: &Path) -> BTreeSet<String> {
    let log = fs::read_to_string(directory.join("requests")).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

/// Returns true if a process no longer runs. It may be a zombie, which waits for its parent.
fn has_ended(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// Kills a front while its workers have requests that they have not answered. Checks that all of
/// these are answered, and that the workers end.
fn check(application: &str) {
    for kind in KINDS {
        run(async {
            // The front listens.
            let directory = tempfile::tempdir().unwrap();
            let directory = directory.path();
            let mut front = command(FRONT, application, directory);
            if kind == SocketKind::Stream {
                front.env("FDWIRE_STREAM", "1");
            }
            let mut front = front.kill_on_drop(true).spawn().unwrap();
            until("the front listens", || directory.join("address").exists()).await;
            let address = fs::read_to_string(directory.join("address")).unwrap().parse().unwrap();

            // One connection is idle. It is kept alive if the application does that.
            let mut kept_alive = TcpStream::connect(address).await.unwrap();
            send(&mut kept_alive, 0).await.unwrap();
            kept_alive.readable().await.unwrap();

            // The front is killed while 30 requests are being served. All get their answers.
            let clients = tokio::spawn(join_all((1..=30).map(|serial| get(address, serial))));
            until("all requests have reached an application", || requests(directory).len() == 31)
                .await;
            front.kill().await.unwrap();
            for (serial, answer) in clients.await.unwrap() {
                assert!(
                    answer.ends_with(&format!("answer to /{serial}")),
                    "request {serial} was cut: {answer:?}"
                );
            }
            let _ = kept_alive.read_to_end(&mut Vec::new()).await;

            // Both workers end.
            let names = fs::read_dir(directory)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let pids = Vec::from_iter(
                names.filter_map(|name| Some(name.strip_prefix("worker-")?.to_owned())),
            );
            assert_eq!(pids.len(), 2);
            until("no worker is left", || pids.iter().all(|pid| has_ended(pid))).await;
        });
    }
}

#[test]
fn a_plain_loop_finishes_its_connections_when_the_front_is_killed() {
    check("loop");
}

#[test]
fn hyper_finishes_its_requests_when_the_front_is_killed() {
    check("hyper");
}

#[cfg(feature = "axum")]
#[test]
fn axum_finishes_its_requests_when_the_front_is_killed() {
    check("axum");
}
