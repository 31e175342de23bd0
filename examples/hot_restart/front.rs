//! The web server with workers, which go on when its process is replaced.

use std::{env, io, time::Duration};

use axum::Router;
use fdwire::{
    handoff::{Dispatcher, Incoming, WorkerCommand},
    systemd::Notifier,
    takeover::Server,
};
use tokio::{
    join,
    net::TcpListener,
    process::Command,
    select,
    signal::unix::{SignalKind, signal},
    try_join,
};

const WORKERS: usize = 2;

/// The time limit for connections that no worker has adopted when this process leaves.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns the command that runs this program as a worker.
fn command() -> io::Result<WorkerCommand> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("--worker");
    Ok(WorkerCommand::from(command).restart(true))
}

/// Accepts connections for the workers, until another process does.
pub(crate) async fn serve(
    server: Server,
    notifier: Notifier,
) -> Result<(), Box<dyn std::error::Error>> {
    let dispatcher = Dispatcher::builder().build();
    // Keep the workers of the process that this one has replaced. The first process starts them.
    let taken = server.keep_workers(&dispatcher, |_| command().ok())?;
    for _ in taken.len()..WORKERS {
        dispatcher.spawn_worker(command()?)?;
    }
    let http = server.gated::<TcpListener>("http", 0)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stopping = async {
        select! {
            (_, reported) = async { join!(server.finish(), notifier.follow(&server)) } => reported?,
            _ = terminate.recv() => notifier.stopping().await?,
        }
        dispatcher.drain(Some(PATIENCE)).await; // this ends `dispatch_to` below, too
        io::Result::Ok(())
    };
    try_join!(http.dispatch_to(&dispatcher), stopping)?;
    println!("left");
    Ok(())
}

/// Serves the connections that the front hands over, until it drains this worker or no front is
/// left.
pub(crate) async fn work(router: Router) -> Result<(), Box<dyn std::error::Error>> {
    // A signal may go to all processes of a terminal or a service. The front acts on it.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Incoming::from_stdin()?.serve_axum(router).await;
    Ok(())
}
