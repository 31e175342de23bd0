//! axum serves connections that another process accepts.
//!
//! ```text
//! cargo run --features axum --example axum_worker        # then: curl http://127.0.0.1:8080/
//! ```
//!
//! Ctrl-C stops it when all requests are answered.

use std::{env, io, process, time::Duration};

use axum::{
    Router, extract::ConnectInfo, http::header::CONNECTION, middleware::map_response, response::Response, routing::get,
};
use fdwire::handoff::{Address, Dispatcher, Incoming, WorkerCommand};
use tokio::{
    net::TcpListener,
    process::Command,
    select,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
    time::sleep,
};

/// At the end, the time for requests that are on their way. With the answer they learn that it was the last; connections that
/// are silent are ended then.
const GRACE: Duration = Duration::from_millis(100);

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

    let dispatcher = Dispatcher::builder().build();
    for _ in 0..2 {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--worker");
        dispatcher.spawn_worker(WorkerCommand::from(command).restart(true))?;
    }
    println!("listening on {address}, try: curl http://{address}/");
    select! {
        served = dispatcher.serve(listener) => served?,
        stop = ctrl_c() => stop?,
    }
    dispatcher.drain(Some(Duration::from_secs(5))).await;
    Ok(())
}

async fn worker() -> io::Result<()> {
    // Ctrl-C goes to all processes of the terminal. The front is the one to act on it.
    let _ignored = signal(SignalKind::interrupt())?;

    let answer =
        |ConnectInfo(peer): ConnectInfo<Address>| async move { format!("worker {} answers {peer}\n", process::id()) };
    let incoming = Incoming::from_stdin()?;
    let handle = incoming.handle();
    let draining = handle.clone();
    let last = map_response(move |response: Response| {
        let draining = draining.is_draining();
        async move { (draining.then_some([(CONNECTION, "close")]), response) }
    });
    let app = Router::new().route("/", get(answer)).layer(last);

    let requested = handle.drain_requested();
    let stop = async move {
        requested.await;
        sleep(GRACE).await;
    };
    let app = app.into_make_service_with_connect_info::<Address>();
    let serving = axum::serve(incoming, app).with_graceful_shutdown(stop);
    // In a task: in `main` itself, each connection would have to wake one thread more.
    tokio::spawn(async move { serving.await }).await??;
    handle.ended().await; // the dispatcher knows that all has been served
    Ok(())
}
