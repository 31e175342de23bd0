//! The threads and descriptors that hostile connections use up, and descriptors that are lost.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, FrameCodec, Framed, Socket, SocketKind,
    codec::{Codec, Decoder, FdQueue},
};
use futures::StreamExt;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    FEW_THREADS,
    common::{open_fds, raw_send, with_raw_peer},
    counted, nursery, raw,
    slow::{slow_to_close, without_waiting},
    threads, until,
};

/// A limit that lets the process open only a few more descriptors, until it is dropped.
pub(crate) struct FdLimit {
    before: (u64, u64),
}

impl FdLimit {
    pub(crate) fn leave(few: u64) -> Self {
        let before = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let next = File::open("/dev/null").unwrap().as_raw_fd() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, next + few, before.1).unwrap();
        Self { before }
    }
}

impl Drop for FdLimit {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.before.0, self.before.1).unwrap();
    }
}

pub(crate) fn nulls(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
}

/// Makes a connection that ends with an error because of the bytes that came with these
/// descriptors.
async fn bad_connection(kind: SocketKind, fds: Vec<OwnedFd>) {
    let (mut rx, peer) = with_raw_peer(kind);
    raw_send(&peer, b"?", &fds);
    drop(fds);
    assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
}

#[test]
fn slow_sockets_of_many_connections_take_few_threads() {
    counted(async |kind| {
        let before = threads();
        let mut clients = Vec::new();
        for _ in 0..200 {
            let (slow, client) = slow_to_close();
            bad_connection(kind, vec![slow]).await;
            clients.push(client);
            let now = threads();
            assert!(now <= before + FEW_THREADS, "{now} threads, {before} before");
        }
        without_waiting(clients, async {}).await;
    });
}

/// The thread that closes such a socket frees all the files in its queue, one after the other.
#[test]
fn sockets_with_many_unread_descriptors_take_one_thread_or_process_at_a_time() {
    counted(async |kind| {
        const SOCKETS: usize = 40;
        let mut full = Vec::new();
        for _ in 0..SOCKETS {
            let (socket, sender) = raw::pair(kind);
            for _ in 0..20 {
                if raw::try_send(&sender, b"?", &nulls(253)).is_none() {
                    return eprintln!(
                        "skipped: RLIMIT_NOFILE is too small for this many descriptors in flight"
                    );
                }
            }
            full.push(socket);
        }
        let before = threads() + children();
        let mut most = before;
        for socket in full {
            fdwire::close_in_background([socket]);
            // Wait, so that the next one is not closed together with this one.
            tokio::time::sleep(Duration::from_millis(3)).await;
            most = most.max(threads() + children());
        }
        assert!(most <= before + 1, "{most} threads and child processes, {before} before");
    });
}

/// Returns the number of child processes of this process.
fn children() -> usize {
    let parent = std::process::id().to_string();
    let is_child = |process: &std::fs::DirEntry| {
        let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.split(' ').nth(1) == Some(&parent))
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter(|process| process.as_ref().is_ok_and(is_child))
        .count()
}

#[test]
fn a_slow_socket_does_not_keep_others_open() {
    counted(async |kind| {
        const CONNECTIONS: usize = 20;
        let before = open_fds();
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let (slow, client) = slow_to_close();
            let mut fds = vec![slow];
            fds.extend(nulls(252));
            bad_connection(kind, fds).await;
            clients.push(client);
        }
        let slow_ones = 2 * CONNECTIONS; // with their clients
        until("the others are closed", || open_fds() <= before + slow_ones + FEW_THREADS).await;
        without_waiting(clients, async {}).await;
    });
}

/// A codec whose letter F takes a descriptor if there is one.
struct Optional {
    is_there_one: fn(&FdQueue) -> bool,
}

impl Codec for Optional {}

impl Decoder for Optional {
    type Item = Option<OwnedFd>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue,
    ) -> Result<Option<Self::Item>, Error> {
        if src.is_empty() {
            return Ok(None);
        }
        src.advance(1);
        Ok(Some(if (self.is_there_one)(fds) { fds.pop_front() } else { None }))
    }
}

#[test]
fn a_decoder_that_asks_for_the_number_of_descriptors_does_not_mistake_lost_ones_for_none() {
    counted(async |kind| {
        for is_there_one in
            [|fds: &FdQueue| !fds.is_empty(), |fds: &FdQueue| matches!(fds.len(), 1..)]
        {
            let (a, peer) = Socket::pair(kind).unwrap();
            let mut rx = Framed::with_codecs(a, Optional { is_there_one }, FrameCodec::default());
            raw_send(&peer, &[b'F'; 30], &nulls(30));
            let limit = FdLimit::leave(10);
            let mut complete = 0;
            let error = loop {
                match rx.next().await.unwrap() {
                    Ok(Some(_)) => complete += 1,
                    Ok(None) => {
                        panic!("a message without its descriptor, after {complete} with theirs")
                    }
                    Err(error) => break error,
                }
            };
            drop(limit);
            assert!(matches!(error, Error::TruncatedControl), "{error}");
            assert!(complete < 30);
        }
    });
}

/// A handler that runs in a thread with a descriptor table of its own can't write to the pipe of
/// tokio's signals.
#[test]
fn no_signal_is_handled_by_a_thread_without_the_descriptors_of_the_process() {
    counted(async |_| {
        let status = std::fs::read_to_string(nursery().unwrap().join("status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
        for signal in
            [nix::libc::SIGINT, nix::libc::SIGTERM, nix::libc::SIGCHLD, nix::libc::SIGUSR1]
        {
            assert_ne!(blocked & 1 << (signal - 1), 0, "signal {signal}");
        }
    });
}
