//! Each error, on the asynchronous and on the blocking side alike.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, process::Command, time::Duration};

use fdwire::{
    Error, Frame, FrameCodec, Limits, Listener, Socket, SocketKind, blocking,
    codec::{Codec, PacketCodec},
    socket::{PassCredentials, UidLimits},
};
use futures::future::LocalBoxFuture;

use crate::{
    common::{abstract_name, encoded, marked, marks, raw_send},
    open_fds,
    side::{
        End, FrameLike, SHORT, Side, end_of_codec_with_raw_peer, end_with_raw_peer, ends,
        on_both_sides,
    },
};

/// Makes an end fail. Returns `None` if this kind of socket, or this kernel, does not fail in this
/// way.
type Provoke = fn(SocketKind, Side) -> LocalBoxFuture<'static, Option<Error>>;

/// A row for each error: its name, its source, the way to provoke it, and its message.
const TABLE: &[(&str, &str, Provoke, &str)] = &[
    (
        "Io",
        "sending to a peer that has closed",
        |k, s| Box::pin(send_to_closed(k, s)),
        "Broken pipe (os error 32)",
    ),
    (
        "Io",
        "sending descriptors to a peer that takes none",
        |k, s| Box::pin(send_refused_fds(k, s)),
        "not permitted",
    ),
    (
        "BadMagic",
        "receiving",
        |k, s| Box::pin(received(k, s, b"G".to_vec(), 3)),
        "bad magic byte 0x47",
    ),
    (
        "BadMagic",
        "receiving behind a frame",
        |k, s| Box::pin(received(k, s, [encoded(b"fine", 1), b"?".to_vec()].concat(), 2)),
        "bad magic byte 0x3f",
    ),
    (
        "UnsupportedVersion",
        "receiving",
        |k, s| Box::pin(received(k, s, vec![0xFD, 0x20], 1)),
        "version 2",
    ),
    (
        "UnsupportedFlags",
        "receiving",
        |k, s| Box::pin(received(k, s, vec![0xFD, 0x11], 1)),
        "flags 0x1",
    ),
    (
        "FrameTooLong",
        "receiving",
        |k, s| Box::pin(received(k, s, encoded(&[0; 101], 0), 0)),
        "frame payload of 101 bytes is over the limit of 100",
    ),
    (
        "FrameTooLong",
        "sending",
        |k, s| Box::pin(refused(k, s, small(), Frame::new(vec![0; 101]))),
        "frame payload of 101 bytes is over the limit of 100",
    ),
    (
        "TooManyFds",
        "receiving",
        |k, s| Box::pin(received(k, s, encoded(b"", 4), 4)),
        "frame with 4 descriptors is over the limit of 3",
    ),
    (
        "TooManyFds",
        "sending",
        |k, s| Box::pin(refused(k, s, small(), Frame::new("").with_fds((0..4).map(marked)))),
        "frame with 4 descriptors is over the limit of 3",
    ),
    (
        "TooManyFdsForLength",
        "sending",
        |k, s| {
            Box::pin(refused(
                k,
                s,
                crate::common::large(),
                Frame::new("").with_fds((0..2025).map(marked)),
            ))
        },
        "2025 descriptors are too many for a message of 8 bytes",
    ),
    (
        "EmptyMessage",
        "sending",
        |k, s| Box::pin(refused(k, s, PacketCodec::default(), Frame::new(""))),
        "an empty message cannot be sent as a packet",
    ),
    (
        "MissingFds",
        "receiving",
        |k, s| Box::pin(received(k, s, encoded(b"", 2), 1)),
        "frame needs 2 descriptors, 1 arrived",
    ),
    (
        "UnclaimedFds",
        "at the end",
        |k, s| Box::pin(received(k, s, encoded(b"", 1), 2)),
        "1 descriptors arrived",
    ),
    (
        "UnclaimedFds",
        "receiving too many",
        |k, s| Box::pin(unclaimed(k, s)),
        "759 descriptors arrived",
    ),
    (
        "TruncatedControl",
        "receiving without room",
        |k, s| Box::pin(truncated_control(k, s)),
        "RLIMIT_NOFILE",
    ),
    ("TruncatedPacket", "receiving", |k, s| Box::pin(truncated_packet(k, s)), "lost its tail"),
    (
        "UnexpectedEnd",
        "receiving",
        |k, s| Box::pin(received(k, s, encoded(b"cut", 1)[..9].to_vec(), 1)),
        "connection ended inside a message, 9 bytes of it had arrived",
    ),
    (
        "Unfinished",
        "receiving",
        |k, s| Box::pin(unfinished(k, s)),
        "9 bytes and 1 descriptors of it arrived",
    ),
    (
        "OverUidLimit",
        "receiving",
        |k, s| Box::pin(over_uid_limit(k, s)),
        "1000 bytes and 0 descriptors",
    ),
    (
        "MixedSenders",
        "receiving",
        |k, s| Box::pin(mixed_senders(k, s)),
        "written by several processes",
    ),
    ("Reset", "receiving", |k, s| Box::pin(reset(k, s)), "without reading everything"),
    (
        "TimedOut",
        "receiving",
        |k, s| Box::pin(timed_out(k, s, Waiting::Receive)),
        "the time set for this call is over",
    ),
    (
        "TimedOut",
        "sending",
        |k, s| Box::pin(timed_out(k, s, Waiting::Send)),
        "the time set for this call is over",
    ),
    ("Invalid", "receiving", |k, s| Box::pin(invalid(k, s)), "invalid message: not welcome"),
    ("Closed", "sending", |k, s| Box::pin(closed(k, s)), "sending side is closed"),
];

#[test]
fn each_error_is_the_same_on_both_sides() {
    on_both_sides(async |kind, side| {
        for (variant, place, provoke, text) in TABLE {
            println!("{variant}, {place}, {kind:?}, {side:?}");
            let Some(error) = provoke(kind, side).await else { continue };
            let what = format!("{variant}, {place}, {kind:?}, {side:?}: {error:?}");
            assert!(format!("{error:?}").starts_with(variant), "{what}");
            assert!(error.to_string().contains(text), "{what}");
        }
    });
}

#[test]
fn the_table_has_each_variant() {
    let source = include_str!("../../src/error.rs");
    let (_, variants) = source.split_once("pub enum Error {").unwrap();
    let (variants, _) = variants.split_once("\n}\n").unwrap();
    let name = |line: &str| {
        let name = line.strip_prefix("    ")?;
        let end = name.find(|letter: char| !letter.is_ascii_alphanumeric())?;
        name.starts_with(char::is_uppercase).then(|| name[..end].to_owned())
    };
    let variants = BTreeSet::from_iter(variants.lines().filter_map(name));
    let in_table = BTreeSet::from_iter(TABLE.iter().map(|(variant, ..)| (*variant).to_owned()));
    assert_eq!(variants, in_table);
}

fn small() -> FrameCodec {
    FrameCodec::new(Limits::default().max_payload_bytes(100).max_fds_per_frame(3))
}

/// Returns the error of a receiver for these bytes, sent with this number of descriptors before the
/// end.
async fn received(kind: SocketKind, side: Side, bytes: Vec<u8>, fds: u32) -> Option<Error> {
    let (mut rx, peer) = end_of_codec_with_raw_peer(kind, side, small());
    raw_send(&peer, &bytes, &Vec::from_iter((0..fds).map(marked)));
    drop(peer);
    loop {
        match rx.next().await.expect("no fault was found") {
            Ok(_) => {}
            Err(error) => {
                assert!(rx.next().await.is_none(), "an error is followed by the end");
                return Some(error);
            }
        }
    }
}

/// Returns the error of a sender for an item. The item comes back, and the sender can send others.
async fn refused(
    kind: SocketKind,
    side: Side,
    codec: impl FrameLike,
    frame: Frame,
) -> Option<Error> {
    let (a, peer) = Socket::pair(kind).unwrap();
    let (mut tx, mut rx) = (End::new(side, a, codec.clone()), End::new(Side::Async, peer, codec));
    let fds = frame.fds.len();
    let refused = tx.send(frame).await.unwrap_err();
    assert_eq!(refused.item.expect("the item comes back").fds.len(), fds);
    tx.send(Frame::new("next").with_fd(marked(1))).await.unwrap();
    assert_eq!(marks(&rx.frame().await), [1]);
    Some(refused.error)
}

async fn send_to_closed(kind: SocketKind, side: Side) -> Option<Error> {
    let (mut tx, peer) = end_with_raw_peer(kind, side);
    drop(peer);
    tx.feed(Frame::new("unsent").with_fd(marked(1))).await.unwrap();
    let error = tx.flush().await.unwrap_err();
    // From now on items come back at once, with the same error.
    for _ in 0..2 {
        let refused = tx.send(Frame::new("refused").with_fd(marked(2))).await.unwrap_err();
        assert_eq!(refused.error.to_string(), error.to_string());
        assert_eq!(marks(&refused.item.unwrap()), [2]);
        assert_eq!(tx.flush().await.unwrap_err().to_string(), error.to_string());
    }
    let (bytes, fds) = tx.into_unsent().await;
    assert_eq!((&bytes[8..], fds.len()), (&b"unsent"[..], 1));
    Some(error)
}

async fn send_refused_fds(kind: SocketKind, side: Side) -> Option<Error> {
    let (mut tx, rx) = ends(kind, side);
    if rx.socket().set_pass_fds(false).is_err() {
        eprintln!("skipped: this kernel has no SO_PASSRIGHTS");
        return None;
    }
    let error = tx.send(Frame::new("").with_fd(marked(1))).await.unwrap_err();
    assert!(error.item.is_none(), "it was taken");
    assert_eq!(tx.into_unsent().await.1.len(), 1);
    Some(error.error)
}

async fn unclaimed(kind: SocketKind, side: Side) -> Option<Error> {
    let (mut rx, peer) = end_of_codec_with_raw_peer(kind, side, small());
    for _ in 0..3 {
        raw_send(&peer, &encoded(b"", 0), &Vec::from_iter((0..253).map(marked)));
    }
    for _ in 0..3 {
        rx.frame().await;
    }
    Some(rx.error().await)
}

async fn truncated_control(kind: SocketKind, side: Side) -> Option<Error> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (mut rx, peer) = end_with_raw_peer(kind, side);
    raw_send(&peer, &encoded(b"", 30), &Vec::from_iter((0..30).map(marked)));
    drop(peer);
    // Wait for the thread that closes the descriptors of earlier connections: it would make room.
    while open_fds() > 100 {
        tokio::task::yield_now().await;
    }
    // The tests of this binary that use descriptors run one at a time.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = std::os::fd::AsRawFd::as_raw_fd(&marked(0)) as u64;
    setrlimit(Resource::RLIMIT_NOFILE, next + 10, hard).unwrap();
    let received = rx.next().await;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(rx.next().await.is_none());
    Some(received.unwrap().unwrap_err())
}

async fn truncated_packet(kind: SocketKind, side: Side) -> Option<Error> {
    if kind == SocketKind::Stream {
        return None;
    }
    let (mut rx, peer) = end_with_raw_peer(kind, side);
    let peer = blocking::Socket::try_from(peer).unwrap();
    peer.set_send_buffer_size(4 << 20).unwrap();
    if peer.send_buffer_size().unwrap() < 400_000 {
        eprintln!("skipped: net.core.wmem_max is too small for a packet of this size");
        return None;
    }
    raw_send(&peer, &encoded(&[0; 300_000], 1), &[marked(1)]);
    Some(rx.error().await)
}

/// The peer leaves its own end in an unfinished frame, so the connection has no end.
async fn unfinished(kind: SocketKind, side: Side) -> Option<Error> {
    let codec = FrameCodec::new(Limits::default().max_unfinished_time(SHORT));
    let (mut rx, peer) = end_of_codec_with_raw_peer(kind, side, codec);
    let own_end = peer.try_clone().unwrap();
    raw_send(&peer, &encoded(b"cut", 1)[..9], &[own_end]);
    drop(peer);
    Some(rx.error().await)
}

async fn over_uid_limit(kind: SocketKind, side: Side) -> Option<Error> {
    let name = abstract_name(&format!("over-uid-limit-{kind:?}-{side:?}"));
    let limits = UidLimits::default().max_bytes(999);
    let listener = Listener::bind_addr(&name, kind).unwrap().limit_each_uid(limits);
    let (client, server) = tokio::join!(Socket::connect_addr(&name, kind), listener.accept());
    let mut rx = End::new(side, server.unwrap(), FrameCodec::default());
    raw_send(&client.unwrap(), &encoded(&[0; 2000], 0)[..1000], &[]);
    Some(rx.error().await)
}

async fn mixed_senders(kind: SocketKind, side: Side) -> Option<Error> {
    let (a, peer) = Socket::pair(kind).unwrap();
    a.set_pass_credentials(PassCredentials::Ids).unwrap();
    let (mut rx, peer) = (End::new(side, a, FrameCodec::default()), OwnedFd::from(peer));
    raw_send(&peer, &encoded(b"whole", 0), &[]);
    raw_send(&peer, &encoded(b"?", 0)[..8], &[]);
    let mut other =
        Command::new("printf").arg("?").stdout(peer.try_clone().unwrap()).spawn().unwrap();
    assert!(other.wait().unwrap().success());
    assert_eq!(rx.frame().await.payload, "whole");
    Some(rx.error().await)
}

async fn reset(kind: SocketKind, side: Side) -> Option<Error> {
    let (mut end, mut peer) = ends(kind, side);
    end.send(Frame::new("never read")).await.unwrap();
    for n in 0..3 {
        futures::SinkExt::send(&mut peer, Frame::new("last words").with_fd(marked(n)))
            .await
            .unwrap();
    }
    drop(peer); // with unread data: ECONNRESET, on SEQPACKET before the data
    end.wait_for_close_of_peer().await;
    for n in 0..3 {
        assert_eq!(marks(&end.frame().await), [n]);
    }
    Some(end.error().await)
}

#[derive(Clone, Copy)]
enum Waiting {
    Receive,
    Send,
}

/// Only for the blocking side: the asynchronous side has tokio's timers for that.
async fn timed_out(kind: SocketKind, side: Side, waiting: Waiting) -> Option<Error> {
    let (end, mut peer) = ends(kind, side);
    let End::Blocking(end) = end else { return None };
    let (end, error) = end
        .end(move |mut end| {
            end.set_read_timeout(Some(Duration::ZERO));
            end.set_write_timeout(Some(Duration::ZERO));
            let error = match waiting {
                Waiting::Receive => end.next().unwrap().unwrap_err(),
                Waiting::Send => loop {
                    if let Err(error) = end.send(Frame::new(vec![7; 50_000])) {
                        assert!(error.item.is_none(), "it was taken");
                        break error.error;
                    }
                },
            };
            (end, error)
        })
        .await;
    // The connection goes on.
    let send = async {
        futures::SinkExt::send(&mut peer, Frame::new("late").with_fd(marked(1))).await.unwrap()
    };
    send.await;
    let mut end = End::Blocking(crate::side::OnThread::new(move || end));
    assert_eq!(marks(&end.frame().await), [1]);
    Some(error)
}

async fn invalid(kind: SocketKind, side: Side) -> Option<Error> {
    let refuse = |frame: Frame| match &frame.payload[..] {
        b"welcome" => Ok(frame),
        _ => Err(Error::invalid("not welcome")),
    };
    let codec = FrameCodec::default().map(refuse, Ok::<Frame, fdwire::SendError<Frame>>);
    let (mut rx, peer) = end_of_codec_with_raw_peer(kind, side, codec);
    raw_send(&peer, &[encoded(b"welcome", 0), encoded(b"?", 1)].concat(), &[marked(1)]);
    rx.frame().await;
    Some(rx.error().await)
}

async fn closed(kind: SocketKind, side: Side) -> Option<Error> {
    let (mut end, _peer) = ends(kind, side);
    end.close().await.unwrap();
    end.close().await.unwrap();
    let refused = end.feed(Frame::new("").with_fd(marked(4))).await.unwrap_err();
    assert_eq!(marks(&refused.item.unwrap()), [4]);
    Some(refused.error)
}

#[test]
fn errors_become_io_errors_of_their_kind() {
    let kind = |error: Error| io::Error::from(error).kind();
    assert_eq!(kind(Error::TimedOut), io::ErrorKind::TimedOut);
    assert!(!Error::TimedOut.is_peer_gone());
}
