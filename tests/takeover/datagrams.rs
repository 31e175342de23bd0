//! UDP sockets: one process receives, and forwards what belongs to another one.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use fdwire::{
    Framed, Listener, SendFd, Socket, SocketKind,
    takeover::{
        self, Datagrams, Error, Listeners, Options, Phase, Received, Server,
        protocol::{FromTaker, GiverCodec, TakerCodec, ToTaker},
    },
};
use futures::{FutureExt, SinkExt, StreamExt};
use nix::sys::socket::{setsockopt, sockopt};
use tempfile::TempDir;

use crate::{common::*, place, request};

/// A server with a UDP socket, "udp".
fn first() -> (TempDir, PathBuf, Server, SocketAddr) {
    let (directory, path) = place();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let mut listeners = Listeners::new();
    listeners.add("udp", socket).unwrap();
    let server = Server::bind(&path, listeners, Options::default()).unwrap();
    (directory, path, server, address)
}

/// The socket of a service whose clients send the generation of their server as the first byte, or
/// 0 to any.
fn forwarding(server: &Server) -> Datagrams {
    server.datagrams("udp", 0).unwrap().forwarding(|datagram, _| match datagram.first() {
        None | Some(0) => None,
        Some(&byte) => Some(byte.into()),
    })
}

fn client(server: SocketAddr) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server).unwrap();
    client
}

async fn next(datagrams: &Datagrams) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 65_536];
    let Received { len, source, .. } = datagrams.recv(&mut buffer).await.unwrap();
    (buffer[..len].to_vec(), source)
}

/// Nothing arrives, although there was time for it.
async fn check_silent(datagrams: &Datagrams) {
    let received = tokio::time::timeout(Duration::from_millis(30), next(datagrams)).await;
    assert!(received.is_err(), "{received:?}");
}

async fn take_over(path: &Path, old: &Server) -> Server {
    let new = request(path).await.ready().await.unwrap();
    old.replaced().await;
    new.confirmed().await;
    new
}

#[test]
fn the_old_process_stops_receiving_at_the_cut_and_starts_again_when_it_is_undone() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = old.datagrams("udp", 0).unwrap();
        client.send(b"1").unwrap();
        assert_eq!(next(&from_old).await, (b"1".to_vec(), client.local_addr().unwrap()));
        client.send(b"2").unwrap(); // waits in the socket's queue

        let new = take_over(&path, &old).await;
        check_silent(&from_old).await;
        let from_new = new.datagrams("udp", 0).unwrap();
        assert_eq!(next(&from_new).await.0, b"2");
        // It goes on sending.
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
        let (_directory, path) = place();
        let server = crate::first(&path);
        let wrong = server.datagrams("http", 0).unwrap_err();
        assert!(matches!(wrong, Error::WrongKind { expected: "UDP socket", .. }), "{wrong}");
        assert!(matches!(server.datagrams("udp", 0), Err(Error::NoSuchListener { .. })));
    });
}

#[test]
fn each_generation_gets_its_datagrams_with_their_source() {
    run(async {
        let (_directory, path, server, address) = first();
        let mut generations = vec![(forwarding(&server), server)];
        for number in 2..=6 {
            let new = take_over(&path, &generations.last().unwrap().1).await;
            assert_eq!(new.generation(), number);
            generations.push((forwarding(&new), new));
        }
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
            assert_eq!(datagrams.lost(), 0);
        }
    });
}

/// From the offer on: the new process may be ready, and the old one may not know it yet.
#[test]
fn while_both_receive_each_forwards_to_the_other() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let (_taker, lanes) = offered_lanes(&path).await;
        let lane = &lanes[0].fd;

        client.send(&[2, 1]).unwrap();
        client.send(&[0, 2]).unwrap();
        assert_eq!(next(&from_old).await.0, [0, 2]);
        let mut packet = [0; 100];
        let (length, _) =
            rustix::net::recv(lane, &mut packet, rustix::net::RecvFlags::DONTWAIT).unwrap();
        assert_eq!((length, &packet[48..50]), (50, &[2, 1][..]));
        packet[48..50].copy_from_slice(&[1, 3]);
        rustix::net::send(lane, &packet[..50], rustix::net::SendFlags::empty()).unwrap();
        assert_eq!(next(&from_old).await, (vec![1, 3], client.local_addr().unwrap()));
        assert_eq!(old.phase(), Phase::Serving);
    });
}

/// Asks for a takeover by hand, up to COMPLETE.
async fn offered_lanes(path: &Path) -> (OwnedFd, Vec<takeover::protocol::Lane>) {
    let socket = Socket::connect(path, SocketKind::SeqPacket).await.unwrap();
    let mut taker = Framed::new(socket, TakerCodec::default());
    taker.send(FromTaker::Hello { lowest: 1, highest: 1 }).await.unwrap();
    let mut offered = Vec::new();
    loop {
        match taker.next().await.unwrap().unwrap() {
            ToTaker::Lanes { lanes, .. } => offered.extend(lanes),
            ToTaker::Complete => return (taker.into_parts().socket.into(), offered),
            _ => {}
        }
    }
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
        // The next process reaches both.
        let third = loop {
            match takeover::request(&path, Options::default()).await {
                Ok(pending) => break pending.ready().await.unwrap(),
                Err(_) => tokio::task::yield_now().await, // the one before is not noticed yet
            }
        };
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
        let lost = from_new.lost();
        assert!(lost > 0, "a lane has no end");
        // It gets the first ones, in their order, and then new ones.
        for number in 0..SENT - lost as u16 {
            let [high, low] = number.to_be_bytes();
            assert_eq!(next(&from_old).await.0, [1, high, low]);
        }
        client.send(b"\x01again").unwrap();
        assert!(next(&from_new).now_or_never().is_none());
        assert_eq!(next(&from_old).await.0, b"\x01again");
        assert_eq!(from_new.lost(), lost);
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
        drop((old, from_old)); // one whose lane was passed on
        client.send(&[1, 1]).unwrap();
        assert_eq!(next(&from_third).await.0, [1, 1]);
        drop((new, from_new)); // one whose lane was made for this process
        client.send(&[2, 2]).unwrap();
        assert_eq!(next(&from_third).await.0, [2, 2]);
        client.send(&[9, 3]).unwrap(); // one that never was
        assert_eq!(next(&from_third).await.0, [9, 3]);
    });
}

/// Of a thousand generations, only those that live have a lane.
#[test]
fn lanes_to_processes_that_have_ended_are_not_passed_on() {
    run(async {
        let (_directory, path, mut server, address) = first();
        let client = client(address);
        let mut datagrams = forwarding(&server);
        for round in 0..30u8 {
            let new = take_over(&path, &server).await;
            let from_new = forwarding(&new);
            drop(datagrams);
            drop(server);
            (server, datagrams) = (new, from_new);
            client.send(&[0, round]).unwrap();
            assert_eq!(next(&datagrams).await.0, [0, round]);
        }
        let (_taker, lanes) = offered_lanes(&path).await;
        assert_eq!(lanes.iter().map(|lane| lane.generation).collect::<Vec<_>>(), [31]);
    });
}

/// The kernel puts datagrams of one source together, whoever they belong to.
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

/// Without the address that a client has sent to, a server with several addresses can't answer.
#[test]
fn the_destination_and_the_ecn_bits_are_forwarded() {
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
        assert_eq!(own.len, 0, "an empty datagram is one, too");
        let other = from_old.recv(&mut buffer).await.unwrap();
        for received in [own, other] {
            assert_eq!((received.destination, received.ecn), (Some(address.ip()), 2));
        }
    });
}

/// A giver that speaks the protocol by hand, up to COMPLETE.
async fn raw_giver(
    path: &Path,
    lanes: impl FnOnce(ToTaker<SendFd>) -> ToTaker<SendFd>,
    socket: UdpSocket,
) -> OwnedFd {
    {
        let (_directory, place) = place();
        let mut listeners = Listeners::new();
        listeners.add("udp", socket).unwrap();
        let server = Server::bind(&place, listeners, Options::default()).unwrap();
        let _forwarding = forwarding(&server);
        relay(&place, path, lanes).await
    }
}

/// Takes what a true server offers, and offers it with other lanes.
async fn relay(
    from: &Path,
    to: &Path,
    lanes: impl FnOnce(ToTaker<SendFd>) -> ToTaker<SendFd>,
) -> OwnedFd {
    let listener = Listener::bind(to, SocketKind::SeqPacket).unwrap();
    let mut giver = Framed::new(listener.accept().await.unwrap(), GiverCodec::default());
    let socket = Socket::connect(from, SocketKind::SeqPacket).await.unwrap();
    let mut taker = Framed::new(socket, TakerCodec::default());
    taker.send(giver.next().await.unwrap().unwrap()).await.unwrap();
    let mut lanes = Some(lanes);
    loop {
        let message = match taker.next().await.unwrap().unwrap() {
            ToTaker::Welcome { version, listeners } => ToTaker::Welcome { version, listeners },
            ToTaker::Listeners(offered) => ToTaker::Listeners(
                offered.into_iter().map(|offered| offered.with_fd(SendFd::from)).collect(),
            ),
            ToTaker::Lanes { generation, giver, lanes: offered } => {
                let offered = offered.into_iter().map(|lane| lane.with_fd(SendFd::from)).collect();
                lanes.take().unwrap()(ToTaker::Lanes { generation, giver, lanes: offered })
            }
            ToTaker::Generations { replaced_for, fds } => ToTaker::Generations {
                replaced_for,
                fds: fds.into_iter().map(SendFd::from).collect(),
            },
            ToTaker::Complete => {
                giver.send(ToTaker::Complete).await.unwrap();
                break;
            }
            other => panic!("{other:?}"),
        };
        // A taker that has seen enough closes its end.
        if giver.send(message).await.is_err() {
            break;
        }
    }
    giver.into_parts().socket.into()
}

#[test]
fn a_lane_that_is_none_is_refused() {
    run(async {
        let break_it: [fn(ToTaker<SendFd>) -> ToTaker<SendFd>; 2] = [
            |message| match message {
                ToTaker::Lanes { generation, giver, mut lanes } => {
                    lanes[0].listener = 1; // there is none with this number
                    ToTaker::Lanes { generation, giver, lanes }
                }
                other => other,
            },
            |message| match message {
                ToTaker::Lanes { generation, giver, mut lanes } => {
                    lanes[0].fd = marked(1).into();
                    ToTaker::Lanes { generation, giver, lanes }
                }
                other => other,
            },
        ];
        for lanes in break_it {
            let (_directory, path) = place();
            let giver = raw_giver(&path, lanes, UdpSocket::bind("127.0.0.1:0").unwrap());
            let taking = async {
                while !path.exists() {
                    tokio::task::yield_now().await;
                }
                takeover::request(&path, Options::default()).await
            };
            let (_giver, refused) = tokio::join!(giver, taking);
            let refused = refused.unwrap_err();
            assert!(matches!(refused, Error::Misbehaved), "{refused}");
        }
    });
}

#[test]
fn a_process_that_floods_its_lane_keeps_no_client_waiting() {
    run_in(some_threads(), async {
        let (_directory, path) = place();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = client(socket.local_addr().unwrap());
        let (flood, lane) = raw_pair();
        let replace = move |message| match message {
            ToTaker::Lanes { generation, giver, mut lanes } => {
                lanes[0].fd = lane.into();
                ToTaker::Lanes { generation, giver, lanes }
            }
            other => other,
        };
        let giver = raw_giver(&path, replace, socket);
        let taking = async {
            while !path.exists() {
                tokio::task::yield_now().await;
            }
            request(&path).await.ready().await.unwrap()
        };
        let (_giver, new) = tokio::join!(giver, taking);
        let datagrams = forwarding(&new);
        // Datagrams by turns with what is none.
        let mut packet = [0; 50];
        packet[..3].copy_from_slice(&[1, 4, 0]);
        let flooding = std::thread::spawn(move || {
            let mut sent = 0u64;
            while rustix::net::send(&flood, &packet, rustix::net::SendFlags::NOSIGNAL).is_ok() {
                let foreign = if sent.is_multiple_of(3) { &packet[..20] } else { &[9; 60][..] };
                let _ = rustix::net::send(&flood, foreign, rustix::net::SendFlags::NOSIGNAL);
                sent += 1;
            }
            sent
        });
        for number in 0..200u8 {
            client.send(&[0, 77, number]).unwrap();
            let mut forwarded = 0;
            while next(&datagrams).await.0 != [0, 77, number] {
                forwarded += 1;
                assert!(forwarded < 10, "the lane goes first");
            }
        }
        drop((datagrams, new));
        assert!(flooding.join().unwrap() > 0);
    });
}

fn raw_pair() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}
