//! A worker: adopts the connections that arrive on its standard input, and serves them with hyper.

use std::{
    convert::Infallible,
    io::{Error, Result},
    pin::pin,
    process,
    time::Duration,
};

use fdwire::{Frame, FrameCodec, Framed, Socket};
use futures::{SinkExt, StreamExt};
use http_body_util::Full;
use hyper::{Response, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    select,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::front::WINDOW;

/// Connections served at a time; then the worker adopts no more, and the front notices by its window. Together with a
/// window of descriptors on the way it has to stay below `RLIMIT_NOFILE`, by default 1,024: descriptors above that limit
/// are lost on receipt, and the channel with them.
const MAX_SERVING: usize = 768;

/// At the end, the time for requests that are on their way on connections adopted last.
const GRACE: Duration = Duration::from_millis(100);

/// At the end, the time for requests being answered. The front waits a little longer.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);

pub(crate) async fn run() -> Result<()> {
    // Ctrl-C goes to every process of the terminal's foreground group, and a service manager may signal all processes too.
    // The front is in charge: a worker only listens, and stops at the end of its socket.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);

    let socket = Socket::from_stdin()?;

    let (stop, stopping) = watch::channel(());
    let mut serving = JoinSet::new();
    let outcome = adopt(socket, &mut serving, &stopping).await;
    drain(serving, stop).await;
    outcome
}

/// Adopts connections until the front closes its sending direction, or ends in whatever way.
async fn adopt(socket: Socket, serving: &mut JoinSet<()>, stopping: &watch::Receiver<()>) -> Result<()> {
    let (frames, mut answers) = Framed::new(socket, FrameCodec::default()).into_split();
    answers.send(adopted(0)).await?; // ready
    let mut batches = frames.ready_chunks(WINDOW);
    loop {
        select! {
            batch = batches.next(), if serving.len() < MAX_SERVING => {
                let Some(batch) = batch else { return Ok(()) };
                let batch = batch.into_iter().map(|frame| connection(frame?)).collect::<Result<Vec<_>>>()?;
                // First the answer, then the first byte to a client: what is not answered for, the front gives to
                // another worker. One answer for all that came together.
                answers.send(adopted(batch.len())).await?;
                for (stream, peer) in batch {
                    serving.spawn(serve(stream, peer, stopping.clone()));
                }
            }
            Some(_) = serving.join_next() => {}
        }
    }
}

fn adopted(count: usize) -> Frame {
    Frame::new(count.to_string())
}

fn connection(frame: Frame) -> Result<(TcpStream, String)> {
    let peer = String::from_utf8_lossy(&frame.payload).into_owned();
    let [fd] = frame
        .fds
        .into_array()
        .map_err(|fds| Error::other(format!("a frame with one descriptor expected, {} came", fds.len())))?;
    // It is non-blocking already: O_NONBLOCK belongs to the open file, not to the descriptor.
    Ok((TcpStream::from_std(fd.into())?, peer))
}

async fn serve(stream: TcpStream, peer: String, mut stopping: watch::Receiver<()>) {
    let service = service_fn(|_request| {
        let answer = format!("worker {} answers {peer}\n", process::id());
        async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(answer)))) }
    });
    let connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // hyper shuts the TCP connection down at its end, it does not only close it: a close sends no FIN as long as the front
    // has its copy. Errors are those of clients that went away.
    select! {
        _ = connection.as_mut() => return,
        _ = stopping.changed() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn drain(mut serving: JoinSet<()>, stop: watch::Sender<()>) {
    if timeout(GRACE, all_served(&mut serving)).await.is_ok() {
        return;
    }
    drop(stop); // idle connections end now, the others after their answer
    if timeout(DRAIN_LIMIT, all_served(&mut serving)).await.is_err() {
        eprintln!("worker {}: connections cut off at the end: {}", process::id(), serving.len());
    }
}

async fn all_served(serving: &mut JoinSet<()>) {
    while serving.join_next().await.is_some() {}
}
