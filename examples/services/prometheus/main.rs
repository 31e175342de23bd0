//! A front that exports the numbers of its dispatcher and workers for Prometheus.
//!
//! ```text
//! cargo run -p fdwire-services --bin prometheus
//! curl http://127.0.0.1:8080/           # a worker answers
//! curl http://127.0.0.1:9100/metrics    # the numbers of the dispatcher and of each worker
//! ```
//!
//! All numbers come from the front: its dispatcher counts what each worker has adopted and serves.
//! A worker with further numbers exports them in the same way, at an address of its own.
//!
//! The table of all numbers is in the documentation of `fdwire::metrics`.

use std::{
    env,
    io::{Error, Result},
    net::SocketAddr,
    process::{self, ExitCode},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, routing::get};
use clap::Parser;
use fdwire::{
    handoff::{Dispatcher, Incoming, WorkerCommand},
    metrics::{DispatcherMetrics, adoption_buckets},
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::{
    net::TcpListener,
    process::Command,
    select,
    signal::unix::{SignalKind, signal},
};

/// Accepts HTTP connections, lets workers serve them, and exports numbers for Prometheus.
#[derive(Parser)]
struct Arguments {
    /// Where to accept connections for the workers
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,

    /// Where Prometheus finds /metrics
    #[arg(long, default_value = "127.0.0.1:9100")]
    metrics: SocketAddr,

    /// Number of processes that serve
    #[arg(long, default_value_t = 2)]
    workers: usize,

    /// Be a worker. The front starts this program again with this option
    #[arg(long, hide = true)]
    worker: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = if arguments.worker { serve().await } else { front(arguments).await };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<()> {
    let app = Router::new().route("/", get(|| async { format!("{}\n", process::id()) }));
    Incoming::from_stdin()?.serve_axum(app).await;
    Ok(())
}

async fn front(arguments: Arguments) -> Result<()> {
    // The recorder comes first: numbers that are described or counted before it are lost.
    let adoption = Matcher::Full("fdwire_dispatcher_adoption_seconds".to_owned());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(adoption, &adoption_buckets())
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(Error::other)?;

    // The listeners come before the workers, which are not started if an address is taken.
    let (scraped, listener) = (listen(arguments.metrics).await?, listen(arguments.listen).await?);
    let dispatcher = Dispatcher::builder().build();
    for _ in 0..arguments.workers {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--worker");
        dispatcher.spawn_worker(WorkerCommand::from(command).restart(true))?;
    }

    println!("metrics at http://{}/metrics", scraped.local_addr()?);
    tokio::spawn(export(scraped, dispatcher.clone(), recorder));

    println!("listening on http://{}/", listener.local_addr()?);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut serving = std::pin::pin!(dispatcher.serve(listener));
    select! {
        served = &mut serving => return served,
        _ = terminate.recv() => {}
    }
    // The drain ends `serving` when it has accepted what waits in the backlog.
    let ((), served) = tokio::join!(dispatcher.drain(None), serving);
    served
}

/// Answers each scrape with the current numbers.
async fn export(
    listener: TcpListener,
    dispatcher: Dispatcher,
    recorder: PrometheusHandle,
) -> Result<()> {
    let metrics = Arc::new(Mutex::new(DispatcherMetrics::new("web")));
    let scrape = move || {
        metrics.lock().unwrap_or_else(PoisonError::into_inner).update(&dispatcher.stats());
        recorder.run_upkeep();
        let text = recorder.render();
        async move { text }
    };
    axum::serve(listener, Router::new().route("/metrics", get(scrape))).await
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}
