//! A WebSocket service whose workers drain with Close frames. It sends back what it gets.
//!
//! ```text
//! cargo run -p fdwire-services --bin websocket
//! websocat ws://127.0.0.1:8080/       # the first message is the worker's process id
//! kill -HUP <the front>               # another worker from now on
//! ```
//!
//! When a worker is replaced, it sends each client a Close frame with code 1001 (going away). A
//! client that connects again gets the new worker. Clients that have not answered by the limit are
//! cut, and the worker says how many.

#[path = "../front.rs"]
mod front;

use std::{
    io,
    pin::pin,
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use axum::{
    Router,
    extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code},
    routing::any,
};
use clap::Parser;
use fdwire::handoff::{Incoming, IncomingHandle};
use front::{Arguments, MARGIN};
use tokio::select;

/// WebSockets in worker processes that can be replaced at any time.
#[derive(Parser)]
#[command(name = "websocket")]
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
    let (handle, cut) = (incoming.handle(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&cut);
    let upgrade = move |upgrade: WebSocketUpgrade| async move {
        upgrade.on_upgrade(async move |mut socket| {
            select! {
                _ = talk(&mut socket, &handle) => {} // an error is that of a client which is gone
                () = handle.drain_over(MARGIN) => drop(count.fetch_add(1, Relaxed)),
            }
        })
    };
    // Returns when the worker has drained and all connections have ended, WebSockets too.
    incoming.serve_axum(Router::new().route("/", any(upgrade))).await;
    println!("worker {}: {} connections were cut", process::id(), cut.load(Relaxed));
    Ok(())
}

/// Ends when the client has closed the WebSocket, or has answered the Close frame.
async fn talk(socket: &mut WebSocket, handle: &IncomingHandle) -> Result<(), axum::Error> {
    let mut draining = pin!(handle.drain_requested());
    let mut is_closing = false;
    socket.send(Message::from(process::id().to_string())).await?;
    loop {
        let message = select! {
            message = socket.recv() => message,
            () = &mut draining, if !is_closing => {
                is_closing = true;
                let reason = "this worker is replaced; connect again".into();
                let close = CloseFrame { code: close_code::AWAY, reason };
                socket.send(Message::Close(Some(close))).await?;
                continue;
            }
        };
        match message.transpose()? {
            // Any message after the Close frame was sent before the client had it: no answer.
            Some(Message::Text(_) | Message::Binary(_)) if is_closing => {}
            Some(message @ (Message::Text(_) | Message::Binary(_))) => socket.send(message).await?,
            Some(Message::Ping(_) | Message::Pong(_)) => {} // they are answered already
            Some(Message::Close(_)) | None => return Ok(()),
        }
    }
}
