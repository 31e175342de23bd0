//! Rules of the protocol that bind a worker, against dispatchers made of the codec or of plain
//! calls.

use std::{net, os::fd::OwnedFd, time::Duration};

use fdwire::{
    Socket, SocketKind,
    handoff::{
        Incoming, IncomingEnd,
        protocol::{FromWorker, NewLink, Offer, RejectReason, ToWorker},
    },
};
use rustix::{fs::fcntl_getfl, net::sockopt};
use tokio::time::Instant;

use crate::{
    common::{
        counted, encoded, marked,
        raw_receiver::{MOST_BYTES, MOST_FDS, RawReceiver},
        raw_send, settle,
    },
    raw_dispatcher::{RawDispatcher, offer_of, pair},
    worker::{ask, check_failed, clog, narrow_pair},
};

/// Makes a dispatcher of plain calls and a worker that have greeted each other. Returns the
/// dispatcher's socket, what it receives, and the worker, which has asked for offers.
async fn plain_dispatcher(kind: SocketKind, window: usize) -> (OwnedFd, RawReceiver, Incoming) {
    let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
    let mut incoming = Incoming::builder().window(window).build(worker_end);
    let socket = OwnedFd::from(dispatcher_end);
    let mut receiver = RawReceiver::new(socket.try_clone().unwrap(), kind);
    assert_eq!(receiver.frame().await.unwrap().0, b"\x01FDHO\x01\x01\x01\0\0\0\0\0\0\0\0");
    raw_send(&socket, &encoded(&[0x81, 1], 0), &[]);
    ask(&mut incoming);
    while receiver.frame().await.unwrap().0[0] != 2 {} // until DEMAND
    (socket, receiver, incoming)
}

/// Returns the frame of an OFFER without addresses.
fn offer(number: u64, connection: &net::TcpStream, read: &[u8]) -> Vec<u8> {
    let cookie = sockopt::socket_cookie(connection).unwrap();
    let mut payload =
        [&[0x82][..], &number.to_be_bytes(), &cookie.to_be_bytes(), &[1, 0, 0]].concat();
    payload.extend((read.len() as u32).to_be_bytes());
    payload.extend(read);
    payload.extend([0; 4]);
    encoded(&payload, 1)
}

fn connection() -> (net::TcpStream, net::TcpStream) {
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let accepted = listener.accept().unwrap().0;
    accepted.set_nonblocking(true).unwrap();
    (client, accepted)
}

/// Rules: P-ROOM.
#[test]
fn a_worker_has_room_for_the_largest_packets() {
    counted(async |kind| {
        let (socket, receiver, mut incoming) = plain_dispatcher(kind, MOST_FDS).await;
        let (_client, copy) = connection();
        // A packet has as many offers as one call takes descriptors, and is of the largest size.
        let bare = offer(0, &copy, b"").len();
        let mut packet = Vec::new();
        for number in 0..MOST_FDS as u64 - 1 {
            packet.extend(offer(number, &copy, b"ab"));
        }
        packet.extend(offer(
            MOST_FDS as u64 - 1,
            &copy,
            &vec![b'c'; MOST_BYTES - packet.len() - bare],
        ));
        assert_eq!(packet.len(), MOST_BYTES);
        raw_send(
            &socket,
            &packet,
            &Vec::from_iter((0..MOST_FDS).map(|_| copy.try_clone().unwrap().into())),
        );
        let mut served = Vec::new();
        while served.len() < MOST_FDS {
            served.extend(incoming.next_batch(MOST_FDS).await.unwrap());
        }

        // An offer takes one packet and then a longer one.
        let long = offer(MOST_FDS as u64, &copy, &[b'd'; 200_000]);
        let (sending, fd) = (socket.try_clone().unwrap(), copy.try_clone().unwrap());
        let sending = tokio::task::spawn_blocking(move || {
            let (begin, rest) = long.split_at(MOST_BYTES);
            raw_send(&sending, begin, &[fd.into()]);
            raw_send(&sending, rest, &[]);
        });
        let connection = incoming.next().await.unwrap();
        sending.await.unwrap();
        assert_eq!(connection.into_parts().prefix, [b'd'; 200_000][..]);
        drop((served, receiver));
    });
}

/// The answers of the worker wait together, so that packets are full.
///
/// Rules: P-FRAME, P-PACKET, P-EMPTY, W-HELLO, W-HELLO-ONCE, W-PONG.
#[test]
fn a_dispatcher_of_plain_calls_receives_what_the_protocol_says() {
    counted(async |kind| {
        const PINGS: u64 = 10_000;
        let (socket, mut receiver, incoming) = plain_dispatcher(kind, 1).await;
        let sending = tokio::task::spawn_blocking(move || {
            for nonce in 0..PINGS {
                raw_send(&socket, &encoded(&[&[0x84][..], &nonce.to_be_bytes()].concat(), 0), &[]);
            }
        });
        for nonce in 0..PINGS {
            let (payload, fds) = receiver.frame().await.unwrap();
            assert_eq!((payload, fds.len()), ([&[6][..], &nonce.to_be_bytes()].concat(), 0));
        }
        sending.await.unwrap();
        drop(incoming);
        assert_eq!(receiver.frame().await.unwrap().0, [7]);
        assert_eq!(receiver.frame().await.unwrap().0, [8]);
        assert!(receiver.frame().await.is_none());
    });
}

/// Checks that the worker leaves when it receives these bytes and descriptors, for this reason.
async fn check_leaves(kind: SocketKind, bytes: &[u8], fds: Vec<OwnedFd>, reason: &str) {
    let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
    ask(&mut incoming);
    dispatcher.expect_demand(64).await;
    raw_send(dispatcher.framed.socket(), bytes, &fds);
    drop(fds);
    check_failed(&mut incoming, &mut dispatcher, reason).await;
}

/// Rules: W-BREACH, P-FRAME, P-LENGTH, P-FDS, D-WELCOME-ONCE, D-NUMBER, D-OFFER-FDS.
#[test]
fn a_worker_leaves_a_dispatcher_at_each_breach() {
    counted(async |kind| {
        let (_client, copy) = connection();
        let fd = || OwnedFd::from(copy.try_clone().unwrap());
        let no_message = "not a message of a dispatcher of the hand-off protocol";
        check_leaves(kind, b"GET / HTTP/1.1\r\n\r\n", Vec::new(), "").await;
        check_leaves(kind, b"\xFD\x10\0\0\0\x10\0\x01", Vec::new(), "1048577").await;
        check_leaves(kind, b"\xFD\x10\0\x11\0\0\0\x01", Vec::new(), "17").await;
        check_leaves(kind, &encoded(b"\xBF", 0), Vec::new(), no_message).await;
        check_leaves(kind, &encoded(b"\x84", 0), Vec::new(), no_message).await;
        check_leaves(kind, &encoded(b"\x84\0\0\0\0\0\0\0\x01", 1), vec![fd()], no_message).await;
        check_leaves(kind, &encoded(b"\xC0later", 1), vec![fd()], no_message).await;
        check_leaves(kind, &encoded(b"\x81\x01", 0), Vec::new(), "a second WELCOME").await;
        check_leaves(kind, &offer(1, &copy, b""), vec![fd()], "an offer is missing").await;
        let mut without = offer(0, &copy, b"");
        without[3] = 0;
        check_leaves(kind, &without, Vec::new(), no_message).await;
        check_leaves(kind, &offer(0, &copy, b""), Vec::new(), "descriptor").await;
        check_leaves(kind, &offer(0, &copy, b""), vec![marked(1)], "does not have the cookie")
            .await;
    });
}

/// Rules: W-TOUCH, W-TRANSPORT, W-RECALL.
#[test]
fn a_connection_that_is_not_adopted_is_left_as_it_was() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (client, copy) = connection();
        sockopt::set_socket_linger(&copy, Some(Duration::from_secs(7))).unwrap();
        let state = || {
            let linger = sockopt::socket_linger(&copy).unwrap();
            (fcntl_getfl(&copy).unwrap(), linger, sockopt::tcp_nodelay(&copy).unwrap())
        };
        let before = state();
        dispatcher.send_offer(offer_of(&copy)).await;
        let unusable =
            Offer { transport: fdwire::handoff::Transport::UnixStream, ..offer_of(&copy) };
        dispatcher.send_offer(unusable).await;
        dispatcher.send(ToWorker::Recall { before: 1 }).await;
        dispatcher.expect_rejected(1, RejectReason::Recalled).await;
        dispatcher.expect_rejected(1, RejectReason::Unusable).await;
        dispatcher.settle().await;
        assert_eq!(state(), before);
        client.set_nonblocking(true).unwrap();
        let nothing = client.peek(&mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock, "it has not ended");
    });
}

/// Rules: W-DRAIN.
#[test]
fn the_time_limit_of_the_last_drain_counts() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        let handle = incoming.handle();
        ask(&mut incoming);
        let _client = dispatcher.offer().await;
        let connection = incoming.next().await.unwrap();
        dispatcher.expect_adopted(1).await;
        let mut first = true;
        for seconds in [Some(100), Some(10), None, Some(1000)] {
            let before = Instant::now();
            let within = seconds.map(Duration::from_secs);
            dispatcher.send(ToWorker::Drain { within }).await;
            if std::mem::take(&mut first) {
                dispatcher.expect(FromWorker::Draining).await;
            }
            dispatcher.settle().await;
            handle.drain(); // the application's own drain has no limit, and changes nothing
            let deadline = handle.drain_deadline();
            assert_eq!(deadline.is_some(), seconds.is_some());
            assert!(deadline.is_none_or(|deadline| {
                let limit = before..=Instant::now();
                (*limit.start() + within.unwrap()..=*limit.end() + within.unwrap())
                    .contains(&deadline)
            }));
        }
        drop(connection);
        dispatcher.expect(FromWorker::Goodbye).await;
    });
}

/// The worker's socket is full, so a PING arrives after the worker has decided to send its GOODBYE
/// and before it can.
///
/// Rules: W-LAST, W-GOODBYE.
#[test]
fn a_worker_sends_nothing_after_its_goodbye() {
    counted(async |kind| {
        let (mut dispatcher, incoming) = narrow_pair(kind).await;
        let pings = clog(&mut dispatcher).await;
        settle().await; // lets the worker's answers fill its socket
        incoming.handle().drain();
        settle().await;
        dispatcher.send(ToWorker::Ping { nonce: pings }).await;
        settle().await;
        let mut messages = Vec::new();
        while let Some(message) = dispatcher.answer().await {
            messages.push(message);
        }
        let pongs = (0..pings).map(|nonce| FromWorker::Pong { nonce });
        assert_eq!(
            messages,
            Vec::from_iter(pongs.chain([FromWorker::Draining, FromWorker::Goodbye]))
        );
        assert!(matches!(incoming.handle().ended().await, IncomingEnd::Drained));
    });
}

/// The socket in the MOVE is of no kind that a link may have.
///
/// Rules: W-MOVE-LOST.
#[test]
fn a_worker_that_cannot_use_its_new_link_drains() {
    counted(async |kind| {
        let (mut dispatcher, incoming) = pair(kind, Incoming::builder()).await;
        let handle = incoming.handle();
        let socket = OwnedFd::from(net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let cookie = sockopt::socket_cookie(&socket).unwrap();
        let link = NewLink { cookie, socket: socket.into() };
        dispatcher.send(ToWorker::Move(link)).await;
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
    });
}

/// Sends a MOVE. Returns the dispatcher at the new link, where the worker reports `open`
/// connections.
async fn move_worker(dispatcher: &mut RawDispatcher, kind: SocketKind, open: u64) -> RawDispatcher {
    let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
    let worker_end = OwnedFd::from(worker_end);
    let cookie = sockopt::socket_cookie(&worker_end).unwrap();
    dispatcher.send(ToWorker::Move(NewLink { cookie, socket: worker_end.into() })).await;
    RawDispatcher::at_new_link(dispatcher_end, open).await
}

/// The test has every message that a worker sends at its link before a MOVE and after it.
///
/// Rules: W-MOVE, W-OPEN, W-MOVED, W-STAY.
#[test]
fn a_worker_goes_on_at_a_new_link_and_stays_at_the_old_one() {
    counted(async |kind| {
        // The worker has adopted one connection, and has another offer.
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        let handle = incoming.handle();
        ask(&mut incoming);
        let (client, copy) = dispatcher.offer().await;
        let connection = incoming.next().await.unwrap();
        dispatcher.expect_adopted(1).await;
        let (other_client, other_copy) = dispatcher.offer().await;
        dispatcher.settle().await;

        // The worker greets at the new link. At the old one it rejects the offer and sends
        // DRAINING, in any order.
        let mut next = move_worker(&mut dispatcher, kind, 1).await;
        next.send(ToWorker::Welcome { version: 1 }).await;
        let mut answers = [dispatcher.answer().await.unwrap(), dispatcher.answer().await.unwrap()];
        answers.sort_by_key(|answer| *answer != FromWorker::Draining);
        let rejected = FromWorker::Rejected { first: 1, count: 1, reason: RejectReason::Draining };
        assert_eq!(answers, [FromWorker::Draining, rejected]);

        // The end of a connection that it adopted at the old link is reported at the new one.
        drop(connection);
        next.expect_finished(1).await;
        dispatcher.settle().await;
        // A DRAIN at the old link ends that link, and nothing else.
        dispatcher.send(ToWorker::Drain { within: None }).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert_eq!(dispatcher.answer().await, None);
        assert!(!handle.is_draining());

        // A DRAIN at the new link ends the worker.
        next.send(ToWorker::Drain { within: None }).await;
        next.expect(FromWorker::Draining).await;
        next.expect(FromWorker::Goodbye).await;
        assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        drop((client, copy, other_client, other_copy));
    });
}

/// Rules: W-END-MOVED.
#[test]
fn a_worker_whose_new_link_ends_waits_at_the_old_one_until_that_ends_too() {
    counted(async |kind| {
        let (mut dispatcher, incoming) = pair(kind, Incoming::builder()).await;
        let handle = incoming.handle();
        for is_first in [true, false] {
            let next = move_worker(&mut dispatcher, kind, 0).await;
            if is_first {
                dispatcher.expect(FromWorker::Draining).await;
            }
            drop(next);
            dispatcher.settle().await;
            settle().await;
            assert!(!handle.is_draining());
        }
        drop(dispatcher);
        assert!(matches!(handle.ended().await, IncomingEnd::DispatcherGone));
    });
}
