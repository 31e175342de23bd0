//! A gRPC service whose connections another process accepts: tonic serves them as they come from
//! the hand-off, without an adapter.
//!
//! ```text
//! cargo run -p fdwire-services --bin grpc
//! grpcurl -plaintext 127.0.0.1:8080 grpc.health.v1.Health/Check    # unary
//! grpcurl -plaintext 127.0.0.1:8080 grpc.health.v1.Health/Watch    # a stream
//! kill -HUP <the front>                                            # another worker from now on
//! ```
//!
//! The service is the standard one for health (`grpc.health.v1.Health`), so nothing has to be
//! generated. One of your own goes in its place.
//!
//! When a worker is replaced, its clients get a GOAWAY: they send new calls on another connection,
//! which goes to the new worker. Calls that are under way go on, streams too, until the limit.
//!
//! A call that tonic's client has not sent yet when the GOAWAY comes fails there with `Cancelled`.
//! No worker has seen it, so it may be sent again.

#[path = "../front.rs"]
mod front;

use std::{
    convert::Infallible,
    io,
    process::{self, ExitCode},
};

use clap::Parser;
use fdwire::handoff::{Incoming, IncomingHandle};
use front::{Arguments, MARGIN};
use futures::StreamExt;
use tokio::{select, spawn};
use tonic::{codegen::http::Response, transport::Server};
use tonic_health::{
    ServingStatus::NotServing,
    server::{HealthReporter, health_reporter},
};
use tower::util::MapResponseLayer;

/// gRPC in worker processes that can be replaced at any time.
#[derive(Parser)]
#[command(name = "grpc")]
struct Program {
    #[command(flatten)]
    arguments: Arguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    front::main(Program::parse().arguments, serve()).await
}

async fn serve() -> io::Result<()> {
    let incoming = Incoming::from_stdin()?;
    let handle = incoming.handle();
    let (reporter, health) = health_reporter();
    spawn(watch_drain(handle.clone(), reporter));

    // Each answer tells which worker it is from.
    let name_worker = MapResponseLayer::new(|mut response: Response<_>| {
        response.headers_mut().insert("worker", process::id().into());
        response
    });
    let router = Server::builder().layer(name_worker).add_service(health);
    let connections = incoming.map(Ok::<_, Infallible>);
    let serving = router.serve_with_incoming_shutdown(connections, handle.drain_requested());
    select! {
        served = serving => served.map_err(io::Error::other)?,
        () = handle.drain_over(MARGIN) => {
            // They end with this process.
            println!("worker {}: {} connections are cut", process::id(), handle.stats().active);
            return Ok(());
        }
    }
    handle.ended().await;
    Ok(())
}

/// Tells those that watch the service when it ends here.
async fn watch_drain(handle: IncomingHandle, reporter: HealthReporter) {
    handle.drain_requested().await;
    reporter.set_service_status("", NotServing).await;
}
