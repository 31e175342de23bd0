//! A QUIC server that takes over from itself: start it again, and the new process replaces the
//! running one. Open connections stay with the process that has accepted them.
//!
//! ```text
//! cargo run -p fdwire-services --bin quic_restart            # then again, in another terminal
//! cargo run -p fdwire-services --bin quic_restart -- --demo  # 1,000 connections, 20 restarts
//! ```

mod demo;
mod secrets;
mod socket;

use std::{
    fs, io,
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Parser;
use fdwire::takeover::{self, Listeners, Options};
use quinn::{Connection, Endpoint, TokioRuntime};
use tokio::select;

use crate::{secrets::Secrets, socket::MovingSocket};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The number of old processes that may be left. Each stays as long as its connections do.
const GENERATIONS: usize = 100;

/// Answers over QUIC, and replaces the server that is running.
#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Address to receive on.
    #[arg(long, default_value = "127.0.0.1:4433")]
    listen: SocketAddr,
    /// Path of the socket through which a new process finds the running one.
    #[arg(long, default_value = "/tmp/fdwire-quic-restart")]
    path: PathBuf,
    /// File that the certificate is written to, for clients.
    #[arg(long, default_value = "/tmp/fdwire-quic-restart.der")]
    certificate: PathBuf,
    /// Show 20 restarts under load.
    #[arg(long)]
    demo: bool,
    /// Number of connections that the demo keeps open.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.demo {
        true => demo::run(arguments.connections).await,
        false => serve(arguments).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> Result<()> {
    let bind = || {
        let mut listeners = Listeners::new();
        let socket = UdpSocket::bind(arguments.listen);
        listeners.add("quic", socket.map_err(|error| at(arguments.listen, error))?)?;
        Ok(listeners)
    };
    let options = Options::default().max_old_generations(GENERATIONS);
    let pending = takeover::bind_or_take(&arguments.path, options, bind).await;
    let mut pending = pending.map_err(|error| format!("{}: {error}", arguments.path.display()))?;

    // All generations have the same certificate, and the same keys for what clients keep: tokens
    // and resets.
    let secrets = match pending.take_state().first() {
        Some(state) => Secrets::from_bytes(&state.payload)?,
        None => Secrets::generate()?,
    };
    let state = secrets.to_bytes();
    write(&arguments.certificate, secrets.certificate())?;
    let config = secrets.server_config()?;

    let server = pending.ready().await?;
    server.send_state(move || vec![fdwire::Frame::new(state.clone())]);
    let ids = secrets.connection_ids(server.generation());
    let endpoint_config = secrets.endpoint_config(ids.clone());
    let datagrams = server.datagrams("quic", 0)?.forwarding(move |datagram, _| ids.owner(datagram));
    let socket = Arc::new(MovingSocket::new(datagrams)?);
    let endpoint = Endpoint::new_with_abstract_socket(
        endpoint_config,
        Some(config),
        socket,
        Arc::new(TokioRuntime),
    )?;
    println!("ready");

    tokio::spawn(accept(endpoint.clone(), server.generation()));
    loop {
        server.replaced().await;
        // Either the last connections of this process end, or the new process ends.
        select! {
            () = endpoint.wait_idle() => if server.drained().await { break },
            undone = server.undone() => if !undone {
                // The new process was replaced too. The process that serves now forwards to this
                // one.
                endpoint.wait_idle().await;
                break;
            }
        }
    }
    println!("left");
    Ok(())
}

async fn accept(endpoint: Endpoint, generation: u32) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            if let Ok(connection) = incoming.await {
                let _ = answer(connection, generation).await; // the client has closed it
            }
        });
    }
}

/// Answers each request with the number of this process.
async fn answer(connection: Connection, generation: u32) -> Result<()> {
    loop {
        let (mut send, mut receive) = connection.accept_bi().await?;
        receive.read_to_end(100).await?;
        send.write_all(generation.to_string().as_bytes()).await?;
        send.finish()?;
    }
}

/// Names the address that an error is about.
fn at(address: SocketAddr, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot receive on {address}: {error}"))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Makes an error that ends the demo.
fn other(reason: impl Into<String>) -> io::Error {
    io::Error::other(reason.into())
}
