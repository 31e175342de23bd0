//! Workers that serve with axum the connections that another process accepts.
//!
//! ```text
//! cargo run --features axum --example axum_worker  # then: curl http://127.0.0.1:8080/
//! cargo run --features axum --example axum_worker -- 127.0.0.1:8081   # another address
//! ```
//!
//! Ctrl-C or SIGTERM stops it after all requests are answered.

use std::{env, io, process, time::Duration};

use axum::{Router, extract::ConnectInfo, routing::get};
use fdwire::handoff::{Address, Dispatcher, Incoming, WorkerCommand};
use tokio::{
    net::TcpListener,
    process::Command,
    select,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
    try_join,
};

#[tokio::main]
async fn main() {
    let done = match env::args().nth(1).as_deref() {
        Some("--worker") => worker().await,
        Some("-h" | "--help") => {
            println!("usage: axum_worker [ADDRESS]  (default: 127.0.0.1:8080)");
            Ok(())
        }
        address => front(address.unwrap_or("127.0.0.1:8080")).await,
    };
    if let Err(error) = done {
        eprintln!("axum_worker: {error}");
        process::exit(1);
    }
}

async fn front(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })?;
    let address = listener.local_addr()?;

    let mut terminate = signal(SignalKind::terminate())?; // from a service manager
    let dispatcher = Dispatcher::builder().build();
    for _ in 0..2 {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--worker");
        dispatcher.spawn_worker(WorkerCommand::from(command).restart(true))?;
    }
    println!("listening on {address}, try: curl http://{address}/");
    let stopping = async {
        select! {
            done = ctrl_c() => done?,
            _ = terminate.recv() => {}
        }
        dispatcher.drain(Some(Duration::from_secs(5))).await;
        Ok(())
    };
    try_join!(dispatcher.serve(listener), stopping)?; // the drain ends `serve` too
    Ok(())
}

async fn worker() -> io::Result<()> {
    // Ctrl-C goes to all processes of the terminal, and a service manager may signal all processes
    // of a service. The front acts on it, and drains the workers.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);

    let answer = |ConnectInfo(peer): ConnectInfo<Address>| async move {
        format!("worker {} answers {peer}\n", process::id())
    };
    let app = Router::new().route("/", get(answer));
    Incoming::from_stdin()?.serve_axum(app).await; // until the front stops, or has died
    Ok(())
}
