//! One process accepts TCP connections, others serve them: each accepted connection travels over a Unix socket as a
//! frame with one descriptor, and no client notices.
//!
//! ```text
//!                        frame: peer address + descriptor
//!  clients ──TCP──► front ───────────────────────────────► worker 1 ──HTTP──► clients
//!                     │   ◄───────────────────────────────
//!                     │          frame: number adopted
//!                     └──────────────────────────────────► worker 2 ──HTTP──► clients
//! ```
//!
//! ```text
//! cargo run --example accept_handoff                        # then: curl http://127.0.0.1:8080/
//! cargo run --example accept_handoff -- --demo 2000         # drives itself with 2,000 HTTP clients
//! cargo run --example accept_handoff -- --socket stream     # STREAM in place of SEQPACKET
//! ```
//!
//! The curl line answers with the worker's process id, another one each time. Ctrl-C stops all processes. A worker may be
//! killed at any time: the front keeps a copy of each connection until the worker has said that it took it, and gives
//! those that are left to the other workers.

mod demo;
mod front;
mod worker;

use std::{
    io::{Error, Result},
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use fdwire::SocketKind;
use front::Front;
use tokio::{
    net::TcpListener,
    select,
    signal::unix::{Signal, SignalKind, signal},
};

/// Accepts TCP connections in one process and serves them in others.
#[derive(Parser)]
#[command(name = "accept_handoff")]
struct Arguments {
    /// Where to accept connections; port 0 takes a free one [default: 127.0.0.1:8080, with --demo a free port]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,

    /// Number of processes that serve
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,

    /// Kind of the sockets between the processes
    #[arg(long, value_name = "KIND", default_value = "seqpacket")]
    socket: Kind,

    /// Send that many requests, 64 at a time, each on a connection of its own, print what came back, and stop
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    demo: Option<u32>,

    /// Serve connections that come over the standard input: how the front starts its workers
    #[arg(long, hide = true)]
    worker: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Seqpacket,
    Stream,
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
    let (role, outcome) = match arguments.worker {
        true => (format!("worker {}", std::process::id()), worker::run().await),
        false => ("accept_handoff".to_owned(), run(arguments).await),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{role}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is wrong, in one line and without the advice that follows it.
fn first_paragraph(message: &str) -> String {
    let lines = message.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

async fn run(arguments: Arguments) -> Result<()> {
    let mut signals = Signals::new()?;
    let default_port = if arguments.demo.is_some() { 0 } else { 8080 };
    let listen = arguments.listen.unwrap_or((Ipv4Addr::LOCALHOST, default_port).into());
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|error| Error::new(error.kind(), format!("cannot listen on {listen}: {error}")))?;
    let address = listener.local_addr()?;
    let kind = match arguments.socket {
        Kind::Seqpacket => SocketKind::SeqPacket,
        Kind::Stream => SocketKind::Stream,
    };

    let mut front = select! {
        front = Front::start(listener, kind, arguments.workers) => front?,
        () = signals.stop() => return Ok(()),
    };
    println!("listening on {address}, try: curl http://{address}/");

    let outcome = match arguments.demo {
        None => front.run(signals.stop()).await.map(|()| None),
        Some(requests) => {
            let demo = demo::run(requests, address, front.worker_pids());
            let until = async {
                select! {
                    report = demo => Some(report),
                    () = signals.stop() => None,
                }
            };
            front.run(until).await
        }
    };
    println!("stopping");
    let stopped = front.stop().await;
    if let Some(report) = outcome? {
        report.print()?;
    }
    stopped
}

/// The signals that end the front. Ctrl-C reaches the workers too, which leave it to the front to stop them.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn stop(&mut self) {
        select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
