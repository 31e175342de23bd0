//! axum serves connections that another process accepts.
//!
//! ```text
//! cargo run --features axum --example axum_worker        # then: curl http://127.0.0.1:8080/
//! ```
//!
//! Ctrl-C stops it when all requests are answered.

use std::{env, io, process, time::Duration};

use axum::{Router, extract::ConnectInfo, routing::get};
use fdwire::handoff::{Address, Dispatcher, Incoming, WorkerCommand};
use tokio::{
    net::TcpListener,
    process::Command,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
    try_join,
};

#[tokio::main]
async fn main() -> io::Result<()> {
    match env::args().nth(1) {
        Some(argument) if argument == "--worker" => worker().await,
        address => front(address.as_deref().unwrap_or("127.0.0.1:8080")).await,
    }
}

async fn front(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;

    let dispatcher = Dispatcher::new();
    for _ in 0..2 {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--worker");
        dispatcher.spawn_worker(WorkerCommand::from(command).restart(true))?;
    }
    println!("listening on {address}, try: curl http://{address}/");
    let stopping = async {
        ctrl_c().await?;
        dispatcher.drain(Some(Duration::from_secs(5))).await;
        Ok(())
    };
    // The drain ends `serve`, when nobody waits to be accepted.
    try_join!(dispatcher.serve(listener), stopping)?;
    Ok(())
}

async fn worker() -> io::Result<()> {
    // Ctrl-C goes to all processes of the terminal. The front is the one to act on it.
    let _ignored = signal(SignalKind::interrupt())?;

    let answer = |ConnectInfo(peer): ConnectInfo<Address>| async move {
        format!("worker {} answers {peer}\n", process::id())
    };
    let app = Router::new().route("/", get(answer));
    Incoming::from_stdin()?.serve_axum(app).await; // until the front is told to stop, or has died
    Ok(())
}
