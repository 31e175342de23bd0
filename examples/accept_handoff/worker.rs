//! A worker: serves with hyper the connections that the front hands to it.

use std::{
    convert::Infallible,
    io::{Error, Result},
    path::Path,
    process,
    time::Duration,
};

use fdwire::handoff::{Incoming, IncomingEnd};
use http_body_util::Full;
use hyper::{
    Response,
    body::Bytes,
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

use crate::journal::Writer;

/// The time for requests that are on their way when the worker drains. Their answers close the
/// connections. After this time, silent connections are ended.
const GRACE: Duration = Duration::from_millis(100);

/// The time for requests that are being answered when the worker drains. Usually the front's limit
/// is shorter. This one counts if the front is gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

pub(crate) async fn run(number: u16, journal: Option<&Path>) -> Result<()> {
    // Ctrl-C goes to every process of the terminal's foreground group, and a service manager may
    // signal all processes, too. A worker ignores the signal, and drains when the front asks it to.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut journal = journal.map(|path| Writer::open(path, number)).transpose()?;

    let mut incoming = Incoming::from_stdin()?;
    let handle = incoming.handle();
    let serving = GracefulShutdown::new();
    while let Some(connection) = incoming.next().await {
        let peer = connection.peer_addr().clone();
        if let Some(journal) = &mut journal {
            journal.given(&peer)?;
        }
        let draining = handle.clone();
        let service = service_fn(move |_request| {
            let answer = format!("worker {} answers {peer}\n", process::id());
            let mut response = Response::new(Full::new(Bytes::from(answer)));
            if draining.is_draining() {
                response
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            async { Ok::<_, Infallible>(response) }
        });
        let http = http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(connection), service);
        tokio::spawn(serving.watch(http)); // fails if the client goes away
    }

    // The front drains this worker, or is gone.
    sleep(GRACE).await;
    // Idle connections end now, the others after their answer.
    let _ = timeout(FINISH_LIMIT, serving.shutdown()).await;
    match handle.ended().await {
        IncomingEnd::Failed(error) => Err(Error::other(error)),
        _ => Ok(()),
    }
}
