//! Descriptors whose last `close` takes as long as a peer likes. No task may wait for that `close`,
//! and the descriptors are closed all the same.

use std::{
    io::ErrorKind,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, Fds, Frame, FrameCodec, Framed, Listener, SendError, SendFd, Socket, SocketKind,
    codec::{Codec, Decoder, FdQueue, PacketCodec},
    handoff::{
        Address, Incoming, Transport,
        protocol::{DispatcherCodec, FromWorker, NewLink, Offer, ToWorker, VERSION},
    },
    socket::DatagramSocket,
};
use futures::{SinkExt, StreamExt, TryStreamExt};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{sync::oneshot, task::yield_now, time::timeout};

use crate::{
    common::{abstract_name, encoded, marked, one_thread, raw_send, with_raw_peer},
    counted,
    descriptors::{FdLimit, nulls},
    raw,
    slow::{Client, full_connection, linger, slow_to_close, without_waiting},
};

/// Makes a connection with a slow socket from its peer in its kernel queue. The peer stays.
fn with_unread(kind: SocketKind) -> (Framed<FrameCodec>, OwnedFd, [Client; 1]) {
    let (rx, peer) = with_raw_peer(kind);
    let (slow, client) = slow_to_close();
    raw_send(&peer, &encoded(b"", 1), &[slow]);
    (rx, peer, [client])
}

#[test]
fn dropping_a_connection_does_not_wait_for_its_unread_descriptors() {
    counted(async |kind| {
        let (rx, _peer, clients) = with_unread(kind);
        without_waiting(clients, async { drop(rx) }).await;
    });
}

#[test]
fn dropping_a_connection_whose_peer_is_gone_does_not_wait_for_its_unread_descriptors() {
    counted(async |kind| {
        let (rx, peer, clients) = with_unread(kind);
        drop(peer);
        without_waiting(clients, async { drop(rx) }).await;
    });
}

#[test]
fn dropping_the_last_half_does_not_wait_for_its_unread_descriptors() {
    counted(async |kind| {
        let (rx, _peer, clients) = with_unread(kind);
        let (read, write) = rx.into_split();
        without_waiting(clients, async { drop((read, write)) }).await;

        let (rx, _peer, clients) = with_unread(kind);
        let (read, write) = rx.into_split();
        without_waiting(clients, async { drop((write, read)) }).await;
    });
}

#[test]
fn dropping_a_driver_does_not_wait_for_the_unread_descriptors_of_its_connection() {
    counted(async |kind| {
        let (rx, _peer, clients) = with_unread(kind);
        let (read, write) = rx.into_split();
        let (sender, driver) = write.into_sender();
        drop((read, sender));
        without_waiting(clients, async { drop(driver) }).await;
    });
}

#[test]
fn dropping_a_datagram_or_its_socket_does_not_wait() {
    counted(async |_| {
        let with_unread = || {
            let (a, b) = DatagramSocket::pair().unwrap();
            let (slow, client) = slow_to_close();
            raw_send(&a, b"", &[slow]);
            (a, b, [client])
        };
        let (_a, b, clients) = with_unread();
        without_waiting(clients, async { drop(b) }).await;
        let (_a, b, clients) = with_unread();
        without_waiting(clients, async { drop(b.recv().await.unwrap()) }).await;
        // The message is too long, so the receiver gets an error instead of it.
        let (a, b) = DatagramSocket::pair().unwrap();
        let (slow, client) = slow_to_close();
        setsockopt(&a, sockopt::SndBuf, &(2 << 20)).unwrap();
        a.send(vec![0; (256 << 10) + 1], &[slow.as_fd()]).await.unwrap();
        drop(slow);
        let received = without_waiting([client], b.recv()).await;
        assert!(matches!(received, Err(Error::TruncatedPacket)));
    });
}

#[test]
fn dropping_a_socket_does_not_wait_for_its_unread_descriptors() {
    counted(async |kind| {
        let (rx, _peer, clients) = with_unread(kind);
        let parts = rx.into_parts();
        without_waiting(clients, async { drop(parts.socket) }).await;
    });
}

#[test]
fn dropping_a_listener_does_not_wait_for_unread_descriptors_in_its_backlog() {
    counted(async |kind| {
        let addr = abstract_name("backlog");
        let listener = Listener::bind_addr(&addr, kind).unwrap();
        let (slow, client) = slow_to_close();
        let peer = raw::connected_to(&addr, kind);
        raw_send(&peer, b"?", &[slow]);
        without_waiting([client], async { drop(listener) }).await;
    });
}

#[test]
fn the_end_of_a_runtime_does_not_wait_for_the_unread_descriptors_of_its_connections() {
    counted(async |kind| {
        let (slow, client) = slow_to_close();
        let (ours, peer) = raw::pair(kind);
        raw_send(&peer, b"?", &[slow]);
        let (done, ended) = oneshot::channel();
        std::thread::spawn(move || {
            let runtime = one_thread();
            runtime.block_on(async {
                let rx = Framed::new(Socket::try_from(ours).unwrap(), FrameCodec::default());
                tokio::spawn(async move {
                    std::future::pending::<()>().await;
                    drop(rx);
                });
                yield_now().await;
            });
            drop(runtime);
            let _ = done.send(());
        });
        without_waiting([client], ended).await.unwrap();
    });
}

#[test]
fn after_a_fault_dropping_a_connection_waits_for_neither_read_nor_unread_descriptors() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let (read, first) = slow_to_close();
        let (unread, second) = slow_to_close();
        raw_send(&peer, b"?", &[read]);
        raw_send(&peer, b"?", &[unread]);
        without_waiting([first, second], async {
            assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { found: b'?' }))));
            drop(rx);
        })
        .await;
    });
}

#[test]
fn dropping_a_message_does_not_wait() {
    counted(async |kind| {
        let (mut rx, _peer, clients) = with_unread(kind);
        let frame = rx.try_next().await.unwrap().unwrap();
        without_waiting(clients, async { drop(frame) }).await;
    });
}

#[test]
fn dropping_descriptors_of_a_message_one_by_one_or_as_a_wrong_number_does_not_wait() {
    counted(async |kind| {
        let (mut rx, _peer, clients) = with_unread(kind);
        let frame = rx.try_next().await.unwrap().unwrap();
        let rest = frame.fds.into_iter();
        without_waiting(clients, async { drop(rest) }).await;

        let (mut rx, _peer, clients) = with_unread(kind);
        let frame = rx.try_next().await.unwrap().unwrap();
        without_waiting(clients, async { assert!(frame.fds.into_array::<2>().is_err()) }).await;

        let (mut rx, _peer, clients) = with_unread(kind);
        let mut frame = rx.try_next().await.unwrap().unwrap();
        without_waiting(clients, async { frame.fds = Fds::none() }).await;
    });
}

#[test]
fn dropping_a_queue_of_descriptors_does_not_wait() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let (slow, client) = slow_to_close();
        raw_send(&peer, &encoded(b"", 1)[..1], &[slow]);
        while !raw::nothing_is_unread(rx.socket()) {
            yield_now().await;
            assert!(timeout(Duration::ZERO, rx.next()).await.is_err());
        }
        let parts = rx.into_parts();
        assert_eq!(parts.received_fds.len(), 1);
        without_waiting([client], async { drop(parts.received_fds) }).await;
    });
}

#[test]
fn a_message_that_is_not_sent_is_dropped_without_waiting() {
    counted(async |kind| {
        for way in WAYS {
            let (slow, client) = slow_to_close();
            let (mut tx, _peer) = with_raw_peer(kind);
            tx.feed(Frame::from_parts("", [way(slow)])).await.unwrap();
            without_waiting([client], async { drop(tx) }).await;
        }
    });
}

/// Receives on a thread of its own until the end. It closes the last descriptor of each message at
/// once, often before the sender has closed its copy. The sender's copy is the last one then.
fn close_quickly(socket: OwnedFd, makes_slow: bool) -> JoinHandle<()> {
    std::thread::spawn(move || {
        loop {
            match raw::receive(&socket, false) {
                Ok((_, mut fds)) => match fds.pop() {
                    Some(last) if makes_slow => linger(&last),
                    Some(last) => drop(last),
                    None => return,
                },
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    })
}

/// The ways to hand a socket over. The connection has the last reference then.
const WAYS: [fn(OwnedFd) -> SendFd; 3] =
    [SendFd::from, |socket| SendFd::assume_socket(socket), |socket| SendFd::from(Arc::new(socket))];

async fn send_to_a_quick_receiver(kind: SocketKind, makes_slow: bool) {
    const SENDS: usize = 60;
    let (ours, theirs) = raw::pair(kind);
    let quick = close_quickly(theirs, makes_slow);
    let mut tx = Framed::new(Socket::try_from(ours).unwrap(), FrameCodec::default());
    for way in WAYS.into_iter().cycle().take(SENDS) {
        let (socket, client) = if makes_slow { full_connection() } else { slow_to_close() };
        // These descriptors come first. Their numbers are not consecutive, so the sender closes its
        // copies one by one and is busy.
        let others = nulls(200).into_iter().step_by(2);
        let frame = Frame::from_parts("", others.map(SendFd::from)).with_fd(way(socket));
        without_waiting([client], tx.send(frame)).await.unwrap();
    }
    drop(tx);
    quick.join().unwrap();
}

#[test]
fn sending_does_not_wait_for_a_close_although_the_receiver_has_closed_its_copy_before() {
    counted(async |kind| send_to_a_quick_receiver(kind, false).await);
}

#[test]
fn sending_does_not_wait_for_a_close_that_the_receiver_has_made_slow() {
    counted(async |kind| send_to_a_quick_receiver(kind, true).await);
}

#[test]
fn a_message_that_a_mapping_refuses_is_dropped_without_waiting() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let codec = || {
            FrameCodec::default().map(
                |frame: Frame| match frame.fds.into_array() {
                    Ok([file]) => Ok(std::fs::File::from(file)),
                    Err(fds) => Err(Error::invalid(format!("{} files", fds.len()))),
                },
                |file: std::fs::File| -> Result<Frame, SendError<std::fs::File>> {
                    Ok(Frame::new("").with_fd(file))
                },
            )
        };
        let mut rx = Framed::with_codecs(a, codec(), codec());
        let (slow, client) = slow_to_close();
        raw_send(&peer, &encoded(b"", 2), &[slow, marked(1)]);
        let refused = without_waiting([client], rx.next()).await;
        assert!(matches!(refused, Some(Err(Error::Invalid(_)))));
    });
}

/// A codec that takes a descriptor with each byte, and accepts only the letter F.
struct Letters;

impl Codec for Letters {}

impl Decoder for Letters {
    type Item = Fds;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> Result<Option<Fds>, Error> {
        let Some(&letter) = src.first() else { return Ok(None) };
        let Ok(taken) = fds.claim(1) else { return Ok(None) };
        src.advance(1);
        if letter == b'F' { Ok(Some(taken)) } else { Err(Error::invalid("not an F")) }
    }
}

#[test]
fn descriptors_that_a_decoder_has_taken_before_it_fails_are_dropped_without_waiting() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let mut rx = Framed::with_codecs(a, Letters, FrameCodec::default());
        let (slow, client) = slow_to_close();
        raw_send(&peer, b"G", &[slow]);
        let failed = without_waiting([client], rx.next()).await;
        assert!(matches!(failed, Some(Err(Error::Invalid(_)))));
    });
}

#[test]
fn descriptors_that_came_before_others_were_lost_are_dropped_without_waiting() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let mut rx = Framed::new(a, PacketCodec::default());
        let (slow, client) = slow_to_close();
        // The kernel closes the descriptors that it can't install during the call, so only the
        // first ones can be slow.
        raw_send(&peer, b"?", &[slow].into_iter().chain(nulls(30)).collect::<Vec<_>>());
        let limit = FdLimit::leave(10);
        let lost = without_waiting([client], rx.next()).await;
        drop(limit);
        assert!(matches!(lost, Some(Err(Error::TruncatedControl))));
    });
}

/// Makes a Unix socket whose queue holds a Unix socket, and so on; the last one holds the
/// descriptor. Returns `None` if the kernel does not nest so deeply.
fn nested(bottom: OwnedFd, depth: usize, kind: SocketKind) -> Option<OwnedFd> {
    let mut inner = bottom;
    for _ in 0..depth {
        let (outer, sender) = raw::pair(kind);
        raw::try_send(&sender, b"?", &[inner])?;
        inner = outer;
    }
    Some(inner)
}

#[test]
fn sockets_nested_in_sockets_are_closed_without_waiting() {
    counted(async |kind| {
        for read in [false, true] {
            let (slow, client) = slow_to_close();
            let Some(nested) = nested(slow, 200, kind) else {
                return eprintln!("skipped: this kernel does not nest sockets so deeply");
            };
            let (mut rx, peer) = with_raw_peer(kind);
            raw_send(&peer, b"?", &[nested]);
            without_waiting([client], async {
                if read {
                    assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
                }
                drop(rx);
            })
            .await;
        }
    });
}

#[test]
fn a_descriptor_that_is_not_the_expected_socket_is_not_waited_for() {
    counted(async |_| {
        let (slow, client) = slow_to_close();
        without_waiting([client], async { Socket::try_from(slow).unwrap_err() }).await;
        let (slow, client) = slow_to_close();
        without_waiting([client], async { Listener::try_from(slow).unwrap_err() }).await;
    });
}

/// The dispatcher chooses the descriptors that come with a connection.
#[test]
fn dropping_an_adopted_connection_does_not_wait_for_the_descriptors_that_came_with_it() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut incoming = Incoming::builder().max_fds(2).build(b);
        let mut dispatcher = Framed::new(a, DispatcherCodec::default());
        dispatcher.next().await.unwrap().unwrap();
        let welcome = ToWorker::<Offer<SendFd>, NewLink<SendFd>>::Welcome { version: VERSION };
        dispatcher.send(welcome).await.unwrap();

        let (slow, client) = slow_to_close();
        let (accepted, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        let offer = Offer {
            cookie: rustix::net::sockopt::socket_cookie(&accepted).unwrap(),
            transport: Transport::UnixStream,
            peer: Address::Unnamed,
            local: Address::Unnamed,
            prefix: Default::default(),
            metadata: Default::default(),
            fd: SendFd::from(OwnedFd::from(accepted)),
            bundle: vec![SendFd::from(slow)],
        };
        let (connection, ()) = tokio::join!(incoming.next(), async {
            assert!(matches!(dispatcher.next().await, Some(Ok(FromWorker::Demand { .. }))));
            dispatcher.send(ToWorker::Offer { number: 0, offer }).await.unwrap();
        });
        without_waiting([client], async { drop(connection) }).await;
    });
}
