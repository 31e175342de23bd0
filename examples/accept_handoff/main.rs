//! One process accepts TCP connections, others serve them over HTTP, and no client notices: not
//! even when workers are killed.
//!
//! ```text
//!                       the accepted connection
//!  clients ──TCP──► front ──────────────────────► worker 1 ──HTTP──► clients
//!                     │   ◄──────────────────────
//!                     │          adopted
//!                     └─────────────────────────► worker 2 ──HTTP──► clients
//! ```
//!
//! ```text
//! # Then: curl http://127.0.0.1:8080/
//! cargo run --example accept_handoff
//! # The same, and a worker is killed twice a second.
//! cargo run --example accept_handoff -- --kill-every 500
//! # Drives itself with 20,000 HTTP clients.
//! cargo run --example accept_handoff -- --demo 20000 --kill-every 50
//! # Shows the workers meanwhile.
//! cargo run --example accept_handoff -- --watch --demo 20000 --kill-every 50
//! # STREAM in place of SEQPACKET.
//! cargo run --example accept_handoff -- --socket stream
//! # Logs more of its work.
//! RUST_LOG=fdwire=debug cargo run --example accept_handoff
//! ```
//!
//! The curl line shows the process id of a worker, and of another one each time. Ctrl-C stops all
//! processes after they have finished their connections. SIGUSR2 replaces the workers. If the new
//! ones do not come up, the old ones go on.
//!
//! [`front`] and [`worker`] are the two sides, and all that an application needs. The rest belongs
//! to the demo: [`kill`] kills workers, [`demo`] has the clients, and [`report`] shows what became
//! of each client, from the [`journal`] that the workers have written.

mod demo;
mod front;
mod journal;
mod kill;
mod report;
mod watch;
mod worker;

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use fdwire::SocketKind;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Accepts TCP connections in one process and serves them in others.
#[derive(Parser)]
#[command(
    name = "accept_handoff",
    after_help = "Signals to the first process: SIGINT and SIGTERM stop all processes, SIGUSR2 \
                  replaces the workers by new ones"
)]
struct Arguments {
    /// Where to accept connections; port 0 takes a free one [default: 127.0.0.1:8080, with --demo a
    /// free port]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,

    /// Number of processes that serve
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    workers: u16,

    /// One more worker: a program that speaks the hand-off protocol at its standard input, such as
    /// examples/foreign_workers/worker.py; may be given again
    #[arg(long, value_name = "PROGRAM")]
    also: Vec<PathBuf>,

    /// Kind of the sockets between the processes
    #[arg(long, value_name = "KIND", default_value = "seqpacket")]
    socket: Kind,

    /// Send N requests, 64 at a time, each on a connection of its own, print what became of
    /// them, and stop
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(demo::MOST_CLIENTS))
    )]
    demo: Option<u32>,

    /// Kill a worker at random (SIGKILL) every MS milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    kill_every: Option<u64>,

    /// Show what the workers do: a picture that changes if the standard output is a terminal, else
    /// a line each second
    #[arg(long)]
    watch: bool,

    /// Be worker number N, for connections that come over the standard input: how the front starts
    /// its workers
    #[arg(long, value_name = "N", hide = true)]
    worker: Option<u16>,

    /// Where the worker writes what it was given
    #[arg(long, value_name = "PATH", hide = true)]
    journal: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Seqpacket,
    Stream,
}

impl From<Kind> for SocketKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Seqpacket => Self::SeqPacket,
            Kind::Stream => Self::Stream,
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            eprintln!("{}", first_paragraph(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
    };
    // In the demo, workers die all the time, and with `--watch` a picture shows it.
    let level = if arguments.demo.is_some() || arguments.watch {
        LevelFilter::ERROR
    } else {
        LevelFilter::INFO
    };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    // If nobody reads the log (`| head`), events are dropped. Printing would panic in the
    // dispatcher's tasks.
    let events = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false);
    events.log_internal_errors(false).init();

    let (role, outcome) = match arguments.worker {
        Some(number) => (
            format!("worker {}", std::process::id()),
            worker::run(number, arguments.journal.as_deref()).await,
        ),
        None => ("accept_handoff".to_owned(), front::run(arguments).await),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{role}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the error in one line, without the advice that follows it.
fn first_paragraph(message: &str) -> String {
    let lines = message.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}
