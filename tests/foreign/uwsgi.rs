//! Real `uwsgi` processes that pass their listening sockets on. The sender is called "zerg server",
//! and the receiver "zergling". A message has 10 bytes of text, the number of sockets in the
//! machine's byte order, and the sockets. A receiver has room for 8 sockets. If the number is
//! larger, it connects again, with room for that number.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Command, Stdio},
};

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, Fds, Framed, Listener, SendError, SendFd, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
    takeover::{self, Listeners, Options, Server},
};
use futures::{SinkExt, TryStreamExt};
use nix::sys::{
    signal::{Signal, killpg},
    socket::{getsockopt, sockopt},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{Daemon, common::run, installed};

/// The codec of messages with listening sockets.
#[derive(Clone)]
struct ZergCodec;

const MAGIC: &[u8; 10] = b"uwsgi-zerg";

impl Codec for ZergCodec {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst
    }
}

impl<F> Decoder<F> for ZergCodec {
    type Item = Fds<F>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Fds<F>>, Error> {
        let Some(message) = src.first_chunk::<14>() else { return Ok(None) };
        let (magic, count) = message.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(Error::invalid("not a zerg server"));
        }
        let count = u32::from_ne_bytes(count.try_into().expect("4 bytes are left of 14"));
        let expected = usize::try_from(count).map_err(Error::invalid)?;
        src.advance(14);
        fds.claim(expected).map(Some)
    }
}

impl<F> Encoder<Vec<F>, F> for ZergCodec {
    type Error = Error;

    fn encode(
        &mut self,
        sockets: Vec<F>,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<Vec<F>, Error>> {
        dst.put_slice(MAGIC);
        dst.put_slice(&(sockets.len() as u32).to_ne_bytes());
        dst.put_fds(sockets);
        Ok(())
    }
}

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Returns an address that was free just now.
fn free_address() -> SocketAddr {
    listen().1
}

/// Starts uwsgi with the plugin that answers [`PING`].
fn start_uwsgi(program: &Path, directory: &Path, options: &[&str]) -> Daemon {
    let mut command = Command::new(program);
    command.args(["--master", "--plugin", "ping"]).args(options);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    Daemon::start(&mut command, directory)
}

/// A request of the uwsgi protocol, and its answer.
const PING: [u8; 4] = [100, 0, 0, 0];
const PONG: [u8; 4] = [100, 0, 0, 1];

/// Sends a [`PING`] to an address. Returns the answer.
async fn ping(address: SocketAddr) -> [u8; 4] {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(&PING).await.unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).await.unwrap();
    answer
}

#[test]
fn a_zerg_server_gives_its_listening_socket_away() {
    let Some(program) = installed("uwsgi") else { return };
    run(async {
        // Take the socket from uwsgi.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zerg.sock");
        let address = free_address();
        let options = ["--socket", &address.to_string(), "--zerg-server", path.to_str().unwrap()];
        let mut daemon = start_uwsgi(&program, directory.path(), &options);
        let socket = daemon.ready(async || Socket::connect(&path, SocketKind::Stream).await).await;

        let mut connection = Framed::new(socket, ZergCodec);
        let sockets = connection.try_next().await.unwrap().unwrap();
        let [listener] = sockets.into_array().unwrap();
        assert!(connection.try_next().await.unwrap().is_none());
        assert!(getsockopt(&listener, sockopt::AcceptConn).unwrap());

        // While uwsgi is stopped, only this process accepts.
        killpg(nix::unistd::Pid::from_raw(daemon.child.id() as i32), Signal::SIGSTOP).unwrap();
        let listener = TcpListener::from(listener);
        assert_eq!(listener.local_addr().unwrap(), address);
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let serve = async {
            let (mut client, _) = listener.accept().await.unwrap();
            client.read_exact(&mut [0; 4]).await.unwrap();
            client.write_all(b"ours").await.unwrap();
        };
        let (answer, ()) = tokio::join!(ping(address), serve);
        assert_eq!(answer, *b"ours");
    });
}

#[test]
fn a_zergling_serves_the_listening_sockets_that_it_gets() {
    let Some(program) = installed("uwsgi") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zerg.sock");
        let server = Listener::bind(&path, SocketKind::Stream).unwrap();
        // More listeners than uwsgi has room for at first.
        let listeners: Vec<(TcpListener, SocketAddr)> = (0..20).map(|_| listen()).collect();
        let _daemon = start_uwsgi(&program, directory.path(), &["--zerg", path.to_str().unwrap()]);
        for _attempt in 0..2 {
            let mut connection = Framed::new(server.accept().await.unwrap(), ZergCodec);
            let copies = listeners
                .iter()
                .map(|(listener, _)| SendFd::assume_socket(listener.try_clone().unwrap()));
            connection.send(copies.collect::<Vec<_>>()).await.unwrap();
        }
        for (listener, address) in listeners {
            drop(listener); // uwsgi alone has it
            assert_eq!(ping(address).await, PONG);
        }
    });
}

/// The listening socket goes from uwsgi to one generation of our server after the other, and then
/// to another uwsgi.
#[test]
fn a_server_takes_over_from_a_zerg_server_and_gives_to_a_zergling() {
    let Some(program) = installed("uwsgi") else { return };
    run(async {
        // The first generation takes it from uwsgi.
        let directory = tempfile::tempdir().unwrap();
        let zerg = directory.path().join("zerg.sock");
        let address = free_address();
        let options = ["--socket", &address.to_string(), "--zerg-server", zerg.to_str().unwrap()];
        let mut daemon = start_uwsgi(&program, directory.path(), &options);
        let socket = daemon.ready(async || Socket::connect(&zerg, SocketKind::Stream).await).await;
        let [socket] =
            Framed::new(socket, ZergCodec).try_next().await.unwrap().unwrap().into_array().unwrap();
        let mut listeners = Listeners::new();
        listeners.add("uwsgi", socket).unwrap();
        let path = directory.path().join("takeover");
        let first = Server::bind(&path, listeners, Options::default()).unwrap();
        drop(daemon);

        // The second generation takes over from the first, and serves.
        let second =
            takeover::request(&path, Options::default()).await.unwrap().ready().await.unwrap();
        first.replaced().await;
        assert!(first.drained().await);
        let gated = second.gated::<tokio::net::TcpListener>("uwsgi", 0).unwrap();
        let serve = async {
            let (mut client, _) = gated.accept().await.unwrap();
            client.read_exact(&mut [0; 4]).await.unwrap();
            client.write_all(b"ours").await.unwrap();
        };
        assert_eq!(tokio::join!(ping(address), serve).0, *b"ours");

        // Another uwsgi takes it from the second.
        let server = Listener::bind(&zerg, SocketKind::Stream).unwrap();
        let _daemon = start_uwsgi(&program, directory.path(), &["--zerg", zerg.to_str().unwrap()]);
        let mut connection = Framed::new(server.accept().await.unwrap(), ZergCodec);
        connection
            .send(vec![SendFd::assume_socket(second.socket("uwsgi", 0).unwrap())])
            .await
            .unwrap();
        drop((gated, second)); // uwsgi alone has it
        assert_eq!(ping(address).await, PONG);
    });
}
