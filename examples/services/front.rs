//! The front of these services: accepts connections and has a worker serve them. SIGHUP replaces
//! the worker, as for a new version, and SIGTERM ends the service. In both cases the old worker
//! gets no more connections, and finishes those that it has within a limit.

use std::{
    env,
    io::{Error, Result},
    mem,
    net::SocketAddr,
    pin::pin,
    time::Duration,
};

use fdwire::handoff::{Dispatcher, WorkerCommand, WorkerId};
use tokio::{
    join,
    net::TcpListener,
    process::Command,
    select,
    signal::unix::{SignalKind, signal},
};

/// How long before the limit a worker ends what is left, so that it still leaves in order.
pub(crate) const MARGIN: Duration = Duration::from_millis(500);

#[derive(clap::Parser)]
pub(crate) struct Arguments {
    /// Where to accept connections
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,

    /// Seconds that a worker gets for its connections when it is replaced or the service ends
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,

    /// Be a worker: how the front starts it
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let limit = Some(Duration::from_secs(arguments.limit));
    let (mut replace, mut end) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
    let dispatcher = Dispatcher::builder().build();
    let mut worker = start(&dispatcher)?;
    let listener = TcpListener::bind(arguments.listen).await?;
    println!("listening on {}", listener.local_addr()?);

    let mut serving = pin!(dispatcher.serve(listener));
    loop {
        select! {
            served = &mut serving => return served,
            _ = replace.recv() => {
                // What comes from now on waits for the new worker.
                let old = mem::replace(&mut worker, start(&dispatcher)?);
                let dispatcher = dispatcher.clone();
                tokio::spawn(async move { dispatcher.remove_worker(old, limit).await });
            }
            _ = end.recv() => break,
        }
    }
    // The drain ends `serving` when it has accepted what waits in the backlog.
    let ((), served) = join!(dispatcher.drain(limit), serving);
    served?;
    match dispatcher.stats().retired.overdue {
        0 => Ok(()),
        workers => Err(Error::other(format!("{workers} workers were killed at the limit"))),
    }
}

/// This program again, as a worker.
fn start(dispatcher: &Dispatcher) -> Result<WorkerId> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("--worker");
    dispatcher.spawn_worker(WorkerCommand::from(command).restart(true))
}
