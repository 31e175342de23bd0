//! HTTP clients, each on a connection of its own.

use std::{
    io::Result,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{
    join,
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// The most clients: the demo has that many addresses for them.
pub(crate) const MOST_CLIENTS: u32 = 10_000_000;

const AT_A_TIME: usize = 64;
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Demo {
    pub(crate) clients: Vec<Client>,
    pub(crate) elapsed: Duration,
}

pub(crate) struct Client {
    pub(crate) address: Ipv4Addr,
    pub(crate) outcome: Outcome,
}

pub(crate) enum Outcome {
    /// Answered by the worker of this process, this long after the client began to connect.
    Answered { pid: u32, latency: Duration },
    /// The connection ended before the answer did.
    Broken(String),
    /// The request failed in any other way.
    Failed { connected: bool, error: String },
}

/// Sends requests to an IPv4 address.
pub(crate) async fn run(requests: u32, address: SocketAddr) -> Demo {
    let begin = Instant::now();
    let clients = stream::iter(0..requests)
        .map(|serial| async move {
            let client = address_of(serial);
            Client { address: client, outcome: request(client, address).await }
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    Demo { clients, elapsed: begin.elapsed() }
}

/// The address of a client has its serial number: all of 127.0.0.0/8 is this machine. So a worker
/// can identify the client before it has read a byte.
fn address_of(serial: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::new(127, 1, 0, 0)) + serial).into()
}

async fn request(client: Ipv4Addr, address: SocketAddr) -> Outcome {
    let begin = Instant::now();
    let failed =
        |connected, error: &dyn ToString| Outcome::Failed { connected, error: error.to_string() };
    let stream = match timeout(PATIENCE, connect(client, address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return failed(false, &error),
        Err(error) => return failed(false, &error),
    };
    match timeout(PATIENCE, exchange(stream, address)).await {
        Ok(Ok((200, body))) => match body.split(' ').nth(1).and_then(|pid| pid.parse().ok()) {
            Some(pid) => Outcome::Answered { pid, latency: begin.elapsed() },
            None => failed(true, &"the answer names no worker"),
        },
        Ok(Ok((status, _))) => failed(true, &format!("status {status}")),
        Ok(Err(error)) => Outcome::Broken(error.to_string()),
        Err(_) => failed(true, &"no answer, or no end of the connection"),
    }
}

async fn connect(client: Ipv4Addr, address: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((client, 0).into())?;
    socket.connect(address).await
}

/// Returns the answer when the worker has ended the connection.
async fn exchange(stream: TcpStream, address: SocketAddr) -> hyper::Result<(u16, String)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/")
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("the request is valid");
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    // A client that has the whole answer was served, even if the connection fails after it.
    let (answer, _ended) = join!(answer, connection);
    answer
}
