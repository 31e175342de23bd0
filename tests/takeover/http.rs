//! axum behind a server that is replaced: how the connections of its clients end.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo, routing::get};
use fdwire::takeover::{Finished, Options, Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    task::JoinHandle,
};

use crate::{common::*, control_path, first_with, request};

const HOUR: Duration = Duration::from_secs(3600);

/// A server that answers at `/` with the client's address, and at `/slow` when the test lets it.
struct Site {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    server: Arc<Server>,
    address: SocketAddr,
    answer_slow: Arc<Notify>,
    slow_requested: Arc<Notify>,
    serving: JoinHandle<Finished>,
}

impl Site {
    fn new(spread: Duration, deadline: Duration) -> Self {
        let (_directory, path) = control_path();
        let server = Arc::new(first_with(&path, Options::default().drain(spread, deadline)));
        let address = crate::address(&server);
        let (answer_slow, slow_requested) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let slow = {
            let (answer_slow, slow_requested) =
                (Arc::clone(&answer_slow), Arc::clone(&slow_requested));
            async move || {
                slow_requested.notify_one();
                answer_slow.notified().await;
                "slow"
            }
        };
        let root = async |ConnectInfo(client): ConnectInfo<SocketAddr>| client.to_string();
        let router = Router::new().route("/", get(root)).route("/slow", get(slow));
        let http = server.gated("http", 0).unwrap();
        let serving = {
            let server = Arc::clone(&server);
            tokio::spawn(async move { server.serve_axum(http, router).await })
        };
        Self { _directory, path, server, address, answer_slow, slow_requested, serving }
    }

    async fn replace(&self) -> Server {
        let new = request(&self.path).await.ready().await.unwrap();
        self.server.replaced().await;
        new
    }
}

/// A client of HTTP/1.1.
struct Http1(TcpStream);

impl Http1 {
    async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    /// Sends a request.
    async fn get(&mut self, page: &str) {
        self.0
            .write_all(format!("GET {page} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes())
            .await
            .unwrap();
    }

    /// Reads an answer whose body ends with `body`. Returns its headers.
    async fn answer(&mut self, body: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(format!("\r\n\r\n{body}").as_bytes()) {
            text.push(self.0.read_u8().await.unwrap());
        }
        String::from_utf8(text).unwrap().to_ascii_lowercase()
    }

    async fn check_closed(&mut self) {
        assert_eq!(self.0.read(&mut [0]).await.unwrap(), 0);
    }
}

#[test]
fn answers_close_connections_from_the_moment_at_which_the_server_is_replaced() {
    run(async {
        let site = Site::new(HOUR, HOUR);
        let mut client = Http1::connect(site.address).await;
        let body = client.0.local_addr().unwrap().to_string();
        for _ in 0..2 {
            client.get("/").await;
            assert!(!client.answer(&body).await.contains("connection: close"));
        }
        // One client has sent its request before the takeover. Another sends one afterwards.
        let mut slow = Http1::connect(site.address).await;
        slow.get("/slow").await;
        site.slow_requested.notified().await;
        let new = site.replace().await;
        site.answer_slow.notify_one();
        assert!(slow.answer("slow").await.contains("connection: close"));
        slow.check_closed().await;
        client.get("/").await;
        assert!(client.answer(&body).await.contains("connection: close"));
        client.check_closed().await;
        drop(new);
        // After the takeover is undone, connections stay open again.
        assert!(site.server.undone().await);
        let mut client = Http1::connect(site.address).await;
        client.get("/").await;
        let body = client.0.local_addr().unwrap().to_string();
        assert!(!client.answer(&body).await.contains("connection: close"));
    });
}

#[test]
fn silent_clients_are_closed_within_the_spread_and_slow_ones_at_the_deadline() {
    run(async {
        let site = Site::new(Duration::from_millis(50), Duration::from_secs(2));
        let mut silent = Vec::new();
        for _ in 0..20 {
            let mut client = Http1::connect(site.address).await;
            client.get("/").await;
            let body = client.0.local_addr().unwrap().to_string();
            client.answer(&body).await;
            silent.push(client);
        }
        let mut slow = Http1::connect(site.address).await;
        slow.get("/slow").await;
        site.slow_requested.notified().await;
        let _new = site.replace().await;
        for mut client in silent {
            client.check_closed().await;
        }
        assert_eq!(site.serving.await.unwrap().unfinished, 1);
        assert!(slow.0.read_u8().await.is_err());
    });
}

/// Reads a frame of HTTP/2: its type, its flags, and its payload.
async fn frame(stream: &mut TcpStream) -> Option<(u8, u8, Vec<u8>)> {
    let mut header = [0; 9];
    stream.read_exact(&mut header).await.ok()?;
    let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some((header[3], header[4], payload))
}

#[test]
fn clients_of_http_2_get_goaway_and_finish_their_requests() {
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    run(async {
        // A client of HTTP/2 has sent a request that is not answered yet.
        let site = Site::new(Duration::from_millis(50), HOUR);
        let mut client = TcpStream::connect(site.address).await.unwrap();
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        client.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await.unwrap();
        // A request of http://localhost/slow, with HPACK's static table and unindexed literals.
        let block = [&[0x82, 0x86][..], &[0x04, 5], b"/slow", &[0x01, 9], b"localhost"].concat();
        client.write_all(&[0, 0, block.len() as u8, 1, 0b101, 0, 0, 0, 1]).await.unwrap();
        client.write_all(&block).await.unwrap();
        site.slow_requested.notified().await;
        // The server is replaced. The client gets two GOAWAYs, and then the answer.
        let _new = site.replace().await;
        let mut last_stream = None;
        let mut body = Vec::new();
        while let Some((kind, flags, payload)) = frame(&mut client).await {
            match kind {
                0 => body.extend(payload),
                PING if flags == 0 => {
                    client.write_all(&[0, 0, 8, PING, 1, 0, 0, 0, 0]).await.unwrap();
                    client.write_all(&payload).await.unwrap();
                }
                GOAWAY => {
                    let stream = u32::from_be_bytes(payload[..4].try_into().unwrap());
                    let error = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                    assert_eq!(error, 0, "NO_ERROR");
                    if last_stream.replace(stream).is_some() {
                        site.answer_slow.notify_one(); // the request is finished after GOAWAY
                    }
                }
                _ => {}
            }
        }
        assert_eq!((last_stream, &body[..]), (Some(1), &b"slow"[..]));
        assert_eq!(site.serving.await.unwrap().unfinished, 0);
    });
}
