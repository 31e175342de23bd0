//! Varlink, against `zlink` and against systemd's own implementation.

use std::{
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
};

use fdwire::{
    Framed, Socket, SocketKind,
    typed::{Passed, Varlink},
};
use futures::{SinkExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zlink::Listener;

use crate::common::{counted, installed, mark_of, marked, skipped};

/// A call as in systemd's interfaces: `fileDescriptor` is the position of the descriptor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "method", content = "parameters")]
enum Call<F> {
    #[serde(rename = "org.example.Store.Add", rename_all = "camelCase")]
    Add { name: String, file_descriptor: F },
    #[serde(rename = "org.example.Store.Count")]
    Count,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reply<F> {
    parameters: Parameters<F>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parameters<F> {
    fds: Vec<F>,
}

type Client = Framed<Varlink<Reply<Passed<OwnedFd>>>, Varlink<Call<Passed<OwnedFd>>>>;

fn client(socket: Socket) -> Client {
    Framed::with_codecs(socket, Varlink::default(), Varlink::default())
}

fn add(mark: u32) -> Call<Passed<OwnedFd>> {
    Call::Add { name: format!("file {mark}"), file_descriptor: marked(mark).into() }
}

/// Many calls are sent before the other side reads the first one.
#[test]
fn zlink_receives_each_descriptor_with_its_call_and_answers_with_descriptors() {
    counted(async |kind| {
        if kind != SocketKind::Stream {
            return; // varlink is a protocol of streams
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut listener = zlink::tokio::unix::bind(&path).unwrap();
        let mut client = client(Socket::connect(&path, kind).await.unwrap());
        let mut service = listener.accept().await.unwrap().unwrap();
        for mark in 1..=3 {
            client.feed(Call::Count).await.unwrap();
            client.feed(add(mark)).await.unwrap();
        }
        client.flush().await.unwrap();

        // The service receives each call with its own descriptors, and stores them.
        let mut stored = Vec::new();
        for number in 0..6 {
            let (call, fds) = service.receive_call::<Call<usize>>().await.unwrap();
            match call.method() {
                Call::Count => assert!(fds.is_empty() && number % 2 == 0),
                Call::Add { name, file_descriptor } => {
                    assert_eq!(*name, format!("file {}", mark_of(&fds[*file_descriptor])));
                    stored.extend(fds);
                }
            }
        }

        // It sends them back in one reply.
        let parameters = Parameters { fds: vec![2, 0, 1] };
        service.send_reply(&zlink::Reply::new(Some(parameters)), stored).await.unwrap();
        let reply = client.try_next().await.unwrap().unwrap();
        assert_eq!(reply.parameters.fds.iter().map(mark_of).collect::<Vec<_>>(), [3, 1, 2]);
        drop(service);
        assert!(client.try_next().await.unwrap().is_none());
    });
}

/// A process that is killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// `systemd-userwork` serves one of systemd's varlink interfaces on the listener that it is
/// started with. The interface passes no descriptors.
#[test]
fn systemd_answers_varlink_calls() {
    const USERWORK: &str = "/lib/systemd/systemd-userwork";
    let Some(activate) = installed("systemd-socket-activate") else { return };
    if !Path::new(USERWORK).exists() {
        return skipped(&format!("{USERWORK} is not installed"));
    }
    counted(async |kind| {
        if kind != SocketKind::Stream {
            return;
        }
        // Start the service, and connect to it.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut command = Command::new(&activate);
        command.arg(format!("--listen={}", path.display()));
        // Without this it would request more workers from its parent, by a signal.
        command.arg("--setenv=USERDB_FIXED_WORKER=1").arg(USERWORK).stderr(Stdio::null());
        let mut service = Killed(command.spawn().unwrap());
        let socket = loop {
            match Socket::connect(&path, SocketKind::Stream).await {
                Ok(socket) => break socket,
                // The program listens soon. It does not report when.
                Err(_) => {
                    assert!(service.0.try_wait().unwrap().is_none(), "the program has ended");
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            }
        };

        // It answers calls, also after one that it does not know.
        let mut client = Framed::new(socket, Varlink::<Value>::default());
        let call = |uid: u32| {
            let parameters = json!({ "uid": uid, "service": "io.systemd.NameServiceSwitch" });
            json!({ "method": "io.systemd.UserDatabase.GetUserRecord", "parameters": parameters })
        };
        client.send(call(0)).await.unwrap();
        let reply = client.try_next().await.unwrap().unwrap();
        assert_eq!(reply["parameters"]["record"]["userName"], "root");
        client.send(json!({ "method": "org.example.Unknown.Method" })).await.unwrap();
        let reply = client.try_next().await.unwrap().unwrap();
        assert!(reply["error"].as_str().unwrap().starts_with("org.varlink.service."), "{reply}");
        client.send(call(0)).await.unwrap();
        let reply = client.try_next().await.unwrap().unwrap();
        assert_eq!(reply["parameters"]["incomplete"], false);
    });
}
