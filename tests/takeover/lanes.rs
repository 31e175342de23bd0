//! The lanes on which processes forward datagrams to each other.

use std::{net::UdpSocket, os::fd::OwnedFd, path::Path};

use fdwire::{
    Framed, Listener, SendFd, SocketKind,
    takeover::{
        self, Error, Listeners, Options, Pending, Phase, Server,
        protocol::{GiverCodec, Lane, ToTaker},
    },
};
use futures::{SinkExt, StreamExt};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use crate::{
    common::*,
    control_path,
    datagrams::{client, first, forwarding, next, take_over},
    offered_to_raw_taker,
};

/// Both processes receive from the offer on, because the old one may not know yet that the new one
/// is ready.
///
/// Rules: T-OWN-LANE.
#[test]
fn while_both_processes_receive_each_forwards_datagrams_to_the_other() {
    run(async {
        let (_directory, path, old, address) = first();
        let client = client(address);
        let from_old = forwarding(&old);
        let (_taker, offer) = offered_to_raw_taker(&path).await;
        let lane = &lanes_of(offer)[0].fd;

        client.send(&[2, 1]).unwrap();
        client.send(&[0, 2]).unwrap();
        assert_eq!(next(&from_old).await.0, [0, 2]);
        let mut packet = [0; 100];
        let (length, _) = recv(lane, &mut packet, RecvFlags::DONTWAIT).unwrap();
        assert_eq!((length, &packet[48..50]), (50, &[2, 1][..]));
        packet[48..50].copy_from_slice(&[1, 3]);
        send(lane, &packet[..50], SendFlags::empty()).unwrap();
        assert_eq!(next(&from_old).await, (vec![1, 3], client.local_addr().unwrap()));
        assert_eq!(old.phase(), Phase::Serving);
    });
}

/// After thirty generations, only those that live have a lane.
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
        // The sockets of a process are closed in the background, and a child that another test is
        // starting may have a copy of them for a moment. So the lane may be offered until then.
        loop {
            let (_taker, offer) = offered_to_raw_taker(&path).await;
            let generations = Vec::from_iter(lanes_of(offer).iter().map(|lane| lane.generation));
            if generations == [31] {
                break;
            }
            assert!(generations.len() < 10, "{generations:?}");
        }
    });
}

/// Rules: T-LANE.
#[test]
fn an_unusable_lane_is_refused() {
    let unknown_listener: fn(&mut Lane<SendFd>) = |lane| lane.listener = 1;
    let regular_file: fn(&mut Lane<SendFd>) = |lane| lane.fd = marked(1).into();
    run(async {
        for change in [unknown_listener, regular_file] {
            let (_directory, path) = control_path();
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let (_giver, refused) = request_with_changed_lane(&path, socket, change).await;
            let refused = refused.unwrap_err();
            assert!(matches!(refused, Error::Misbehaved), "{refused}");
        }
    });
}

/// Rules: B-PACKET.
#[test]
fn a_process_that_floods_its_lane_keeps_no_client_waiting() {
    run(async {
        // The lane of a new process is a socket that floods.
        let (_directory, path) = control_path();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = client(socket.local_addr().unwrap());
        let (flood, lane): (OwnedFd, OwnedFd) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let replace = move |offered: &mut Lane<SendFd>| offered.fd = lane.into();
        let (_giver, pending) = request_with_changed_lane(&path, socket, replace).await;
        let new = pending.unwrap().ready().await.unwrap();
        let datagrams = forwarding(&new);
        // A thread sends datagrams by turns with packets that hold none.
        let mut packet = [0; 50];
        packet[..3].copy_from_slice(&[1, 4, 0]);
        let flooding = std::thread::spawn(move || {
            let mut sent = 0u64;
            while send(&flood, &packet, SendFlags::NOSIGNAL).is_ok() {
                let foreign = if sent.is_multiple_of(3) { &packet[..20] } else { &[9; 60][..] };
                let _ = send(&flood, foreign, SendFlags::NOSIGNAL);
                sent += 1;
            }
            sent
        });
        // Datagrams of a client wait for a few of them at most.
        for _ in 0..3 {
            next(&datagrams).await; // the socket is registered with the event loop
        }
        for number in 0..200u8 {
            client.send(&[0, 77, number]).unwrap();
            settle().await; // the event loop knows that the socket is readable
            let mut forwarded = 0;
            while next(&datagrams).await.0 != [0, 77, number] {
                forwarded += 1;
                assert!(forwarded < 10, "the lane keeps the client waiting");
            }
        }
        drop((datagrams, new));
        // Another thread waits for the flood to end, because a task of this one closes the lane.
        let sent = tokio::task::spawn_blocking(move || flooding.join().unwrap()).await;
        assert!(sent.unwrap() > 0);
    });
}

fn lanes_of(offer: Vec<ToTaker>) -> Vec<Lane> {
    let lanes = |message| match message {
        ToTaker::Lanes { lanes, .. } => lanes,
        _ => Vec::new(),
    };
    offer.into_iter().flat_map(lanes).collect()
}

/// Asks for a takeover from a giver that passes on the offer of a true server with another lane.
/// Returns the socket of that giver, and the outcome.
async fn request_with_changed_lane(
    path: &Path,
    socket: UdpSocket,
    change: impl FnOnce(&mut Lane<SendFd>),
) -> (OwnedFd, Result<Pending, Error>) {
    let listener = Listener::bind(path, SocketKind::SeqPacket).unwrap();
    let giving = async {
        let mut giver = Framed::new(listener.accept().await.unwrap(), GiverCodec::default());
        giver.next().await.unwrap().unwrap();
        let mut change = Some(change);
        for message in offer_of_true_server(socket).await {
            let message = match message {
                ToTaker::Lanes { generation, giver, mut lanes } => {
                    change.take().unwrap()(&mut lanes[0]);
                    ToTaker::Lanes { generation, giver, lanes }
                }
                other => other,
            };
            if giver.send(message).await.is_err() {
                break; // a taker that refuses the lane closes its end
            }
        }
        giver.into_parts().socket.into()
    };
    tokio::join!(giving, takeover::request(path, Options::default()))
}

/// Returns everything that a server with one UDP socket sends, up to COMPLETE, ready to be sent.
async fn offer_of_true_server(socket: UdpSocket) -> Vec<ToTaker<SendFd>> {
    let (_directory, path) = control_path();
    let mut listeners = Listeners::new();
    listeners.add("udp", socket).unwrap();
    let server = Server::bind(&path, listeners, Options::default()).unwrap();
    let _forwarding = forwarding(&server);
    let (_taker, offer) = offered_to_raw_taker(&path).await;
    let sendable = |message| match message {
        ToTaker::Welcome { version, listeners } => ToTaker::Welcome { version, listeners },
        ToTaker::Listeners(offered) => ToTaker::Listeners(
            offered.into_iter().map(|offered| offered.with_fd(SendFd::from)).collect(),
        ),
        ToTaker::Lanes { generation, giver, lanes } => {
            let lanes = lanes.into_iter().map(|lane| lane.with_fd(SendFd::from)).collect();
            ToTaker::Lanes { generation, giver, lanes }
        }
        ToTaker::Generations { replaced_for, fds } => {
            let fds = fds.into_iter().map(SendFd::from).collect();
            ToTaker::Generations { replaced_for, fds }
        }
        other => panic!("{other:?}"),
    };
    offer.into_iter().map(sendable).chain([ToTaker::Complete]).collect()
}
