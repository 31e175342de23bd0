//! The front of these services: accepts connections and lets a worker serve them.
//!
//! SIGHUP replaces the worker, as for a new version. SIGTERM or Ctrl-C ends the service. In both
//! cases the old worker gets no more connections, and finishes those that it has within a limit.

use std::{
    env,
    future::pending,
    io::{Error, Result},
    net::SocketAddr,
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use fdwire::handoff::{Dispatcher, WorkerCommand};
use tokio::{
    join,
    net::TcpListener,
    process::Command,
    select,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
};

/// How long before the limit a worker ends the connections that are left, so that it still leaves
/// in order.
pub(crate) const MARGIN: Duration = Duration::from_millis(500);

#[derive(clap::Parser)]
pub(crate) struct Arguments {
    /// Where to accept connections
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,

    /// Seconds that a worker gets for its connections when it is replaced or the service ends
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,

    /// Be a worker. The front starts this program again with this option
    #[arg(long, hide = true)]
    worker: bool,
}

/// Runs the front, or `serve` if this process was started as a worker. Prints the error that ends
/// it.
pub(crate) async fn main(
    arguments: Arguments,
    serve: impl Future<Output = Result<()>>,
) -> ExitCode {
    let done = if arguments.worker { work(serve).await } else { run(arguments).await };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn work(serve: impl Future<Output = Result<()>>) -> Result<()> {
    // Ctrl-C goes to all processes of the terminal, and a service manager may signal all processes
    // of a service. The front acts on it.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    serve.await
}

async fn run(arguments: Arguments) -> Result<()> {
    let limit = Some(Duration::from_secs(arguments.limit));
    let (mut hangup, mut end) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
    // The listener comes first: no worker is started if the address is taken.
    let listener = TcpListener::bind(arguments.listen).await.map_err(|error| {
        let reason = format!("cannot listen on {}: {error}", arguments.listen);
        Error::new(error.kind(), reason)
    })?;
    let dispatcher = Dispatcher::builder().build();
    dispatcher.spawn_worker(worker()?)?;
    println!("listening on {}", listener.local_addr()?);

    let replacing = async {
        while hangup.recv().await.is_some() {
            // The old worker serves until the new one is ready.
            if let Err(error) = dispatcher.replace_workers([worker()?], limit).await {
                eprintln!("the worker is not replaced: {error}");
            }
        }
        pending().await
    };
    let mut serving = pin!(dispatcher.serve(listener));
    select! {
        served = &mut serving => return served,
        failed = replacing => return failed,
        _ = end.recv() => {}
        stopped = ctrl_c() => stopped?,
    }
    // The drain ends `serving` when it has accepted what waits in the backlog.
    let ((), served) = join!(dispatcher.drain(limit), serving);
    served?;
    match dispatcher.stats().retired.overdue {
        0 => Ok(()),
        workers => Err(Error::other(format!(
            "{workers} workers still had connections at the limit, and were killed"
        ))),
    }
}

/// This program again, as a worker.
fn worker() -> Result<WorkerCommand> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("--worker");
    Ok(WorkerCommand::from(command).restart(true))
}
