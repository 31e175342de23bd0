//! The worker's side, with a dispatcher made of the codec.

use std::{
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix,
    },
    sync::mpsc,
    time::Duration,
};

use fdwire::{
    Error, Socket, SocketKind,
    handoff::{
        Address, Connection, ConnectionParts, ConnectionStream, Incoming, IncomingEnd, Transport,
        protocol::{FromWorker, Offer, RejectReason, ToWorker},
    },
};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::sys::socket::MsgFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use crate::{
    common::{counted, settle},
    raw_dispatcher::{RawDispatcher, offer_of, pair},
};

/// Asks for a connection, as the application does. Checks that none is there yet.
pub(crate) fn ask(incoming: &mut Incoming) {
    assert!(incoming.next().now_or_never().is_none());
}

/// Checks that the client receives what is written to the connection.
pub(crate) async fn check_reaches(connection: &mut Connection, client: &mut TcpStream) {
    connection.write_all(b"hello").await.unwrap();
    let mut received = [0; 5];
    client.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"hello");
}

async fn is_at_end(client: &mut TcpStream) -> bool {
    matches!(client.read(&mut [0]).await, Ok(0) | Err(_))
}

#[test]
fn a_worker_has_no_demand_before_its_application_asks() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        dispatcher.settle().await;
        assert_eq!(dispatcher.demand, 0);

        ask(&mut incoming);
        dispatcher.expect_demand(64).await;
        for taken in 1..=3 {
            let (mut client, _copy) = dispatcher.offer().await;
            let mut connection = incoming.next().await.unwrap();
            check_reaches(&mut connection, &mut client).await;
            dispatcher.expect_adopted(1).await;
            dispatcher.expect_demand(64 + taken).await;
        }
        // When the application does not ask, offers that wait do not increase the demand.
        let waiting = [dispatcher.offer().await, dispatcher.offer().await];
        dispatcher.settle().await;
        assert_eq!(dispatcher.demand, 67);
        drop(waiting);
    });
}

#[test]
fn a_connection_has_the_addresses_and_metadata_of_its_offer() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (client, copy) = dispatcher.accept().await;
        dispatcher.send_offer(Offer { metadata: "tenant 7".into(), ..offer_of(&copy) }).await;
        let connection = incoming.next().await.unwrap();
        assert_eq!(connection.peer_addr().socket_addr(), Some(client.local_addr().unwrap()));
        assert_eq!(connection.local_addr().socket_addr(), Some(client.peer_addr().unwrap()));
        assert_eq!(connection.metadata(), "tenant 7");
    });
}

#[test]
fn a_bundle_comes_with_its_connection() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut incoming = Incoming::builder().max_fds(3).build(b);
        let mut dispatcher = RawDispatcher::before_greeting_with(a, 3).await;
        dispatcher.send(ToWorker::Welcome { version: fdwire::handoff::protocol::VERSION }).await;
        ask(&mut incoming);
        let (_client, copy) = dispatcher.accept().await;
        let (upstream, passed) = unix::net::UnixStream::pair().unwrap();
        dispatcher.send_offer(Offer { bundle: vec![passed.into()], ..offer_of(&copy) }).await;
        let mut connection = incoming.next().await.unwrap();
        let bundle = std::mem::take(connection.bundle_mut());
        assert_eq!(bundle.len(), 1);
        drop(bundle);
        upstream.set_nonblocking(false).unwrap();
        assert_eq!(std::io::Read::read(&mut &upstream, &mut [0]).unwrap(), 0);
    });
}

#[test]
fn the_prefix_is_read_before_the_bytes_in_the_socket() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        for taken_apart in [false, true] {
            let (mut client, copy) = dispatcher.accept().await;
            dispatcher.send_offer(Offer { prefix: "GET / HT".into(), ..offer_of(&copy) }).await;
            client.write_all(b"TP/1.1").await.unwrap();

            let mut connection = incoming.next().await.unwrap();
            let mut begin = [0; 3];
            connection.read_exact(&mut begin).await.unwrap();
            assert_eq!(&begin, b"GET");
            if taken_apart {
                let ConnectionParts { stream, prefix, serving, .. } = connection.into_parts();
                assert_eq!(prefix, " / HT");
                let ConnectionStream::Tcp(mut stream) = stream else { panic!("not TCP") };
                let mut rest = [0; 6];
                stream.read_exact(&mut rest).await.unwrap();
                assert_eq!(&rest, b"TP/1.1");

                // The connection counts as being served until `serving` is dropped, even if the
                // stream has been dropped before.
                drop(stream);
                dispatcher.expect_adopted(1).await;
                dispatcher.settle().await;
                assert_eq!(dispatcher.finished, 1);
                drop(serving);
                dispatcher.expect_finished(2).await;
            } else {
                let mut rest = [0; 11];
                connection.read_exact(&mut rest).await.unwrap();
                assert_eq!(&rest, b" / HTTP/1.1");
                drop(connection);
                dispatcher.expect_adopted(1).await;
                dispatcher.expect_finished(1).await;
            }
        }
    });
}

#[test]
fn unix_connections_are_served_too() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        // A Unix connection is offered, of which one byte was read already.
        let (client, accepted) = unix::net::UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        accepted.set_nonblocking(true).unwrap();
        let mut client = UnixStream::from_std(client).unwrap();
        let offer = Offer {
            cookie: rustix::net::sockopt::socket_cookie(&accepted).unwrap(),
            transport: Transport::UnixStream,
            peer: Address::Unnamed,
            local: Address::Path("/run/front.sock".into()),
            prefix: "a".into(),
            metadata: Default::default(),
            fd: accepted.into(),
            bundle: Vec::new(),
        };
        dispatcher.send_offer(offer).await;
        client.write_all(b"b").await.unwrap();
        // The application reads both bytes and sends them back.
        let mut connection = incoming.next().await.unwrap();
        assert_eq!(connection.local_addr().to_string(), "/run/front.sock");
        let mut received = [0; 2];
        connection.read_exact(&mut received).await.unwrap();
        connection.write_all(&received).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "ab");
    });
}

/// Sends more pings than the worker's socket takes answers, so that its answers wait. Returns the
/// number of pings.
pub(crate) async fn clog(dispatcher: &mut RawDispatcher) -> u64 {
    let pings = 5_000;
    for nonce in 0..pings {
        dispatcher.framed.feed(ToWorker::Ping { nonce }).await.unwrap();
    }
    dispatcher.framed.flush().await.unwrap();
    pings
}

/// Receives the answers to the pings of [`clog`].
async fn unclog(dispatcher: &mut RawDispatcher, pings: u64) {
    for nonce in 0..pings {
        dispatcher.expect(FromWorker::Pong { nonce }).await;
    }
}

/// Makes a dispatcher and a worker whose socket has the smallest send buffer.
pub(crate) async fn narrow_pair(kind: SocketKind) -> (RawDispatcher, Incoming) {
    let (a, b) = Socket::pair(kind).unwrap();
    b.set_send_buffer_size(1).unwrap();
    let mut incoming = Incoming::new(b);
    let mut dispatcher = RawDispatcher::greet(a).await;
    ask(&mut incoming);
    dispatcher.expect_demand(64).await;
    (dispatcher, incoming)
}

/// Checks that the application gets no connection, however often it asks.
async fn gets_nothing(incoming: &mut Incoming) {
    for _ in 0..200 {
        ask(incoming);
        tokio::task::yield_now().await;
    }
}

/// Rules: W-ADOPTED.
#[test]
fn an_application_gets_a_connection_only_after_the_answer_was_sent() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = narrow_pair(kind).await;
        let pings = clog(&mut dispatcher).await;
        let (mut client, _copy) = dispatcher.offer().await;
        // The future is dropped each time, and no connection is lost with it.
        gets_nothing(&mut incoming).await;
        unclog(&mut dispatcher, pings).await;
        dispatcher.expect_adopted(1).await;
        check_reaches(&mut incoming.next().await.unwrap(), &mut client).await;
    });
}

/// Rules: W-NOT-SENT, W-END, W-TOUCH.
#[test]
fn an_application_does_not_get_a_connection_whose_answer_is_cut_off() {
    counted(async |kind| {
        for clogged in [false, true] {
            // The worker has an offer. Its answer waits behind others, or is not sent yet.
            let (mut dispatcher, mut incoming) = narrow_pair(kind).await;
            let pings = if clogged { clog(&mut dispatcher).await } else { 0 };
            let (mut client, mut copy) = dispatcher.offer().await;
            if clogged {
                gets_nothing(&mut incoming).await;
            }
            // The worker is fenced, so the answer cannot be sent, and the application gets nothing.
            dispatcher.framed.socket().shutdown(Shutdown::Read).unwrap();
            let mut pongs = 0;
            while let Some(message) = dispatcher.framed.next().await.and_then(Result::ok) {
                assert!(matches!(message, FromWorker::Pong { .. }));
                pongs += 1;
            }
            assert!(pongs < pings.max(1));
            assert!(incoming.next().await.is_none());
            assert!(matches!(incoming.handle().ended().await, IncomingEnd::Fenced));

            // The worker has closed its copy, and the connection is as it was.
            std::io::Write::write_all(&mut copy, b"elsewhere").unwrap();
            drop(copy);
            let mut received = String::new();
            client.read_to_string(&mut received).await.unwrap();
            assert_eq!(received, "elsewhere");
        }
    });
}

/// Rules: W-FIRST, W-TRANSPORT.
#[test]
fn answers_come_in_the_order_of_the_offers() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let mut first = dispatcher.offer().await;
        for _ in 0..2 {
            let (_, copy) = dispatcher.accept().await;
            let not_unix = Offer { transport: Transport::UnixStream, ..offer_of(&copy) };
            dispatcher.send_offer(not_unix).await;
        }
        let mut last = dispatcher.offer().await;
        dispatcher.settle().await; // the answer to an unusable offer waits for its turn

        let mut connection = incoming.next().await.unwrap();
        check_reaches(&mut connection, &mut first.0).await;
        dispatcher.expect_adopted(1).await;
        dispatcher.expect_rejected(2, RejectReason::Unusable).await;
        dispatcher.settle().await;
        let mut connection = incoming.next().await.unwrap();
        check_reaches(&mut connection, &mut last.0).await;
        dispatcher.expect_adopted(1).await;
    });
}

#[test]
fn a_batch_of_connections_has_one_answer() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(dispatcher.offer().await);
        }
        dispatcher.settle().await;
        let mut batch = incoming.next_batch(3).await.unwrap();
        assert_eq!(batch.len(), 3);
        dispatcher.expect_adopted(3).await;
        batch.extend(incoming.next_batch(100).await.unwrap());
        dispatcher.expect_adopted(2).await;
        dispatcher.expect_demand(64 + 5).await;
        for (connection, (client, _)) in batch.iter_mut().zip(&mut clients) {
            check_reaches(connection, client).await;
        }
    });
}

/// Rules: W-RECALL.
#[test]
fn offers_to_a_busy_application_can_be_recalled() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let mut offers = Vec::new();
        for _ in 0..5 {
            offers.push(dispatcher.offer().await);
        }
        drop(incoming.next().await);
        dispatcher.expect_adopted(1).await;
        dispatcher.send(ToWorker::Recall { before: 4 }).await;
        dispatcher.expect_rejected(3, RejectReason::Recalled).await;
        dispatcher.settle().await;
        assert_eq!(dispatcher.demand, 65, "rejected offers do not increase the demand");

        let mut connection = incoming.next().await.unwrap();
        check_reaches(&mut connection, &mut offers[4].0).await;
        dispatcher.expect_adopted(1).await;
        dispatcher.expect_demand(64 + 5).await;

        dispatcher.send(ToWorker::Recall { before: 5 }).await;
        dispatcher.settle().await; // all offers are answered, so nothing is rejected
    });
}

/// Rules: W-PONG.
#[test]
fn pings_are_answered_while_the_application_blocks() {
    counted(async |kind| {
        // The worker's application takes a connection, and then blocks until it is released.
        let (a, b) = Socket::pair(kind).unwrap();
        let socket = OwnedFd::from(b);
        let (release, released) = mpsc::channel();
        let worker = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            let application = async move {
                let mut incoming = Incoming::new(socket.try_into().unwrap());
                drop(incoming.next().await);
                released.recv().unwrap();
                assert!(incoming.next().await.is_some());
                let handle = incoming.handle();
                drop(incoming);
                handle.ended().await
            };
            runtime.block_on(async { tokio::spawn(application).await.unwrap() })
        });
        // Meanwhile a ping is answered, an end is reported, and an offer is rejected when recalled.
        let mut dispatcher = RawDispatcher::greet(a).await;
        let _first = dispatcher.offer().await;
        dispatcher.expect_adopted(1).await;
        let _second = dispatcher.offer().await;
        dispatcher.settle().await;
        dispatcher.expect_finished(1).await;
        dispatcher.send(ToWorker::Recall { before: 2 }).await;
        dispatcher.expect_rejected(1, RejectReason::Recalled).await;
        // The application goes on, gets one more, and leaves.
        release.send(()).unwrap();
        dispatcher.expect_demand(66).await;
        let _third = dispatcher.offer().await;
        dispatcher.expect_adopted(1).await;
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert!(matches!(worker.join().unwrap(), IncomingEnd::Drained));
    });
}

#[test]
fn a_worker_has_no_more_connections_at_a_time_than_max_connections() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) =
            pair(kind, Incoming::builder().max_connections(2)).await;
        ask(&mut incoming);
        dispatcher.expect_demand(2).await;
        let _clients = [dispatcher.offer().await, dispatcher.offer().await];
        let served = [incoming.next().await.unwrap(), incoming.next().await.unwrap()];
        ask(&mut incoming);
        dispatcher.expect_adopted(1).await;
        dispatcher.expect_adopted(1).await;
        dispatcher.settle().await;
        assert_eq!(dispatcher.demand, 2);
        drop(served);
        dispatcher.expect_finished(2).await;
        dispatcher.expect_demand(4).await;
    });
}

/// Rules: W-SHUTDOWN.
#[test]
fn a_finished_connection_ends_for_the_client_though_the_dispatcher_has_a_copy() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (mut client, _copy) = dispatcher.offer().await;
        let mut connection = incoming.next().await.unwrap();
        check_reaches(&mut connection, &mut client).await;
        drop(connection);
        assert!(is_at_end(&mut client).await);
    });
}

#[test]
fn an_adopted_connection_is_closed_without_lingering() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (_client, copy) = dispatcher.accept().await;
        let linger = || rustix::net::sockopt::socket_linger(&copy).unwrap();
        rustix::net::sockopt::set_socket_linger(&copy, Some(Duration::from_secs(30))).unwrap();
        dispatcher.send_offer(offer_of(&copy)).await;
        let connection = incoming.next().await.unwrap();
        assert!(linger().is_some());
        drop(connection);
        assert!(linger().is_none());
    });
}

/// Rules: W-DRAIN, W-GOODBYE, W-PONG.
#[test]
fn a_dispatcher_can_drain_a_worker() {
    counted(async |kind| {
        // The worker has adopted one connection, and two offers wait.
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        let handle = incoming.handle();
        let (requested, ended) = (handle.drain_requested(), handle.ended());
        ask(&mut incoming);
        let (mut client, _copy) = dispatcher.offer().await;
        let mut connection = incoming.next().await.unwrap();
        let waiting = [dispatcher.offer().await, dispatcher.offer().await];
        dispatcher.expect_adopted(1).await;
        assert!(handle.drain_deadline().is_none());

        // At a DRAIN, the worker rejects the offers, and its application learns of it.
        dispatcher.send(ToWorker::Drain { within: Some(Duration::from_secs(9)) }).await;
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect_rejected(2, RejectReason::Draining).await;
        requested.await;
        assert!(handle.drain_deadline().is_some());
        assert!(incoming.next().await.is_none() && incoming.next_batch(5).await.is_none());

        // Offers on their way are rejected, and adopted connections go on.
        let late = dispatcher.offer().await;
        dispatcher.expect_rejected(1, RejectReason::Draining).await;
        check_reaches(&mut connection, &mut client).await;
        dispatcher.settle().await;
        // When its last connection has ended, the worker leaves.
        drop(connection);
        dispatcher.expect(FromWorker::Goodbye).await;
        assert_eq!(dispatcher.finished, 1);
        assert!(dispatcher.answer().await.is_none());
        assert!(matches!(ended.await, IncomingEnd::Drained));
        drop((waiting, late));
    });
}

#[test]
fn an_application_can_drain_its_worker() {
    counted(async |kind| {
        for by_drop in [false, true] {
            let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
            let handle = incoming.handle();
            ask(&mut incoming);
            let _first = dispatcher.offer().await;
            let connection = incoming.next().await.unwrap();
            let _waiting = dispatcher.offer().await;
            dispatcher.settle_adopted().await;
            if by_drop {
                drop(incoming);
            } else {
                handle.drain();
                assert!(incoming.next().await.is_none());
            }
            dispatcher.expect(FromWorker::Draining).await;
            dispatcher.expect_rejected(1, RejectReason::Draining).await;
            dispatcher.settle().await;
            handle.drain_requested().await;
            drop(connection);
            dispatcher.expect(FromWorker::Goodbye).await;
            assert!(matches!(handle.ended().await, IncomingEnd::Drained));
        }
    });
}

impl RawDispatcher {
    /// Checks that the worker has adopted one connection and has nothing else to send.
    async fn settle_adopted(&mut self) {
        self.expect_adopted(1).await;
        self.settle().await;
    }
}

#[test]
fn an_application_that_leaves_while_its_answer_waits_ends_the_connection() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = narrow_pair(kind).await;
        let pings = clog(&mut dispatcher).await;
        let (mut client, _copy) = dispatcher.offer().await;
        gets_nothing(&mut incoming).await;
        drop(incoming);
        unclog(&mut dispatcher, pings).await;
        dispatcher.expect_adopted(1).await;
        assert!(is_at_end(&mut client).await);
        dispatcher.expect(FromWorker::Draining).await;
        dispatcher.expect(FromWorker::Goodbye).await;
        assert_eq!(dispatcher.finished, 1);
    });
}

/// Rules: W-END.
#[test]
fn when_the_dispatcher_dies_offers_are_closed_and_adopted_connections_go_on() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (mut served, _) = dispatcher.offer().await;
        let mut connection = incoming.next().await.unwrap();
        let (mut waiting, _) = dispatcher.offer().await;
        drop(dispatcher);
        let handle = incoming.handle();
        assert!(matches!(handle.link_ended().await, IncomingEnd::DispatcherGone));
        assert!(incoming.next().await.is_none());
        assert!(is_at_end(&mut waiting).await);
        check_reaches(&mut connection, &mut served).await;
        settle().await;
        assert!(handle.ended().now_or_never().is_none(), "a connection is being served");
        drop(connection);
        assert!(matches!(handle.ended().await, IncomingEnd::DispatcherGone));
    });
}

/// Rules: W-END.
#[test]
fn offers_of_a_dead_dispatcher_are_served_with_serve_unanswered() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) =
            pair(kind, Incoming::builder().serve_unanswered(true)).await;
        ask(&mut incoming);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(dispatcher.offer().await.0);
        }
        drop(dispatcher);
        let handle = incoming.handle();
        for mut client in clients {
            check_reaches(&mut incoming.next().await.unwrap(), &mut client).await;
        }
        assert!(incoming.next().await.is_none());
        assert!(matches!(handle.ended().await, IncomingEnd::DispatcherGone));
    });
}

/// The application has got none of the connections that waited, so they end when it leaves.
#[test]
fn an_application_that_leaves_after_the_end_of_its_link_ends_connections_that_wait() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) =
            pair(kind, Incoming::builder().serve_unanswered(true)).await;
        ask(&mut incoming);
        let mut clients = [dispatcher.offer().await.0, dispatcher.offer().await.0];
        dispatcher.settle().await;
        drop(dispatcher);
        let handle = incoming.handle();
        assert!(matches!(handle.link_ended().await, IncomingEnd::DispatcherGone));
        assert!(handle.ended().now_or_never().is_none(), "connections wait for the application");
        drop(incoming);
        assert!(matches!(handle.ended().await, IncomingEnd::DispatcherGone));
        for client in &mut clients {
            assert!(is_at_end(client).await);
        }
    });
}

/// Rules: W-END.
#[test]
fn offers_of_a_dispatcher_that_has_fenced_the_worker_are_not_served() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) =
            pair(kind, Incoming::builder().serve_unanswered(true)).await;
        ask(&mut incoming);
        let (mut client, _copy) = dispatcher.offer().await;
        dispatcher.framed.socket().shutdown(Shutdown::Read).unwrap();
        assert!(incoming.next().await.is_none());
        assert!(matches!(incoming.handle().ended().await, IncomingEnd::Fenced));
        assert!(client.read(&mut [0]).now_or_never().is_none());
    });
}

/// Checks that the worker has ended its link for this reason.
pub(crate) async fn check_failed(
    incoming: &mut Incoming,
    dispatcher: &mut RawDispatcher,
    reason: &str,
) {
    assert!(incoming.next().await.is_none());
    match incoming.handle().ended().await {
        IncomingEnd::Failed(error) => assert!(error.to_string().contains(reason), "{error}"),
        end => panic!("{end:?}"),
    }
    while let Ok(Some(_)) = dispatcher.framed.try_next().await {}
}

/// Rules: W-BREACH, D-COOKIE.
#[test]
fn a_descriptor_that_is_not_the_offered_one_ends_the_link() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let [(mut client, one), (_, other)] =
            [dispatcher.accept().await, dispatcher.accept().await];
        let offer = Offer { fd: other.into(), ..offer_of(&one) };
        dispatcher.send_offer(offer).await;
        check_failed(&mut incoming, &mut dispatcher, "does not have the cookie").await;
        assert!(client.read(&mut [0]).now_or_never().is_none(), "the connection was ended or used");
    });
}

/// Another process has read an offer from the worker's socket, as a child that has inherited it may
/// do. Without numbers, the worker's next answer would count for the lost offer.
///
/// Rules: W-BREACH, D-NUMBER.
#[test]
fn a_worker_whose_offers_another_process_reads_ends_its_link() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let thief = b.as_fd().try_clone_to_owned().unwrap();
        let mut incoming = Incoming::new(b);
        let mut dispatcher = RawDispatcher::greet(a).await;
        ask(&mut incoming);
        dispatcher.expect_demand(64).await;
        let (_, lost) = dispatcher.accept().await;
        let lost = dispatcher.number(offer_of(&lost));
        dispatcher.framed.feed(lost).await.unwrap();
        dispatcher.framed.flush().await.unwrap();
        let read =
            nix::sys::socket::recv(thief.as_raw_fd(), &mut [0; 1 << 10], MsgFlags::MSG_DONTWAIT);
        assert!(read.unwrap() > 0);
        let (mut client, _copy) = dispatcher.offer().await;
        check_failed(&mut incoming, &mut dispatcher, "an offer is missing").await;
        assert!(client.read(&mut [0]).now_or_never().is_none(), "it is another worker's");
    });
}

/// Rules: W-BREACH, D-DEMAND, D-WELCOME.
#[test]
fn a_dispatcher_that_breaks_the_protocol_is_left() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder().window(1)).await;
        ask(&mut incoming);
        let _offers = [dispatcher.offer().await, dispatcher.offer().await];
        let handle = incoming.handle();
        assert!(matches!(handle.ended().await, IncomingEnd::Failed(_)));
        check_failed(&mut incoming, &mut dispatcher, "more offers than were asked for").await;

        for (first, reason) in [
            (ToWorker::Welcome { version: 2 }, "another version"),
            (ToWorker::Ping { nonce: 0 }, "first message is not a WELCOME"),
        ] {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut incoming = Incoming::new(b);
            let mut dispatcher = RawDispatcher::before_greeting(a).await;
            dispatcher.send(first).await;
            check_failed(&mut incoming, &mut dispatcher, reason).await;
        }
    });
}

#[test]
fn a_dispatcher_that_does_not_read_is_left() {
    counted(async |kind| {
        let (mut dispatcher, incoming) = narrow_pair(kind).await;
        let flood =
            async { while dispatcher.framed.send(ToWorker::Ping { nonce: 0 }).await.is_ok() {} };
        let ((), end) = tokio::join!(flood, incoming.handle().ended());
        assert!(
            matches!(&end, IncomingEnd::Failed(error) if matches!(**error, Error::Invalid(_))),
            "{end:?}"
        );
    });
}

/// Rules: W-ROOM.
#[test]
fn options_of_an_adopted_connection_can_be_set() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        ask(&mut incoming);
        let (_client, _copy) = dispatcher.offer().await;
        let connection = incoming.next().await.unwrap();
        rustix::net::sockopt::set_tcp_nodelay(connection.as_fd(), true).unwrap();
    });
}
