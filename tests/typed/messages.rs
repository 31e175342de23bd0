//! `Typed` over both kinds of socket, with and without a runtime.

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    thread,
};

use bytes::Bytes;
use fdwire::{
    Framed, Socket, SocketKind, blocking,
    typed::{FdError, Passed, SealedMemfd, SharedFd, Typed, TypedError},
};
use futures::{SinkExt, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::common::{counted, encoded, mark_of, marked, raw_send, role_socket, spawn_role};

#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Text(String),
    Any(Vec<Passed<OwnedFd>>),
    Log { name: String, file: Passed<File> },
    Serve { connection: Passed<TcpStream>, control: Option<Passed<UnixStream>> },
    Image { width: u32, pixels: Passed<SealedMemfd> },
}

fn pair(kind: SocketKind) -> (Framed<Typed<Message>>, Framed<Typed<Message>>) {
    let (a, b) = Socket::pair(kind).unwrap();
    (Framed::new(a, Typed::default()), Framed::new(b, Typed::default()))
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

#[test]
fn each_field_of_a_message_arrives_as_the_type_that_was_sent() {
    counted(async |kind| {
        // Send a message of each variant.
        let (mut a, mut b) = pair(kind);
        let (mut client, connection) = tcp_pair();
        let (mut controller, control) = UnixStream::pair().unwrap();
        a.feed(Message::Text("no descriptor".into())).await.unwrap();
        a.feed(Message::Any((0..253).map(|mark| marked(mark).into()).collect())).await.unwrap();
        a.feed(Message::Log { name: "log".into(), file: File::from(marked(7)).into() })
            .await
            .unwrap();
        let control = Some(control.into());
        a.feed(Message::Serve { connection: connection.into(), control }).await.unwrap();
        let pixels = SealedMemfd::new(&[9; 100_000]).unwrap().into();
        a.send(Message::Image { width: 10, pixels }).await.unwrap();

        // Receive them.
        let mut next = async || b.next().await.unwrap().unwrap();
        assert!(matches!(next().await, Message::Text(text) if text == "no descriptor"));
        let Message::Any(fds) = next().await else { panic!("not what was sent") };
        assert!(fds.iter().map(mark_of).eq(0..253));
        let Message::Log { name, file } = next().await else { panic!("not what was sent") };
        assert_eq!((&name[..], mark_of(&file.into_inner())), ("log", 7));
        let Message::Serve { connection, control: Some(control) } = next().await else {
            panic!("not what was sent")
        };
        connection.into_inner().write_all(b"tcp").unwrap();
        control.into_inner().write_all(b"unix").unwrap();
        let Message::Image { width: 10, pixels } = next().await else {
            panic!("not what was sent")
        };
        let pixels = Bytes::from_owner(pixels.into_inner().map().unwrap());
        assert!(pixels.len() == 100_000 && pixels.iter().all(|pixel| *pixel == 9));

        // The sender has kept no copy, so both peers see the end.
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        controller.read_to_string(&mut text).unwrap();
        assert_eq!(text, "tcpunix");
    });
}

#[test]
fn typed_messages_go_there_and_back_without_a_runtime() {
    counted(async |kind| {
        let (a, b) = blocking::Socket::pair(kind).unwrap();
        let echo = thread::spawn(move || {
            let mut echo = blocking::Framed::new(b, Typed::<Message>::default());
            while let Some(message) = echo.next() {
                echo.send(message.unwrap()).unwrap();
            }
        });
        let mut tool = blocking::Framed::new(a, Typed::default());
        tool.send(Message::Log {
            name: "there and back".into(),
            file: File::from(marked(5)).into(),
        })
        .unwrap();
        let Message::Log { name, file } = tool.next().unwrap().unwrap() else {
            panic!("not what was sent")
        };
        assert_eq!((&name[..], mark_of(&file)), ("there and back", 5));
        tool.close().unwrap();
        echo.join().unwrap();
    });
}

#[test]
fn a_shared_descriptor_can_be_sent_many_times_and_is_kept() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut tx = Framed::with_codecs(a, (), Typed::<Vec<SharedFd>>::default());
        let mut rx = Framed::with_codecs(b, Typed::<Vec<Passed<OwnedFd>>>::default(), ());
        let shared = SharedFd::new(marked(3));
        for _ in 0..3 {
            tx.send(vec![shared.clone(), shared.clone()]).await.unwrap();
            let received = rx.try_next().await.unwrap().unwrap();
            assert_eq!(received.iter().map(mark_of).collect::<Vec<_>>(), [3, 3]);
        }
        assert_eq!(mark_of(&shared), 3);
    });
}

#[test]
fn a_descriptor_of_the_wrong_kind_ends_the_stream_and_is_closed() {
    counted(async |kind| {
        let (listener, (_client, tcp)) = (TcpListener::bind("127.0.0.1:0").unwrap(), tcp_pair());
        let (unix, _peer) = UnixStream::pair().unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();

        // The first byte is the variant: 2 has a file, 3 a TCP connection, 4 sealed memory.
        let cases: [(&[u8], OwnedFd, &str); 5] = [
            (
                &[2, 0, 0],
                unix.into(),
                "expected a file that is not a socket, got a stream socket of AF_UNIX",
            ),
            (
                &[3, 0, 0],
                listener.into(),
                "expected a stream socket of IP, got a listening stream socket of IP",
            ),
            (&[3, 0, 0], reader.into(), "expected a stream socket of IP, got a read-only pipe"),
            (
                &[4, 1, 0],
                marked(1),
                "expected a memfd sealed against changes, got a read-write regular file",
            ),
            (
                &[4, 1, 0],
                tcp.into(),
                "expected a memfd sealed against changes, got a stream socket of IP",
            ),
        ];

        // Each ends the stream with a reason.
        for (payload, fd, expected) in cases {
            let (a, peer) = Socket::pair(kind).unwrap();
            let mut a = Framed::new(a, Typed::<Message>::default());
            raw_send(&peer, &encoded(payload, 1), &[fd]);
            let error = a.next().await.unwrap().unwrap_err();
            assert!(
                matches!(error, TypedError::Fd(FdError::Mismatch { index: 0, .. })),
                "{error:?}"
            );
            assert_eq!(error.to_string(), format!("descriptor 0 of the message: {expected}"));
            assert!(a.next().await.is_none());
        }
    });
}

#[test]
fn an_item_that_is_refused_by_a_closed_connection_comes_back_with_its_descriptor() {
    counted(async |kind| {
        let (mut a, _b) = pair(kind);
        a.close().await.unwrap();
        let log = Message::Log { name: "late".into(), file: File::from(marked(4)).into() };
        let refused = a.send(log).await.unwrap_err();
        let Some(Message::Log { file, .. }) = refused.item else { panic!("no item came back") };
        assert_eq!(mark_of(&file), 4);
    });
}

/// The other process is a child that inherits nothing but its socket.
#[test]
fn another_process_sends_a_typed_message_back() {
    const TEST: &str = "messages::another_process_sends_a_typed_message_back";
    if let Some(socket) = role_socket(TEST) {
        let socket = blocking::Socket::try_from(socket).unwrap();
        let mut service = blocking::Framed::new(socket, Typed::<Message>::default());
        while let Some(Ok(message)) = service.next() {
            service.send(message).unwrap();
        }
        return;
    }
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut child = spawn_role(TEST, None, b.into());
        let mut a = Framed::new(a, Typed::<Message>::default());
        let pixels = SealedMemfd::new(b"shared").unwrap().into();
        a.send(Message::Image { width: 1, pixels }).await.unwrap();
        let Some(Ok(Message::Image { pixels, .. })) = a.next().await else { panic!("no answer") };
        assert_eq!(&pixels.into_inner().map().unwrap()[..], b"shared");
        drop(a);
        assert!(child.wait().unwrap().success());
    });
}
