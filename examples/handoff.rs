//! The smallest hand-off that `curl` can speak with: one process accepts, four others answer.
//!
//! ```text
//! cargo run --example handoff                     # then: curl http://127.0.0.1:8080/
//! cargo run --example handoff -- 0.0.0.0:8081     # another address
//! ```

use std::{env, io, process, time::Duration};

use fdwire::handoff::{Connection, Dispatcher, Incoming, WorkerCommand};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::signal::{ctrl_c, unix::SignalKind, unix::signal};
use tokio::{net::TcpListener, process::Command, select, try_join};

#[tokio::main]
async fn main() {
    let done = match env::args().nth(1).as_deref() {
        Some("--worker") => work().await,
        Some("-h" | "--help") => {
            println!("usage: handoff [ADDRESS]  (default: 127.0.0.1:8080)");
            Ok(())
        }
        address => accept(address.unwrap_or("127.0.0.1:8080")).await,
    };
    if let Err(error) = done {
        eprintln!("handoff: {error}");
        process::exit(1);
    }
}

async fn accept(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })?;
    let mut terminate = signal(SignalKind::terminate())?; // from a service manager
    let dispatcher = Dispatcher::new();
    for _ in 0..4 {
        let mut worker = Command::new(env::current_exe()?);
        worker.arg("--worker");
        dispatcher.spawn_worker(WorkerCommand::from(worker).restart(true))?;
    }
    println!("listening on {0}, try: curl http://{0}/", listener.local_addr()?);
    let stop = async {
        select! {
            done = ctrl_c() => done?,
            _ = terminate.recv() => {}
        }
        dispatcher.drain(Some(Duration::from_secs(5))).await; // ends `serve` too
        Ok(())
    };
    try_join!(dispatcher.serve(listener), stop)?;
    Ok(())
}

async fn work() -> io::Result<()> {
    // Ctrl-C goes to all processes of the terminal, and a service manager may signal all processes
    // of a service. The one that accepts acts on it.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut incoming = Incoming::from_stdin()?; // the dispatcher is at the other end
    let handle = incoming.handle();
    // In a task: in `main` itself, each connection would wake one more thread.
    tokio::spawn(async move {
        while let Some(connection) = incoming.next().await {
            tokio::spawn(answer(connection));
        }
    });
    // Everything has been served, and the dispatcher wants no more, or is gone.
    handle.ended().await;
    Ok(())
}

async fn answer(mut connection: Connection) -> io::Result<()> {
    // Read the head of a request, up to the empty line.
    let mut head = BufReader::new((&mut connection).take(8192)).lines();
    while head.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    let text = format!("worker {} answers {}\n", process::id(), connection.peer_addr());
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", text.len());
    connection.write_all(format!("{head}connection: close\r\n\r\n{text}").as_bytes()).await
}
