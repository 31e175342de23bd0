//! Clients of the service `websocket`, with tokio-tungstenite.

mod common;

use common::{Front, soon};
use futures::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, protocol::frame::coding::CloseCode},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_websocket");

type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Connects a WebSocket. Returns it with the process that serves it.
async fn connect(front: &Front) -> (Client, String) {
    let url = format!("ws://{}/", front.address);
    let (mut client, _) = soon("a WebSocket", connect_async(url)).await.unwrap();
    let worker = next(&mut client).await.into_text().unwrap();
    (client, worker.to_string())
}

async fn next(client: &mut Client) -> Message {
    soon("a message", client.next()).await.expect("no end").unwrap()
}

async fn echoes(client: &mut Client, text: &str) {
    client.send(Message::from(text)).await.unwrap();
    assert_eq!(next(client).await, Message::from(text));
}

#[tokio::test]
async fn clients_of_a_worker_that_is_replaced_receive_a_close_and_find_the_new_one() {
    let mut front = Front::start(PROGRAM, 30).await;
    let (mut first, old) = connect(&front).await;
    let (mut second, same) = connect(&front).await;
    assert_eq!(old, same);
    echoes(&mut first, "hello").await;
    echoes(&mut second, "hello").await;

    front.signal("-HUP").await;
    for client in [&mut first, &mut second] {
        let Message::Close(Some(close)) = next(client).await else { panic!("no Close frame") };
        assert_eq!(close.code, CloseCode::Away);
        // The client's library answers. Then the worker ends the connection.
        assert!(soon("the end", client.next()).await.is_none());
    }
    let (mut third, new) = connect(&front).await;
    assert_ne!(new, old);
    echoes(&mut third, "hello again").await;
    assert_eq!(front.line(&format!("worker {old}: ")).await, "0 connections were cut");
    third.close(None).await.unwrap();
    while third.next().await.is_some() {}
    front.end().await;
}

#[tokio::test]
async fn a_client_that_does_not_answer_the_close_frame_is_cut_at_the_limit() {
    let mut front = Front::start(PROGRAM, 2).await;
    let (mut good, worker) = connect(&front).await;
    let mut bad = TcpStream::connect(&front.address).await.unwrap();
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
        Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    bad.write_all(request.as_bytes()).await.unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(worker.as_bytes()) {
        soon("the greeting", bad.read_exact(&mut byte)).await.unwrap();
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));

    front.signal("-HUP").await;
    assert!(matches!(next(&mut good).await, Message::Close(Some(_))));
    assert!(soon("the end", good.next()).await.is_none());
    // A Close frame with code 1001 (RFC 6455), and the end.
    let mut rest = Vec::new();
    soon("the end", bad.read_to_end(&mut rest)).await.unwrap();
    assert_eq!((rest[0], &rest[2..4]), (0x88, &1001_u16.to_be_bytes()[..]), "{rest:?}");
    assert_eq!(front.line(&format!("worker {worker}: ")).await, "1 connections were cut");
    front.end().await;
}
