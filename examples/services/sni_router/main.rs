//! A router for TLS connections: it reads the name of the server that a client wants (SNI) and
//! hands the connection, with the bytes that it has read, to a worker of that name. The worker
//! terminates TLS. After that no byte passes through the router, and it has no keys.
//!
//! ```sh
//! cargo run -p fdwire-services --bin sni_router -- 0.0.0.0:443 \
//!     --route example.org=./worker --route www.example.org=./other
//! ```
//!
//! A worker is any program that takes its connections by `Incoming::from_stdin`. A client whose
//! first message is no ClientHello, is too long or too slow, or names no server that there is, gets
//! an answer in its own protocol and is disconnected.

mod hello;

use std::{
    collections::HashMap, error::Error as StdError, io, net::SocketAddr, process::ExitCode,
    str::FromStr, sync::Arc, time::Duration,
};

use clap::Parser;
use fdwire::handoff::{Accepted, Dispatcher, WorkerCommand};
use hello::{Hello, NoHello, UNRECOGNIZED_NAME, alert, read_hello, refuse};
use tokio::{
    net::{TcpListener, TcpStream},
    process::Command,
    sync::Semaphore,
    time::sleep,
};

/// Hands TLS connections to workers by the name of the server that the client wants.
#[derive(Parser)]
struct Args {
    /// Where to listen.
    address: SocketAddr,
    /// A program, with its arguments behind spaces, that serves the connections for a name.
    #[arg(long, value_name = "NAME=PROGRAM", required = true)]
    route: Vec<Route>,
    /// The time that a client has for its first message.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000)]
    patience: u64,
}

#[derive(Debug, Clone)]
struct Route {
    name: String,
    program: String,
    arguments: Vec<String>,
}

impl FromStr for Route {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, command) = text.split_once('=').ok_or("no `=` between name and program")?;
        let mut words = command.split_whitespace().map(str::to_owned);
        let program = words.next().ok_or("no program behind `=`")?;
        Ok(Self { name: name.to_ascii_lowercase(), program, arguments: words.collect() })
    }
}

/// The workers of each name.
type Routes = HashMap<String, Dispatcher>;

/// Clients whose first message is awaited at a time. More wait in the kernel's queue.
const MOST_GREETED: usize = 1000;

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn StdError>> {
    let listener = TcpListener::bind(args.address)
        .await
        .map_err(|error| format!("cannot listen at {}: {error}", args.address))?;
    let mut routes = Routes::new();
    for Route { name, program, arguments } in args.route {
        let dispatcher = routes.entry(name).or_insert_with(|| Dispatcher::builder().build());
        let mut command = Command::new(&program);
        command.args(arguments);
        dispatcher
            .spawn_worker(WorkerCommand::from(command).restart(true))
            .map_err(|error| format!("cannot start {program}: {error}"))?;
    }
    println!("listening at {}", listener.local_addr()?);

    let (routes, patience) = (Arc::new(routes), Duration::from_millis(args.patience));
    let greeted = Arc::new(Semaphore::new(MOST_GREETED));
    loop {
        let permit = Arc::clone(&greeted).acquire_owned().await?;
        let (client, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept: {error}");
                sleep(Duration::from_millis(100)).await; // usually there are too many descriptors
                continue;
            }
        };
        let routes = Arc::clone(&routes);
        tokio::spawn(async move {
            if let Err(error) = route(client, &routes, patience).await {
                tracing::info!("{address}: {error}");
            }
            drop(permit);
        });
    }
}

async fn route(
    mut client: TcpStream,
    routes: &Routes,
    patience: Duration,
) -> Result<(), Box<dyn StdError + Send + Sync>> {
    let Hello { server_name, bytes } = match read_hello(&mut client, patience).await {
        Ok(hello) => hello,
        Err(NoHello::Io(error)) => return Err(error.into()),
        Err(error) => {
            refuse(client, &error.answer()).await?;
            return Err(error.into());
        }
    };
    let name = server_name.unwrap_or_default();
    let Some(dispatcher) = routes.get(&name) else {
        refuse(client, &alert(UNRECOGNIZED_NAME)).await?;
        return Err(format!("no worker for the name {name:?}").into());
    };
    dispatcher.dispatch(Accepted::from(client).read_bytes(bytes).metadata(name)).await?;
    Ok(())
}
