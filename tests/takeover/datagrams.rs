//! UDP sockets: one process receives, and forwards the datagrams that belong to another one.

use std::{
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use fdwire::takeover::{Datagrams, Error, Listeners, Options, Phase, Received, Server};
use futures::FutureExt;
use nix::sys::socket::{setsockopt, sockopt};
use tempfile::TempDir;

use crate::{common::*, control_path, request, request_until_not_busy};

/// Starts a server with a UDP socket, "udp". Returns also the address of that socket.
pub(crate) fn first() -> (TempDir, PathBuf, Server, SocketAddr) {
    let (directory, path) = control_path();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let mut listeners = Listeners::new();
    listeners.add("udp", socket).unwrap();
    let server = Server::bind(&path, listeners, Options::default()).unwrap();
    (directory, path, server, address)
}

/// Returns the socket of a service whose clients send the generation of their server as the first
/// byte, or 0 if any server will do.
pub(crate) fn forwarding(server: &Server) -> Datagrams {
    server.datagrams("udp", 0).unwrap().forwarding(|datagram, _| match datagram.first() {
        None | Some(0) => None,
        Some(&byte) => Some(byte.into()),
    })
}

pub(crate) fn client(server: SocketAddr) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server).unwrap();
    client
}

pub(crate) async fn next(datagrams: &Datagrams) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 65_536];
    let Received { len, source, .. } = datagrams.recv(&mut buffer).await.unwrap();
    (buffer[..len].to_vec(), source)
}

/// Checks that nothing arrives within a moment.
async fn check_silent(datagrams: &Datagrams) {
    let received = tokio::time::timeout(Duration::from_millis(30), next(datagrams)).await;
    assert!(received.is_err(), "{received:?}");
}

pub(crate) async fn take_over(path: &Path, old: &Server) -> Server {
    let new = request(path).await.ready().await.unwrap();
    old.replaced().await;
    new.confirmed().await;
    new
}

#[test]
fn an_old_process_stops_receiving_at_the_cut_until_it_is_undone() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = old.datagrams("udp", 0).unwrap();
        client.send(b"1").unwrap();
        assert_eq!(next(&from_old).await, (b"1".to_vec(), client.local_addr().unwrap()));
        client.send(b"2").unwrap(); // this datagram waits in the socket's queue

        let new = take_over(&path, &old).await;
        check_silent(&from_old).await;
        let from_new = new.datagrams("udp", 0).unwrap();
        assert_eq!(next(&from_new).await.0, b"2");
        // The old process still sends.
        from_old.send_to(b"answer", client.local_addr().unwrap()).await.unwrap();
        let mut answer = [0; 10];
        assert_eq!(client.recv(&mut answer).unwrap(), 6);

        // A task that waits is woken by an undo.
        let waiting = tokio::spawn(async move { next(&from_old).await.0 });
        settle().await;
        client.send(b"3").unwrap();
        drop((new, from_new));
        assert_eq!(waiting.await.unwrap(), b"3");
        assert_eq!(old.phase(), Phase::Serving);
    });
}

#[test]
fn a_socket_of_another_kind_is_no_udp_socket() {
    run(async {
        let (_directory, path) = control_path();
        let server = crate::first(&path);
        let wrong = server.datagrams("http", 0).unwrap_err();
        assert!(matches!(wrong, Error::WrongKind { expected: "UDP socket", .. }), "{wrong}");
        assert!(matches!(server.datagrams("udp", 0), Err(Error::NoSuchListener { .. })));
    });
}

/// Rules: G-GENERATION, T-OWN-LANE.
#[test]
fn each_generation_gets_its_datagrams_with_their_source() {
    run(async {
        // Five processes drain, and the sixth one serves.
        let (_directory, path, server, address) = first();
        let mut generations = vec![(forwarding(&server), server)];
        for number in 2..=6 {
            let new = take_over(&path, &generations.last().unwrap().1).await;
            assert_eq!(new.generation(), number);
            generations.push((forwarding(&new), new));
        }
        // Clients send datagrams to all of them. Each gets its own, with the address of the client.
        let clients: Vec<_> = (0..3).map(|_| client(address)).collect();
        for round in 0..10u8 {
            for client in &clients {
                for generation in 0..=6 {
                    client.send(&[generation, round]).unwrap();
                }
            }
            let newest = generations.last().unwrap();
            for client in &clients {
                let source = client.local_addr().unwrap();
                assert_eq!(next(&newest.0).await, (vec![0, round], source));
                assert_eq!(next(&newest.0).await, (vec![6, round], source));
            }
            for (number, (datagrams, _)) in (1..6).zip(&generations) {
                for client in &clients {
                    assert_eq!(
                        next(datagrams).await,
                        (vec![number, round], client.local_addr().unwrap())
                    );
                }
            }
        }
        for (datagrams, _) in &generations {
            assert!(next(datagrams).now_or_never().is_none(), "nothing arrives twice");
            assert_eq!(datagrams.missed(), 0);
        }
    });
}

#[test]
fn after_a_hand_back_the_other_process_gets_its_datagrams() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let new = take_over(&path, &old).await;
        let from_new = forwarding(&new);
        new.hand_back(Bytes::new()).await.unwrap();
        for datagram in [[1, 0], [2, 1], [0, 2], [2, 3]] {
            client.send(&datagram).unwrap();
        }
        assert_eq!(next(&from_old).await.0, [1, 0]);
        assert_eq!(next(&from_old).await.0, [0, 2]);
        assert!(next(&from_old).now_or_never().is_none());
        assert_eq!(next(&from_new).await.0, [2, 1]);
        assert_eq!(next(&from_new).await.0, [2, 3]);
        // The next process forwards to both.
        let third = request_until_not_busy(&path).await.ready().await.unwrap();
        old.replaced().await;
        assert_eq!(third.generation(), 3);
        let from_third = forwarding(&third);
        for datagram in [[1, 4], [2, 5], [3, 6]] {
            client.send(&datagram).unwrap();
        }
        assert_eq!(next(&from_third).await.0, [3, 6]);
        assert_eq!(next(&from_old).await.0, [1, 4]);
        assert_eq!(next(&from_new).await.0, [2, 5]);
    });
}

/// Rules: B-LANE-FULL.
#[test]
fn an_old_process_that_does_not_receive_loses_its_own_datagrams_and_no_others() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let new = take_over(&path, &old).await;
        let from_new = forwarding(&new);
        const SENT: u16 = 20_000;
        for number in 0..SENT {
            let [high, low] = number.to_be_bytes();
            client.send(&[1, high, low]).unwrap();
            client.send(&[0, high, low]).unwrap();
            assert_eq!(next(&from_new).await.0, [0, high, low]);
        }
        let lost = from_new.missed();
        assert!(lost > 0, "the lane was never full");
        // The old process gets the first datagrams, in their order, and then new ones.
        for number in 0..SENT - lost as u16 {
            let [high, low] = number.to_be_bytes();
            assert_eq!(next(&from_old).await.0, [1, high, low]);
        }
        client.send(b"\x01again").unwrap();
        assert!(next(&from_new).now_or_never().is_none());
        assert_eq!(next(&from_old).await.0, b"\x01again");
        assert_eq!(from_new.missed(), lost);
    });
}

#[test]
fn datagrams_of_a_process_that_has_ended_are_for_the_one_that_serves() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let new = take_over(&path, &old).await;
        let from_new = forwarding(&new);
        let third = take_over(&path, &new).await;
        let from_third = forwarding(&third);
        drop((old, from_old)); // the lane to this process was passed on
        client.send(&[1, 1]).unwrap();
        assert_eq!(next(&from_third).await.0, [1, 1]);
        drop((new, from_new)); // the lane to this one was made by its successor
        client.send(&[2, 2]).unwrap();
        assert_eq!(next(&from_third).await.0, [2, 2]);
        client.send(&[9, 3]).unwrap(); // this generation has never existed
        assert_eq!(next(&from_third).await.0, [9, 3]);
    });
}

/// The kernel puts datagrams of one source together (GRO), even if they belong to two processes.
#[test]
fn datagrams_that_the_kernel_has_put_together_are_forwarded_one_by_one() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let new = take_over(&path, &old).await;
        let from_new = forwarding(&new);
        setsockopt(&from_new, sockopt::UdpGroSegment, &true).unwrap();
        setsockopt(&client, sockopt::UdpGsoSegment, &4).unwrap();
        client.send(b"\x02aaa\x01bbb\x01ccc\x02ddd\x01ee").unwrap();
        let mut buffer = [0; 100];
        let received = from_new.recv(&mut buffer).await.unwrap();
        assert_eq!((received.len, received.stride), (8, 4), "the kernel did not put them together");
        assert_eq!(&buffer[..8], b"\x02aaa\x02ddd");
        for datagram in [&b"\x01bbb"[..], b"\x01ccc", b"\x01ee"] {
            assert_eq!(next(&from_old).await, (datagram.to_vec(), client.local_addr().unwrap()));
        }
    });
}

/// A server with several addresses has to answer from the one that the client has sent to.
#[test]
fn the_destination_and_the_ecn_bits_of_datagrams_are_forwarded() {
    run(async {
        let (_directory, path, old, address) = first();
        let from_old = forwarding(&old);
        let new = take_over(&path, &old).await;
        let from_new = forwarding(&new);
        setsockopt(&from_new, sockopt::Ipv4PacketInfo, &true).unwrap();
        setsockopt(&from_new, sockopt::IpRecvTos, &true).unwrap();
        let client = client(address);
        setsockopt(&client, sockopt::Ipv4Tos, &2).unwrap();
        client.send(b"\x01").unwrap();
        client.send(b"").unwrap();
        let mut buffer = [0; 100];
        let own = from_new.recv(&mut buffer).await.unwrap();
        assert_eq!(own.len, 0, "an empty datagram is received");
        let other = from_old.recv(&mut buffer).await.unwrap();
        for received in [own, other] {
            assert_eq!((received.destination, received.ecn), (Some(address.ip()), 2));
        }
    });
}
