//! A router for TLS connections. It reads the name of the server that a client asks for (SNI) in
//! the first message of TLS, and hands the connection to a worker of that name, together with the
//! bytes that it has read. The worker terminates TLS and speaks HTTP/1.1 or HTTP/2. From then on no
//! byte passes through the router, which never has a key.
//!
//! ```text
//!          ClientHello            the connection, and the bytes of the ClientHello
//!  client ─────────────► router ───────────────────────────────────────────────────► worker
//!     └────────────────────────── the rest of TLS, and HTTP ───────────────────────────┘
//! ```
//!
//! ```sh
//! cargo run -p fdwire-services --bin sni_router -- --demo       # prints curl lines to try
//! ```
//!
//! With a certificate of your own:
//!
//! ```sh
//! openssl req -x509 -newkey rsa:2048 -nodes -keyout one.key -out one.pem -subj /CN=one.test \
//!     -addext subjectAltName=DNS:one.test
//! cargo build -p fdwire-services --bin sni_router
//! worker='target/debug/sni_router --worker one.pem one.key'
//! target/debug/sni_router 127.0.0.1:8443 --route "one.test=$worker"
//! ```
//!
//! Any other program can be a worker, if it takes its connections from `Incoming::from_stdin`.
//!
//! A client gets an answer that it understands, and is disconnected, if it
//!
//! | sends | answer |
//! |---|---|
//! | a name without workers, or no name | alert `unrecognized_name` |
//! | a ClientHello that is cut off, or longer than 16 KiB | alert `decode_error` |
//! | a ClientHello that is broken | the alert that fits |
//! | plain HTTP | status 400 |
//! | another protocol | alert `decode_error` |
//! | no complete ClientHello in time | alert `user_canceled` |
//! | a ClientHello while no worker of its name takes connections | alert `internal_error` |
//!
//! Clients that send nothing do not keep others out: [`clients`]. To see why clients are refused,
//! set `RUST_LOG=sni_router=debug`.

mod clients;
mod demo;
mod hello;
mod router;
mod worker;

use std::{
    error::Error, io, net::SocketAddr, path::PathBuf, process::ExitCode, str::FromStr, sync::Arc,
    time::Duration,
};

use clap::Parser;
use demo::Demo;
use router::Router;
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
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Hands TLS connections to workers, by the name of the server that a client asks for.
#[derive(Parser)]
struct Args {
    /// Where to listen; port 0 takes a free one
    #[arg(default_value = "127.0.0.1:8443")]
    address: SocketAddr,

    /// A program that serves the connections for a name, with its arguments after spaces. Several
    /// for the same name share its connections
    #[arg(long, value_name = "NAME=PROGRAM", required_unless_present_any = ["demo", "worker"])]
    route: Vec<Route>,

    /// Serve one.test and two.test with certificates made on the spot, and print commands to try
    #[arg(long)]
    demo: bool,

    /// The time until a client has to be handed to a worker
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000)]
    patience: u64,

    /// Clients to hold until they are handed over. If there are more, the oldest one is let go
    #[arg(long, value_name = "NUMBER", default_value_t = 500)]
    clients: usize,

    /// Be a worker: serve connections that come over the standard input, with this certificate and
    /// key (PEM)
    #[arg(long, num_args = 2, value_names = ["CERTIFICATE", "KEY"])]
    worker: Option<Vec<PathBuf>>,
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
        let program = words.next().ok_or("no program after `=`")?;
        Ok(Self { name: name.to_owned(), program, arguments: words.collect() })
    }
}

/// How long requests may take after Ctrl-C.
const STOP_LIMIT: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into());
    let events = tracing_subscriber::fmt().with_writer(io::stderr);
    events.with_env_filter(filter.from_env_lossy()).init();
    let args = Args::parse();
    let outcome = match args.worker.as_deref() {
        Some([certificate, key]) => worker::run(certificate, key).await,
        _ => run_router(args).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_router(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let listener = TcpListener::bind(args.address)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", args.address))?;
    let address = listener.local_addr()?;

    let mut terminate = signal(SignalKind::terminate())?; // from a service manager
    let mut router = Router::new(args.clients, Duration::from_millis(args.patience));
    for Route { name, program, arguments } in args.route {
        let mut command = Command::new(program);
        command.args(arguments);
        router.add_worker(&name, command)?;
    }
    let demo = args.demo.then(|| Demo::start(&mut router)).transpose()?;

    println!("listening on {address}");
    if let Some(demo) = &demo {
        demo.print_commands(address);
    }
    let router = Arc::new(router);
    let stop = async {
        select! {
            done = ctrl_c() => done?,
            _ = terminate.recv() => {}
        }
        router.drain(STOP_LIMIT).await; // ends `serve` too
        Ok(())
    };
    try_join!(Arc::clone(&router).serve(listener), stop)?;
    Ok(())
}
