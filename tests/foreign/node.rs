//! Node's channel between a process and its child (`child_process.fork`): lines of JSON on a stream
//! socket, some with a descriptor. The child finds the socket's number in `NODE_CHANNEL_FD`.

use std::{
    io::Read,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};
use futures::{SinkExt, StreamExt, TryStreamExt};
use serde_json::{Value, json};

use crate::{
    Daemon,
    common::{PASSED, descriptors_of_a_child, run, run_and_pass},
    installed,
};

/// The codec of the guide: a message is a line of JSON, and one with `"cmd": "NODE_HANDLE"` has a
/// descriptor.
#[derive(Clone, Default)]
struct NodeChannel {
    /// The number of bytes that were searched for a line feed.
    searched: usize,
}

type Message = (Value, Option<OwnedFd>);

impl Codec for NodeChannel {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst // Node takes one descriptor for each read
    }
}

impl Decoder for NodeChannel {
    type Item = Message;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> Result<Option<Message>, Error> {
        let Some(more) = src[self.searched..].iter().position(|&byte| byte == b'\n') else {
            self.searched = src.len();
            let limit = self.limits().max_payload_bytes;
            return if src.len() <= limit {
                Ok(None)
            } else {
                Err(Error::FrameTooLong { bytes: src.len(), limit })
            };
        };
        let line = src.split_to(self.searched + more);
        src.advance(1);
        self.searched = 0;
        let message: Value = serde_json::from_slice(&line).map_err(Error::invalid)?;
        let fd = match message["cmd"] == "NODE_HANDLE" {
            true => Some(fds.claim_one()?),
            false => None,
        };
        Ok(Some((message, fd)))
    }
}

impl Encoder<Message> for NodeChannel {
    type Error = Error;

    fn encode(
        &mut self,
        (message, fd): Message,
        dst: &mut SendBuf,
    ) -> Result<(), SendError<Message>> {
        dst.put_slice(format!("{message}\n").as_bytes());
        dst.put_fds(fd);
        Ok(())
    }
}

/// A program for Node that starts this test as it starts its own children, passes a listener to it,
/// and takes a connection from it.
const PARENT: &str = "
const { spawn } = require('child_process'), net = require('net');
const stdio = ['ignore', 'ignore', 'inherit', 'ipc'];
const child = spawn(process.argv[1], process.argv.slice(2), { stdio });
const server = net.createServer();
server.listen(0, '127.0.0.1', () => child.send({ port: server.address().port }, server));
child.on('message', (message, socket) => {
    server.close();
    socket.end(message.text + ' through node', () => child.disconnect());
});
child.on('exit', code => process.exit(code));
";

#[test]
fn a_child_of_node_finds_its_channel_and_leaks_nothing_to_its_own_children() {
    const TEST: &str =
        "node::a_child_of_node_finds_its_channel_and_leaks_nothing_to_its_own_children";
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == TEST) {
        return run_and_pass(async {
            // This process is the child of node. Its own children do not get the channel.
            let number = std::env::var("NODE_CHANNEL_FD").unwrap().parse().unwrap();
            assert!(descriptors_of_a_child().contains("socket:"), "node passes no channel");
            let mut node =
                Framed::new(Socket::from_inherited(number).unwrap(), NodeChannel::default());
            assert!(!descriptors_of_a_child().contains("socket:"));

            // A listener comes from node.
            let (message, fd) = node.try_next().await.unwrap().unwrap();
            let listener = TcpListener::from(fd.unwrap());
            let address = listener.local_addr().unwrap();
            assert_eq!(
                (&message["type"], &message["msg"]),
                (&json!("net.Server"), &json!({"port": address.port()}))
            );
            node.send((json!({"cmd": "NODE_HANDLE_ACK"}), None)).await.unwrap();

            // A connection goes to node, which writes to it.
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(other.local_addr().unwrap()).unwrap();
            let handle =
                json!({"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": {"text": "hello"}});
            node.send((handle, Some(other.accept().unwrap().0.into()))).await.unwrap();
            assert_eq!(
                node.try_next().await.unwrap().unwrap().0,
                json!({"cmd": "NODE_HANDLE_ACK"})
            );
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello through node");
            assert!(node.next().await.is_none(), "node has disconnected");
        });
    }
    let Some(program) = installed("node") else { return };
    // Node starts this test again as its child.
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.args(["-e", PARENT]).arg(std::env::current_exe().unwrap()).args([
            TEST,
            "--exact",
            "--nocapture",
        ]);
        command.env("FDWIRE_ROLE", TEST).stdin(Stdio::null()).stdout(Stdio::null());
        let mut node = Daemon::start(&mut command, directory.path());
        assert_eq!(node.ended().await.code(), Some(PASSED));
    });
}

/// A program for Node as a child of this test. Node takes any number for its channel. The test uses
/// standard input, because a `Command` of std can pass it. Node never closes standard input, so
/// only its exit ends the channel.
const CHILD: &str = "
process.on('message', (message, server) => {
    server.once('connection', socket => socket.end('served by node', () => {
        process.send({ served: message.name }, () => process.exit());
    }));
});
";

#[test]
fn node_is_a_child_that_serves_our_listener() {
    let Some(program) = installed("node") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = Socket::pair(SocketKind::Stream).unwrap();
        let mut command = Command::new(program);
        command
            .args(["-e", CHILD])
            .env("NODE_CHANNEL_FD", "0")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null());
        let mut child = Daemon::start(&mut command, directory.path());
        drop(command);

        let mut node = Framed::new(ours, NodeChannel::default());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let handle = json!({"cmd": "NODE_HANDLE", "type": "net.Server", "msg": {"name": "front"}});
        node.send((handle, Some(listener.into()))).await.unwrap();
        assert_eq!(node.try_next().await.unwrap().unwrap().0, json!({"cmd": "NODE_HANDLE_ACK"}));
        assert_eq!(node.try_next().await.unwrap().unwrap().0, json!({"served": "front"}));
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "served by node");
        assert!(node.next().await.is_none());
        assert!(child.ended().await.success());
    });
}
