//! A web server that takes over from itself: start it again, and the new process replaces the old
//! one.
//!
//! ```text
//! cargo run --features axum --example hot_restart             # then again, in another terminal
//! cargo run --features axum --example hot_restart -- --list   # the processes of the server
//! cargo run --features axum --example hot_restart -- --wait   # starts it in the background
//! cargo run --features axum --example hot_restart -- --demo   # load through 20 restarts
//! cargo run --features axum --example hot_restart -- --demo --kill
//! cargo run --features axum --example hot_restart -- --demo --front   # workers go on
//! ```
//!
//! `--wait` returns once the new process serves, with exit code 0, or once it has failed, with 1.
//! It is the `ExecReload=` of a systemd unit: see docs/TAKEOVER.md.

mod demo;
mod front;
mod load;

use std::{
    env,
    error::Error,
    fmt::Display,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::{self, ExitCode, Stdio},
    time::Duration,
};

use axum::{Router, routing::get};
use clap::Parser;
use fdwire::{
    systemd::Notifier,
    takeover::{self, Listeners, Options},
};
use tokio::{
    join,
    process::Command,
    select,
    signal::unix::{SignalKind, signal},
};

/// A web server that takes over from itself: start it again to replace the running process.
#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Address to listen at, unless a process manager has passed a listener named "http".
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Path at which a new process finds the running one.
    #[arg(long, default_value = "/tmp/fdwire-hot-restart")]
    path: PathBuf,
    /// Milliseconds over which a replaced server ends the connections of silent clients.
    #[arg(long, default_value_t = 1000)]
    spread: u64,
    /// Milliseconds after which a replaced server cuts its remaining connections.
    #[arg(long, default_value_t = 30_000)]
    deadline: u64,
    /// Serves with two worker processes, which go on when this one is replaced.
    #[arg(long)]
    front: bool,
    /// Serves the connections that a front hands over.
    #[arg(long, hide = true)]
    worker: bool,
    /// Starts the server in the background, and waits until it serves or has failed.
    #[arg(long)]
    wait: bool,
    /// Lists the process that serves, and the replaced processes that finish their connections.
    #[arg(long, conflicts_with = "wait")]
    list: bool,
    /// Shows 20 restarts under load.
    #[arg(long)]
    demo: bool,
    /// With --demo, kills the old or the new process at random during the restarts.
    #[arg(long, requires = "demo")]
    kill: bool,
}

/// The longest time until a new process serves.
const PATIENCE: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match () {
        () if arguments.demo => {
            demo::run(arguments.kill, arguments.front).await.map_err(Into::into)
        }
        () if arguments.worker => front::work(router()).await,
        () if arguments.wait => launch(arguments).await,
        () if arguments.list => list(arguments).await,
        () => serve(arguments).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hot_restart: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> Result<()> {
    // The first process binds the listener. Others take it over.
    let [spread, deadline] = [arguments.spread, arguments.deadline].map(Duration::from_millis);
    let options = Options::default().drain(spread, deadline);
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.bind_tcp("http", arguments.listen)?;
        Ok(listeners)
    };
    let notifier = Notifier::from_env()?;
    let path = arguments.path.display();
    let pending =
        takeover::bind_or_take(&arguments.path, options, bind).await.map_err(with(&path))?;
    println!("offered");
    // At this point, a server reads its configuration and warms its caches. If it crashes, the old
    // process goes on.
    let server = pending.ready().await.map_err(with(&path))?;
    println!("ready");

    if arguments.front {
        return front::serve(server, notifier).await;
    }
    // Serve until another process has taken over for good, or a signal ends the service.
    let serving = server.serve_axum(server.gated("http", 0)?, router());
    let mut terminate = signal(SignalKind::terminate())?;
    select! {
        (finished, reported) = async { join!(serving, notifier.follow(&server)) } => {
            reported.map_err(with("NOTIFY_SOCKET"))?;
            println!("{finished}");
            println!("left");
        }
        _ = terminate.recv() => notifier.stopping().await?,
    }
    Ok(())
}

fn router() -> Router {
    Router::new().route("/", get(async || format!("{}\n", process::id())))
}

/// Starts this program again, without `--wait`.
async fn launch(arguments: Arguments) -> Result<()> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1).filter(|argument| argument != "--wait"));
    // A caller that reads the output of this command to its end must not wait for the server.
    // Standard error is the server's log.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let path = &arguments.path;
    let launched = takeover::launch(&mut command, path, &Options::default(), PATIENCE).await;
    let server = launched.map_err(with(path.display()))?;
    println!("process {} serves", server.id().unwrap_or_default());
    Ok(())
}

async fn list(arguments: Arguments) -> Result<()> {
    let status = takeover::status(&arguments.path, &Options::default()).await;
    let status = status.map_err(with(arguments.path.display()))?;
    println!("{status}");
    Ok(())
}

/// Returns a function that puts the file or the address that an error is about before the error.
fn with<E: Error>(subject: impl Display) -> impl FnOnce(E) -> Box<dyn Error> {
    move |error| format!("{subject}: {error}").into()
}

/// Returns an error that ends the demo.
fn other(reason: impl Into<String>) -> io::Error {
    io::Error::other(reason.into())
}
