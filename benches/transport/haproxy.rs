//! The same HTTP server behind a real haproxy, which passes on bytes instead of connections.
//! haproxy keeps its connections to the server open (`http-reuse always`).

use std::{
    convert::Infallible,
    fs,
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Framed, Socket};
use futures::{
    SinkExt, StreamExt,
    future::{FutureExt, LocalBoxFuture},
};
use http_body_util::Full;
use hyper::{Response, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use nix::{
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{net, select, task::JoinSet};

use crate::{
    contenders::Setup,
    ends::End,
    handoff::{ANSWER, listen},
    http::http_client,
    processes::Helper,
};

/// Returns true if haproxy can be started.
pub(crate) fn is_installed() -> bool {
    let version =
        Command::new(PROGRAM).arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

const PROGRAM: &str = "haproxy";

/// A running haproxy that accepts from a listener and connects to the path `server` in a directory.
struct Haproxy {
    child: Child,
    cpu_clock: ClockId,
}

impl Haproxy {
    fn start(listener: TcpListener, directory: &TempDir, threads: usize) -> Self {
        let path = directory.path().display();
        let config = format!(
            "global\n    nbthread {threads}\n\
             defaults\n    mode http\n    http-reuse always\n    maxconn 1000\n    \
             timeout connect 10s\n    timeout client 60s\n    timeout server 60s\n\
             frontend front\n    bind fd@0\n    default_backend back\n\
             backend back\n    server one unix@{path}/server\n"
        );
        let config_path = directory.path().join("config");
        fs::write(&config_path, config).expect("a file can be written");
        let mut command = Command::new(PROGRAM);
        command.arg("-db").arg("-f").arg(config_path).stdin(OwnedFd::from(listener));
        let child = command.spawn().expect("haproxy is installed");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        let cpu_clock = clock_getcpuclockid(pid).expect("the process has a clock");
        Self { child, cpu_clock }
    }

    fn cpu_time(&self) -> Duration {
        clock_gettime(self.cpu_clock).expect("the process is there").into()
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has started haproxy and the client, and waits until the client is done.
struct Front {
    haproxy: Haproxy,
    peer: Framed<FrameCodec>,
    /// The server's listener. The first run sends it to the server.
    server: Option<UnixListener>,
    client: Helper,
    _directory: TempDir,
}

fn framed(socket: OwnedFd) -> Framed<FrameCodec> {
    Framed::new(Socket::try_from(socket).expect("a connected Unix socket"), FrameCodec::default())
}

pub(crate) fn front<const WINDOW: usize, const THREADS: usize>(
    socket: OwnedFd,
    _: Setup,
) -> Box<dyn End> {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let server = UnixListener::bind(directory.path().join("server")).expect("the path is free");
    let (listener, client) = listen(http_client(WINDOW));
    let haproxy = Haproxy::start(listener, &directory, THREADS);
    Box::new(Front {
        haproxy,
        peer: framed(socket),
        server: Some(server),
        client,
        _directory: directory,
    })
}

impl End for Front {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { peer, server, client, .. } = self;
        let run = async move {
            // The first run sends the listener to the server.
            if let Some(server) = server.take() {
                peer.send(Frame::new("listen").with_fd(server)).await.expect("the server is there");
            }
            client.control.send(count as u64);
            client.control.receive_in_runtime().await;
            peer.send(Frame::new("end")).await.expect("the server is there");
        };
        run.boxed_local()
    }

    fn cpu_time_of_others(&self) -> Duration {
        self.haproxy.cpu_time()
    }
}

/// Serves haproxy's connections, any number of requests on each.
struct Server {
    peer: Framed<FrameCodec>,
    /// `None` until the first run has received it.
    listener: Option<net::UnixListener>,
    serving: JoinSet<()>,
}

pub(crate) fn server(socket: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(Server { peer: framed(socket), listener: None, serving: JoinSet::new() })
}

async fn serve_all(stream: net::UnixStream) {
    let answer =
        async |_| Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER))));
    // haproxy may end a connection at any time.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

impl End for Server {
    fn run(&mut self, _: usize) -> LocalBoxFuture<'_, ()> {
        let Self { peer, listener, serving } = self;
        let run = async move {
            if listener.is_none() {
                let frame = peer.next().await.expect("the front is there").expect("a frame");
                let [fd] = frame.fds.into_array().expect("the listener");
                let received = UnixListener::from(fd);
                received.set_nonblocking(true).expect("it is a socket");
                *listener = Some(
                    net::UnixListener::from_std(received).expect("the socket can be registered"),
                );
            }
            let listener = listener.as_ref().expect("received above");

            // Serve until the front reports that the client is done.
            loop {
                select! {
                    accepted = listener.accept() => {
                        serving.spawn(serve_all(accepted.expect("accepting").0));
                    }
                    frame = peer.next() => {
                        break drop(frame.expect("the front is there").expect("a frame"));
                    }
                }
            }
        };
        run.boxed_local()
    }
}
