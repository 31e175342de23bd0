//! A QUIC server that takes over from itself: start it again, and the new process replaces the old
//! one. Connections that are open go on with the process that has accepted them.
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
    path::PathBuf,
    sync::Arc,
};

use clap::Parser;
use fdwire::takeover::{self, Listeners, Options};
use quinn::{Connection, Endpoint, TokioRuntime};
use tokio::select;

use crate::{secrets::Secrets, socket::MovingSocket};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A connection may stay for a long time, and so may its process.
const GENERATIONS: usize = 100;

#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Address to receive at.
    #[arg(long, default_value = "127.0.0.1:4433")]
    listen: SocketAddr,
    /// Where a new process finds the running one.
    #[arg(long, default_value = "/tmp/fdwire-quic-restart")]
    path: PathBuf,
    /// Where the first process writes its certificate, for clients.
    #[arg(long, default_value = "/tmp/fdwire-quic-restart.der")]
    certificate: PathBuf,
    /// Shows 20 restarts under load.
    #[arg(long)]
    demo: bool,
    /// Number of connections that the demo keeps open.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.demo {
        return demo::run(arguments.connections).await;
    }
    serve(arguments).await
}

async fn serve(arguments: Arguments) -> Result<()> {
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.add("quic", UdpSocket::bind(arguments.listen)?)?;
        Ok(listeners)
    };
    let options = Options::default().max_old_generations(GENERATIONS);
    let mut pending = takeover::bind_or_take(&arguments.path, options, bind).await?;

    // All generations have one certificate, and the keys of what clients keep: tokens and resets.
    let secrets = match pending.take_state().first() {
        Some(state) => Secrets::from_bytes(&state.payload)?,
        None => Secrets::generate()?,
    };
    let state = secrets.to_bytes();
    fs::write(&arguments.certificate, secrets.certificate())?;
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
        // Its last connections end, or the new process does.
        select! {
            () = endpoint.wait_idle() => if server.drained().await { break },
            undone = server.undone() => if !undone {
                // The new process was replaced as well. The one that serves now still forwards.
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

/// For errors that end the demo.
fn other(reason: impl Into<String>) -> io::Error {
    io::Error::other(reason.into())
}
