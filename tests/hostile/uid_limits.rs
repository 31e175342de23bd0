//! The limits of a uid: all of its connections together hold no more than it may hold.

use std::{
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
};

use fdwire::{Error, FrameCodec, Framed, Listener, SocketKind, socket::UidLimits};
use futures::{FutureExt, StreamExt};
use tokio::task::yield_now;

use crate::{
    common::{
        abstract_name, check_connected, encoded, one_thread, other_uid, raw_send, role_socket,
        run_in, spawn_role,
    },
    counted,
    descriptors::nulls,
    no_threads::{NoThreads, read_kind, run_process},
    raw, soon, until,
};

fn listen(name: &str, kind: SocketKind, limits: UidLimits) -> (Listener, SocketAddr) {
    let addr = abstract_name(name);
    (Listener::bind_addr(&addr, kind).unwrap().limit_each_uid(limits), addr)
}

/// Connects a raw peer.
async fn accept(listener: &Listener, addr: &SocketAddr) -> (Framed<FrameCodec>, OwnedFd) {
    let peer = raw::connected_to(addr, listener.kind());
    let socket = soon("a connection", listener.accept()).await.unwrap();
    (Framed::new(socket, FrameCodec::default()), peer)
}

/// Receives everything that the peer has sent, which is not a whole frame.
async fn receive_part(rx: &mut Framed<FrameCodec>) {
    while !raw::nothing_is_unread(rx.socket()) {
        assert!(rx.next().now_or_never().is_none());
        yield_now().await;
    }
    assert!(rx.next().now_or_never().is_none()); // from here on, the part counts
}

/// Connects, and waits until the listener has refused the connection. Returns its peer.
async fn refuse(listener: &Listener, addr: &SocketAddr) -> OwnedFd {
    let before = listener.refused();
    let peer = raw::connected_to(addr, listener.kind());
    until("the connection is refused", || {
        assert!(listener.accept().now_or_never().is_none(), "one connection too many is accepted");
        listener.refused() > before
    })
    .await;
    peer
}

/// Connects to the listener, and copies the bytes that it sends to `control`.
fn greeted(control: OwnedFd) {
    let mut control = UnixStream::from(control);
    let mut name = String::new();
    control.read_to_string(&mut name).unwrap();
    let addr = SocketAddr::from_abstract_name(name).unwrap();
    let connection = UnixStream::connect_addr(&addr).unwrap();
    std::io::copy(&mut &connection, &mut control).unwrap();
}

#[test]
fn a_uid_gets_no_more_connections_than_its_limit_and_other_uids_get_theirs() {
    const ROLE: &str =
        "uid_limits::a_uid_gets_no_more_connections_than_its_limit_and_other_uids_get_theirs";
    if let Some(control) = role_socket(ROLE) {
        return greeted(control);
    }
    counted(async |kind| {
        let (mut listener, addr) =
            listen("connections", kind, UidLimits::default().max_connections(2));
        let uid = other_uid().filter(|_| kind == SocketKind::Stream);
        listener = listener.allow_uids(uid);

        // The third connection is one too many.
        let first = accept(&listener, &addr).await;
        let second = accept(&listener, &addr).await;
        let refused = refuse(&listener, &addr).await;
        let (bytes, _) = raw::receive(&refused, true).unwrap();
        assert!(bytes.is_empty());

        // A connection of another uid is accepted.
        if let Some(uid) = uid {
            let (mut control, theirs) = UnixStream::pair().unwrap();
            let mut child = spawn_role(ROLE, Some(uid), theirs.into());
            control.write_all(addr.as_abstract_name().unwrap()).unwrap();
            control.shutdown(std::net::Shutdown::Write).unwrap();
            let other = soon("another uid", listener.accept()).await.unwrap();
            UnixStream::try_from(other).unwrap().write_all(b"welcome").unwrap();
            let mut greeting = String::new();
            control.read_to_string(&mut greeting).unwrap();
            assert_eq!(greeting, "welcome");
            child.wait().unwrap();
        }

        // The place of a dropped connection is free, and so is that of a converted one.
        drop(first);
        let third = accept(&listener, &addr).await;
        refuse(&listener, &addr).await;
        let converted = OwnedFd::from(second.0.into_parts().socket);
        let fourth = accept(&listener, &addr).await;
        refuse(&listener, &addr).await;
        drop((third, converted, fourth));
    });
}

#[test]
fn connections_of_a_uid_hold_no_more_bytes_of_unfinished_frames_than_its_limit() {
    counted(async |kind| {
        let (listener, addr) = listen("bytes", kind, UidLimits::default().max_bytes(1000));
        let frame = encoded(&[7; 700], 0);

        // One connection holds a part.
        let (mut patient, patients_peer) = accept(&listener, &addr).await;
        raw_send(&patients_peer, &frame[..600], &[]);
        receive_part(&mut patient).await;

        // Whole frames do not count, and neither does a part that leaves enough for the other one.
        let (mut rx, peer) = accept(&listener, &addr).await;
        raw_send(&peer, &frame, &[]);
        assert_eq!(rx.next().await.unwrap().unwrap().payload.len(), 700);
        raw_send(&peer, &frame[..400], &[]);
        receive_part(&mut rx).await;

        // One byte more is over the limit.
        raw_send(&peer, &frame[400..401], &[]);
        let ended = rx.next().await.unwrap();
        assert!(matches!(ended, Err(Error::OverUidLimit { bytes: 1001, fds: 0, .. })), "{ended:?}");
        assert!(rx.next().await.is_none());

        // The bytes that it held are free, although the connection is still there.
        let (mut next, nexts_peer) = accept(&listener, &addr).await;
        raw_send(&nexts_peer, &frame[..400], &[]);
        receive_part(&mut next).await;
        for (rx, peer, sent) in [(&mut patient, &patients_peer, 600), (&mut next, &nexts_peer, 400)]
        {
            raw_send(peer, &frame[sent..], &[]);
            assert_eq!(rx.next().await.unwrap().unwrap().payload.len(), 700);
        }
    });
}

#[test]
fn connections_of_a_uid_hold_no_more_unclaimed_descriptors_than_its_limit() {
    counted(async |kind| {
        let (listener, addr) = listen("descriptors", kind, UidLimits::default().max_fds(300));
        let fds = nulls(200);
        let (mut first, first_peer) = accept(&listener, &addr).await;
        raw_send(&first_peer, &encoded(b"", 200)[..4], &fds);
        receive_part(&mut first).await;

        let (mut second, second_peer) = accept(&listener, &addr).await;
        raw_send(&second_peer, &encoded(b"", 200), &fds);
        assert_eq!(second.next().await.unwrap().unwrap().fds.len(), 200, "these are claimed");
        raw_send(&second_peer, &encoded(b"", 101)[..4], &fds[..101]);
        let ended = second.next().await.unwrap();
        assert!(matches!(ended, Err(Error::OverUidLimit { bytes: _, fds: 301, .. })), "{ended:?}");

        raw_send(&first_peer, &encoded(b"", 200)[4..], &[]);
        assert_eq!(first.next().await.unwrap().unwrap().fds.len(), 200);
    });
}

/// Runs as another uid, in a process that can't start a thread. So dropped descriptors wait to be
/// closed.
fn process_whose_descriptors_wait(mut control: UnixStream) {
    let kind = read_kind(&mut control);
    let limit = NoThreads::set();
    run_in(one_thread(), async {
        let (listener, addr) = listen("closing", kind, UidLimits::default().max_fds(253));
        let (mut honest, honest_peer) = accept(&listener, &addr).await;

        // Three connections leave 300 descriptors to be closed, more than the uid may have. Until
        // then, it gets no connection and receives nothing.
        for _ in 0..3 {
            let (mut rx, peer) = accept(&listener, &addr).await;
            raw_send(&peer, b"?", &nulls(100));
            assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
        }
        refuse(&listener, &addr).await;
        raw_send(&honest_peer, &encoded(b"hello", 0), &[]);
        for _ in 0..10 {
            yield_now().await; // the runtime learns that there is something to receive
            assert!(
                honest.next().now_or_never().is_none(),
                "it receives although too many descriptors wait to be closed"
            );
        }

        // Refused connections hold descriptors too until they are closed, so only some are accepted
        // meanwhile.
        let refused = || {
            assert!(listener.accept().now_or_never().is_none());
            listener.refused()
        };
        let _peers: Vec<_> = (0..100).map(|_| raw::connected_to(&addr, kind)).collect();
        until("some connections are refused", || refused() >= 64).await;
        for _ in 0..1000 {
            yield_now().await;
            assert!(refused() <= 65, "{} refused connections wait to be closed", refused());
        }

        // When a thread can be started, everything is closed, and the uid goes on.
        drop(limit);
        fdwire::close_in_background(nulls(1));
        let frame = soon("the others are closed", honest.next()).await.unwrap().unwrap();
        assert_eq!(frame.payload, "hello");
        for _ in listener.refused()..101 {
            soon("a connection that had to wait", listener.accept()).await.unwrap();
        }
        let admitted = fdwire::Socket::try_from(raw::connected_to(&addr, kind)).unwrap();
        check_connected(admitted, listener.accept().await.unwrap()).await;
    });
    control.write_all(b"done").unwrap();
}

#[test]
fn descriptors_that_wait_to_be_closed_count_against_the_limits_of_their_uid() {
    const ROLE: &str =
        "uid_limits::descriptors_that_wait_to_be_closed_count_against_the_limits_of_their_uid";
    if let Some(control) = role_socket(ROLE) {
        return process_whose_descriptors_wait(control.into());
    }
    let Some(uid) = other_uid() else { return };
    counted(async |kind| {
        run_process(ROLE, uid, &[u8::from(kind == SocketKind::Stream)]);
    });
}
