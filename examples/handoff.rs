//! A front that accepts, and two workers that answer: README's two programs in one file.
//!
//! ```text
//! cargo run --example handoff          # then: curl http://127.0.0.1:8080/
//! ```
//!
//! Ctrl-C stops it when everything is answered.

use std::{env, io, net::SocketAddr, process, time::Duration};

use clap::Parser;
use fdwire::handoff::{Connection, Dispatcher, Incoming, WorkerCommand};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::Command,
    signal::ctrl_c,
    try_join,
};

/// Accepts connections, and hands them to two workers that answer over HTTP.
#[derive(Parser)]
struct Args {
    /// Where to listen.
    #[arg(default_value = "127.0.0.1:8080")]
    address: SocketAddr,
    /// Be a worker, with the socket to the front as standard input.
    #[arg(long, hide = true)]
    worker: bool,
}

#[tokio::main]
async fn main() -> process::ExitCode {
    let Args { address, worker } = Args::parse();
    let ended = if worker { serve().await } else { accept(address).await };
    if let Err(error) = &ended {
        eprintln!("error: {error}");
    }
    process::ExitCode::from(u8::from(ended.is_err()))
}

async fn accept(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
    let dispatcher = Dispatcher::new();
    for _ in 0..2 {
        let mut worker = Command::new(env::current_exe()?);
        worker.arg("--worker").process_group(0); // Ctrl-C in a terminal is for this process alone
        dispatcher.spawn_worker(WorkerCommand::from(worker).restart(true))?;
    }
    println!("try: curl http://{}/", listener.local_addr()?);
    let stop = async {
        ctrl_c().await?;
        dispatcher.drain(Some(Duration::from_secs(5))).await;
        Ok(())
    };
    try_join!(dispatcher.serve(listener), stop)?;
    Ok(())
}

async fn serve() -> io::Result<()> {
    let mut incoming = Incoming::from_stdin()?;
    let handle = incoming.handle();
    tokio::spawn(async move {
        while let Some(connection) = incoming.next().await {
            tokio::spawn(answer(connection));
        }
    });
    handle.ended().await; // everything has been answered
    Ok(())
}

/// Reads a request without a body, and answers it.
async fn answer(mut connection: Connection) -> io::Result<()> {
    let mut lines = BufReader::new(&mut connection).lines();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    let body = format!("worker {} answers\n", process::id());
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close", body.len());
    connection.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await
}
