//! Errors of system calls that Linux does not give for these sockets, injected with strace.

use std::{
    io::{BufRead, BufReader},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use fdwire::{
    Frame, FrameCodec, Framed, Socket, SocketKind,
    handoff::{
        Dispatcher, Incoming,
        protocol::{FromWorker, ToWorker, WorkerCodec},
    },
};
use futures::{SinkExt, StreamExt, future::join_all};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    common::{KINDS, PASSED, attachable_strace, role_socket, run, run_and_pass, spawn_role},
    raw_worker::{connections, greet, until},
};

const ROLE: &str = "injected::an_adoption_that_was_sent_counts_though_receiving_fails";

/// Attaches strace to a process. strace makes calls of one system call fail with `error`; `when` is
/// the numbers of the calls that fail.
fn inject(strace: &Path, pid: u32, call: &str, error: &str, when: &str) -> Child {
    let mut tracer = Command::new(strace)
        .args(["-f", "-p", &pid.to_string(), "-o", "/dev/null"])
        .arg(format!("--inject={call}:error={error}:when={when}"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(tracer.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("attached"), "{line}");
    tracer
}

/// Two ADOPTEDs are in the socket when the dispatcher's calls begin to fail: the first one, the
/// first five, or all.
#[test]
fn an_adoption_that_was_sent_counts_though_receiving_fails() {
    if let Some(socket) = role_socket(ROLE) {
        return run_and_pass(dispatch_two(socket));
    }
    let Some(strace) = attachable_strace() else { return };
    for kind in KINDS {
        for (error, when) in [("ENOBUFS", "1"), ("ENOMEM", "1..5"), ("EACCES", "1+")] {
            run(async {
                // This process is the worker. It receives two offers.
                let (worker_end, dispatcher_end) = Socket::pair(kind).unwrap();
                let mut child = spawn_role(ROLE, None, dispatcher_end.into());
                let mut framed = Framed::new(worker_end, WorkerCodec::default());
                greet(&mut framed, 2).await;
                let mut offers = Vec::new();
                while offers.len() < 2 {
                    if let ToWorker::Offer { offer, .. } = framed.next().await.unwrap().unwrap() {
                        offers.push(offer);
                    }
                }
                // From now on, the dispatcher's calls fail. The worker adopts both connections.
                let mut tracer = inject(&strace, child.id(), "recvmsg", error, when);
                for first in 0..2 {
                    framed.feed(FromWorker::Adopted { first, count: 1 }).await.unwrap();
                }
                framed.flush().await.unwrap();
                // The dispatcher's process checks that both adoptions count.
                let status =
                    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
                assert_eq!(status.code(), Some(PASSED), "{kind:?} {error} {when}");
                tracer.wait().unwrap();
            });
        }
    }
}

/// Is the dispatcher's process. Checks that the worker counts as having adopted both connections.
async fn dispatch_two(socket: OwnedFd) {
    let dispatcher = Dispatcher::builder().ping_interval(Duration::MAX).build();
    let id = dispatcher.add_worker(Socket::try_from(socket).unwrap());
    let (_clients, accepted): (Vec<_>, Vec<_>) = connections(2).await.into_iter().unzip();
    let outcomes = accepted.into_iter().map(|accepted| dispatcher.dispatch(accepted));
    for outcome in join_all(outcomes).await {
        assert_eq!(outcome.unwrap(), id);
    }
    until("the worker is gone", || dispatcher.stats().workers.is_empty()).await;
    assert_eq!((dispatcher.stats().adopted, dispatcher.stats().offered_again), (2, 0));
}

/// Starts a process for this role, which sends a frame when it is ready. Its next accept4 fails
/// with an error of one connection. Then this end is closed, and the process goes on.
fn fail_one_accept(role: &'static str) {
    let Some(strace) = attachable_strace() else { return };
    run(async {
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut child = spawn_role(role, None, theirs.into());
        let mut ours = Framed::new(ours, FrameCodec::default());
        ours.next().await.unwrap().unwrap();
        let mut tracer = inject(&strace, child.id(), "accept4", "EPROTO", "1");
        drop(ours);
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        assert_eq!(status.code(), Some(PASSED));
        tracer.wait().unwrap();
    });
}

/// In the process of a role: lets the next accept4 fail.
async fn wait_for_injection(socket: OwnedFd) {
    let mut test = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
    test.send(Frame::new("ready")).await.unwrap();
    assert!(test.next().await.is_none());
}

const SERVE_ROLE: &str = "injected::an_error_of_one_connection_is_no_shortage";

#[test]
fn an_error_of_one_connection_is_no_shortage() {
    match role_socket(SERVE_ROLE) {
        Some(socket) => run_and_pass(serve_after_an_error(socket)),
        None => fail_one_accept(SERVE_ROLE),
    }
}

async fn serve_after_an_error(socket: OwnedFd) {
    let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
    let dispatcher = Dispatcher::new();
    dispatcher.add_worker(ours);
    let mut incoming = Incoming::new(theirs);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn({
        let dispatcher = dispatcher.clone();
        async move { dispatcher.serve(listener).await }
    });

    wait_for_injection(socket).await;
    let _client = TcpStream::connect(address).await.unwrap();
    incoming.next().await.expect("the connection is accepted by the next call");
    assert_eq!(dispatcher.stats().accept_pauses, 0);
}

const DRAIN_ROLE: &str = "injected::a_drain_accepts_the_backlog_though_one_connection_fails";

#[test]
fn a_drain_accepts_the_backlog_though_one_connection_fails() {
    match role_socket(DRAIN_ROLE) {
        Some(socket) => run_and_pass(drain_a_backlog(socket)),
        None => fail_one_accept(DRAIN_ROLE),
    }
}

/// The dispatcher, with a worker that has room for one connection at a time. Three more wait in the
/// backlog when it drains.
async fn drain_a_backlog(socket: OwnedFd) {
    let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
    let dispatcher = Dispatcher::new();
    dispatcher.add_worker(ours);
    let mut incoming = Incoming::builder().max_connections(1).window(1).build(theirs);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = tokio::spawn({
        let dispatcher = dispatcher.clone();
        async move { dispatcher.serve(listener).await }
    });
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    let first = incoming.next().await.unwrap();

    // The drain accepts the three others.
    wait_for_injection(socket).await;
    let draining = tokio::spawn({
        let dispatcher = dispatcher.clone();
        async move { dispatcher.drain(None).await }
    });
    accepting.await.unwrap().unwrap();
    assert_eq!(dispatcher.stats().waiting, 3);

    drop(first);
    for _ in 1..4 {
        incoming.next().await.expect("it was accepted");
    }
    drop(incoming);
    draining.await.unwrap();
}
