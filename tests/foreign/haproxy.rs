//! HAProxy's `_getsocks`. With it, a new process takes the listening sockets of a running one: it
//! receives their number, and then batches of sockets with a description of each. The tests play
//! both roles: the old process for a real `haproxy -x`, and the new one for a running haproxy.
//! <https://github.com/haproxy/haproxy/blob/master/src/sock.c>, `sock_get_old_sockets`

use std::{
    fmt::Write,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use bytes::{Buf, BufMut, BytesMut};
use fdwire::{
    Error, Framed, Listener, SendError, SendFd, Socket, SocketKind,
    codec::{Codec, Decoder, DryRun, Encoder, FdQueue, SendBuf},
    takeover::{self, Listeners, Options, Server},
};
use futures::{SinkExt, TryStreamExt};

use crate::{
    Daemon,
    common::{installed, marked, run},
    raw_recv,
};

/// The number of sockets in each batch but the last (`MAX_SEND_FD`). The new process acknowledges
/// each batch, and the old one waits for that except after the last.
const BATCH: usize = 252;

const COMMAND: &[u8] = b"_getsocks\n";

/// The codec of the old process: it receives requests and sends sockets.
#[derive(Clone, Default)]
struct OldProcess {
    /// Whether the command has come. After it, only acknowledgements come.
    requested: bool,
}

#[derive(Debug, PartialEq)]
enum FromNew {
    GetSocks,
    /// A batch has arrived.
    Ack,
}

/// The default grouping: the number is read without room for descriptors, then each batch at once.
impl Codec for OldProcess {}

impl<F> Decoder<F> for OldProcess {
    type Item = FromNew;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, _: &mut FdQueue<F>) -> Result<Option<FromNew>, Error> {
        if self.requested {
            return Ok(src.try_get_i32_ne().ok().map(|_| FromNew::Ack));
        }
        if src.len() < COMMAND.len() {
            return Ok(None);
        }
        if src.split_to(COMMAND.len()) != COMMAND {
            return Err(Error::invalid("another command"));
        }
        self.requested = true;
        Ok(Some(FromNew::GetSocks))
    }
}

impl<F> Encoder<Vec<F>, F> for OldProcess {
    type Error = Error;

    fn encode(&mut self, sockets: Vec<F>, dst: &mut SendBuf<F>) -> Result<(), SendError<Vec<F>>> {
        dst.put_i32_ne(sockets.len() as i32);
        let mut sockets = sockets.into_iter().peekable();
        while sockets.peek().is_some() {
            dst.end_part();
            for socket in sockets.by_ref().take(BATCH) {
                dst.put_slice(&[0, 0]); // neither a namespace nor an interface
                dst.put_i32_ne(0); // options in older versions
                dst.put_fd(socket);
            }
        }
        Ok(())
    }
}

/// The codec of the new process: it receives sockets and sends requests.
#[derive(Clone, Default)]
struct NewProcess {
    /// The number of sockets that are still to come. `None` until their number has come.
    left: Option<usize>,
}

impl Codec for NewProcess {}

impl<F> Decoder<F> for NewProcess {
    type Item = FromOld<F>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<FromOld<F>>, Error> {
        let Some(left) = self.left else {
            let Ok(number) = src.try_get_i32_ne() else { return Ok(None) };
            let number = usize::try_from(number).map_err(Error::invalid)?;
            self.left = Some(number);
            return Ok(Some(FromOld::Number(number)));
        };
        // Two texts, each behind its length, and a number.
        let mut end = 0;
        for _ in 0..2 {
            let Some(&length) = src.get(end) else { return Ok(None) };
            end += 1 + usize::from(length);
        }
        if left == 0 || src.len() < end + 4 {
            return Ok(None);
        }
        src.advance(end + 4);
        self.left = Some(left - 1);
        Ok(Some(FromOld::Socket(fds.claim_one()?)))
    }
}

#[derive(Debug)]
enum FromOld<F> {
    Number(usize),
    Socket(F),
}

impl<F> Encoder<FromNew, F> for NewProcess {
    type Error = Error;

    fn encode(&mut self, message: FromNew, dst: &mut SendBuf<F>) -> Result<(), SendError<FromNew>> {
        match message {
            FromNew::GetSocks => dst.put_slice(COMMAND),
            FromNew::Ack => dst.put_i32_ne(0),
        }
        Ok(())
    }
}

/// Returns a configuration with one front end. It listens at these addresses and answers by itself.
fn configuration(directory: &Path, addresses: &[SocketAddr]) -> String {
    let mut text = format!(
        "global\n  maxconn 100\n  stats socket {}/admin mode 600 level admin expose-fd listeners\n\
         defaults\n  mode http\n  timeout client 30s\n  timeout server 30s\n  timeout connect 30s\n\
         frontend front\n  \
         http-request return status 200 content-type text/plain string answered\n",
        directory.display()
    );
    for address in addresses {
        writeln!(text, "  bind {address}").unwrap();
    }
    text
}

fn haproxy(program: &Path, directory: &Path, addresses: &[SocketAddr]) -> Command {
    let file = directory.join("haproxy.cfg");
    std::fs::write(&file, configuration(directory, addresses)).unwrap();
    let mut command = Command::new(program);
    command.args(["-db", "-f"]).arg(file).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Requests a page.
fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Makes listening sockets. Returns them with their addresses. Each test has its own address of the
/// loopback network, so nobody else gets a port between the end of a socket and haproxy's bind.
fn listeners(ip: &str, count: usize) -> (Vec<TcpListener>, Vec<SocketAddr>) {
    let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind((ip, 0)).unwrap()).collect();
    let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    (listeners, addresses)
}

#[test]
fn the_number_goes_before_the_batches_and_each_batch_has_a_call() {
    let mut run = DryRun::stream();
    run.encode(&mut OldProcess::default(), (0..600).collect()).unwrap();
    run.encode(&mut OldProcess::default(), vec![600]).unwrap();
    let calls: Vec<_> = run.map(|call| (call.bytes.len(), call.fds.len())).collect();
    assert_eq!(calls, [(4, 0), (252 * 6, 252), (252 * 6, 252), (96 * 6 + 4, 96), (6, 1)]);
}

/// The second answer waits in the same flush. HAProxy reads the number without room for
/// descriptors.
#[test]
fn a_peer_that_reads_call_by_call_finds_the_batches_while_other_messages_wait() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let mut framed = Framed::new(a, OldProcess::default());
        for first in [0, 300] {
            framed
                .feed((first..first + 300).map(|mark| SendFd::assume_file(marked(mark))).collect())
                .await
                .unwrap();
        }
        framed.flush().await.unwrap();
        for first in [0_u32, 300] {
            assert_eq!(raw_recv(&peer, 4), (300_i32.to_ne_bytes().to_vec(), vec![]));
            let (bytes, marks) = raw_recv(&peer, 252 * 6);
            assert_eq!((bytes.len(), marks), (252 * 6, Vec::from_iter(first..first + 252)));
            let (bytes, marks) = raw_recv(&peer, 48 * 6);
            assert_eq!((bytes.len(), marks), (48 * 6, Vec::from_iter(first + 252..first + 300)));
        }
    });
}

/// Starts haproxy as the new process, and gives it listeners. Their addresses are in use, so
/// haproxy ends at once unless it gets every one of them.
async fn start_with(
    program: &Path,
    directory: &Path,
    addresses: &[SocketAddr],
    sockets: &[Arc<OwnedFd>],
) -> Daemon {
    let path = directory.join("old");
    let listener = Listener::bind(&path, SocketKind::Stream).unwrap();
    let mut command = haproxy(program, directory, addresses);
    let daemon = Daemon::start(command.arg("-x").arg(&path), directory);
    let mut framed = Framed::new(listener.accept().await.unwrap(), OldProcess::default());
    assert_eq!(framed.try_next().await.unwrap(), Some(FromNew::GetSocks));
    let lent = sockets.iter().map(|socket| SendFd::assume_socket(Arc::clone(socket))).collect();
    framed.feed(lent).await.unwrap();
    // Another message waits behind this one; haproxy does not read it.
    framed.feed(Vec::new()).await.unwrap();
    framed.flush().await.unwrap();
    for _batch in 0..sockets.len().div_ceil(BATCH) {
        assert_eq!(framed.try_next().await.unwrap(), Some(FromNew::Ack));
    }
    daemon
}

#[test]
fn haproxy_takes_our_listeners() {
    let Some(program) = installed("haproxy") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (sockets, addresses) = listeners("127.0.0.2", 300);
        let kept: Vec<Arc<OwnedFd>> =
            sockets.into_iter().map(|socket| Arc::new(socket.into())).collect();
        let mut daemon = start_with(&program, directory.path(), &addresses, &kept).await;
        drop(kept);
        for &address in [addresses[0], addresses[252], addresses[299]].iter() {
            let answer = daemon.ready(async || get(address)).await;
            assert!(answer.ends_with("answered"), "{answer}");
        }
    });
}

/// Takes all listeners from haproxy, as a new haproxy does.
async fn take(daemon: &mut Daemon, path: &Path) -> Vec<OwnedFd> {
    // It serves HTTP a moment before it listens at this path.
    let socket = daemon.ready(async || Socket::connect(path, SocketKind::Stream).await).await;
    let mut framed = Framed::new(socket, NewProcess::default());
    framed.send(FromNew::GetSocks).await.unwrap();
    let Some(FromOld::Number(count)) = framed.try_next().await.unwrap() else {
        panic!("the first message is not the number of sockets")
    };
    let mut taken = Vec::new();
    while taken.len() < count {
        let Some(FromOld::Socket(socket)) = framed.try_next().await.unwrap() else {
            panic!("only {} of {count} sockets came", taken.len())
        };
        taken.push(socket);
        if taken.len() % BATCH == 0 {
            framed.send(FromNew::Ack).await.unwrap();
        }
    }
    taken
}

fn address_of(socket: &OwnedFd) -> Option<SocketAddr> {
    TcpListener::from(socket.as_fd().try_clone_to_owned().unwrap()).local_addr().ok()
}

#[test]
fn we_take_the_listeners_of_haproxy() {
    let Some(program) = installed("haproxy") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (sockets, addresses) = listeners("127.0.0.3", 300);
        drop(sockets); // free again, for haproxy
        let mut command = haproxy(&program, directory.path(), &addresses);
        let mut daemon = Daemon::start(&mut command, directory.path());
        daemon.ready(async || get(addresses[299])).await;

        let taken = take(&mut daemon, &directory.path().join("admin")).await;
        drop(daemon);
        // All of them still listen, without haproxy.
        let ours: Vec<_> = taken.iter().filter_map(address_of).collect();
        assert!(
            addresses.iter().all(|address| ours.contains(address)),
            "{} of 300 came",
            ours.len()
        );
        TcpStream::connect(addresses[0]).unwrap();
    });
}

/// The listeners go from haproxy to one generation of our server after the other, and back to a new
/// haproxy. The ports are never closed.
#[test]
fn a_server_takes_over_from_haproxy_and_haproxy_from_its_next_generation() {
    let Some(program) = installed("haproxy") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (sockets, addresses) = listeners("127.0.0.4", 2);
        drop(sockets); // free again, for haproxy
        let mut daemon =
            Daemon::start(&mut haproxy(&program, directory.path(), &addresses), directory.path());
        daemon.ready(async || get(addresses[1])).await;

        // The first generation takes them from haproxy.
        let mut front = Listeners::new();
        for socket in take(&mut daemon, &directory.path().join("admin")).await {
            // haproxy's socket for administration comes too.
            if address_of(&socket).is_some_and(|address| addresses.contains(&address)) {
                front.add("front", socket).unwrap();
            }
        }
        let path = directory.path().join("takeover");
        let first = Server::bind(&path, front, Options::default()).unwrap();
        drop(daemon);
        let waiting = TcpStream::connect(addresses[0]).unwrap();

        // The second generation takes over from the first.
        let second =
            takeover::request(&path, Options::default()).await.unwrap().ready().await.unwrap();
        first.replaced().await;
        assert!(first.drained().await);
        let index =
            second.identities().iter().position(|it| it.address == addresses[0].into()).unwrap();
        let gated = second.gated::<tokio::net::TcpListener>("front", index as u32).unwrap();
        assert_eq!(gated.accept().await.unwrap().1, waiting.local_addr().unwrap());

        // A new haproxy takes them from the second.
        let sockets = [0, 1].map(|index| Arc::new(second.socket("front", index).unwrap()));
        let mut daemon = start_with(&program, directory.path(), &addresses, &sockets).await;
        drop((sockets, gated, second));
        for address in addresses {
            assert!(daemon.ready(async || get(address)).await.ends_with("answered"));
        }
    });
}
