//! A web server that takes over from itself: start it again, and the new process replaces the old
//! one.
//!
//! ```text
//! cargo run --features axum --example hot_restart                 # then again, in another terminal
//! cargo run --features axum --example hot_restart -- --demo       # load through 20 restarts
//! cargo run --features axum --example hot_restart -- --demo --kill
//! ```

mod demo;
mod load;

use std::{
    io, process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, http::header::CONNECTION, middleware::map_response, response::Response, routing::get};
use clap::Parser;
use fdwire::takeover::{self, Gated, Listeners, Options, Server};
use tokio::{net::TcpListener, select, time::sleep};

#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Address to listen at.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// Where a new process finds the running one.
    #[arg(long, default_value = "/tmp/fdwire-hot-restart")]
    path: String,
    /// Milliseconds for which a replaced server tells its clients that an answer was the last,
    /// before it ends connections that are silent.
    #[arg(long, default_value_t = 100)]
    grace: u64,
    /// Shows 20 restarts under load.
    #[arg(long)]
    demo: bool,
    /// Kills the old or the new process at random meanwhile.
    #[arg(long, requires = "demo")]
    kill: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    if arguments.demo {
        return Ok(demo::run(arguments.kill).await?);
    }
    serve(arguments).await
}

async fn serve(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.add("http", std::net::TcpListener::bind(&arguments.listen)?)?;
        Ok(listeners)
    };
    let pending = takeover::bind_or_take(&arguments.path, Options::default(), bind).await?;
    println!("offered");
    // Here a server reads its configuration and warms its caches. A crash costs nothing.
    let server = Arc::new(pending.ready().await?);
    println!("ready");

    loop {
        let is_draining = Arc::new(AtomicBool::new(false));
        let stop = stop(Arc::clone(&server), Arc::clone(&is_draining), Duration::from_millis(arguments.grace));
        let http: Gated<TcpListener> = server.gated("http", 0)?;
        let serving = axum::serve(http, router(is_draining)).with_graceful_shutdown(stop);
        let mut serving = tokio::spawn(async move { serving.await });

        server.replaced().await;
        // Its last connections end, or the new process does.
        select! {
            finished = &mut serving => {
                finished??;
                if server.drained().await {
                    break;
                }
            }
            undone = server.undone() => {
                if !undone {
                    // The new process was replaced as well: only the connections are left to
                    // finish.
                    serving.await??;
                    break;
                }
                println!("undone");
            }
        }
    }
    println!("left");
    Ok(())
}

/// Waits for the end: a replaced server still answers for a moment, so that no client finds its
/// connection closed when it has just sent a request.
async fn stop(server: Arc<Server>, is_draining: Arc<AtomicBool>, grace: Duration) {
    server.replaced().await;
    is_draining.store(true, Ordering::SeqCst);
    sleep(grace).await;
}

fn router(is_draining: Arc<AtomicBool>) -> Router {
    let last = map_response(move |response: Response| {
        let is_draining = is_draining.load(Ordering::SeqCst);
        async move { (is_draining.then_some([(CONNECTION, "close")]), response) }
    });
    Router::new().route("/", get(async || format!("{}\n", process::id()))).layer(last)
}

/// For errors that end the demo.
fn other(reason: impl Into<String>) -> io::Error {
    io::Error::other(reason.into())
}
