//! Faults of a peer. Each is one error, and then the stream ends.

use fdwire::{Error, Frame, FrameCodec, Framed, Limits, Socket, SocketKind, framed::FramedParts};
use futures::{StreamExt, TryStreamExt};

use crate::{
    common::{encoded, marked, raw_send, with_raw_peer},
    counted,
    side::{End, Side, end_with_raw_peer, on_both_sides},
};

/// Returns the error of both kinds of receiver for these bytes, sent with this number of
/// descriptors before the end.
async fn fault(kind: SocketKind, bytes: &[u8], fds: u32) -> Error {
    let [error, blocking] = [
        fault_of(kind, Side::Async, bytes, fds).await,
        fault_of(kind, Side::Blocking, bytes, fds).await,
    ];
    assert_eq!(format!("{error:?}"), format!("{blocking:?}"));
    error
}

async fn fault_of(kind: SocketKind, side: Side, bytes: &[u8], fds: u32) -> Error {
    let (a, peer) = Socket::pair(kind).unwrap();
    let limits = Limits::default().max_payload_bytes(100).max_fds_per_frame(3);
    let mut rx = End::new(side, a, FrameCodec::new(limits));
    raw_send(&peer, bytes, &(0..fds).map(marked).collect::<Vec<_>>());
    drop(peer);
    loop {
        match rx.next().await.expect("no fault was found") {
            Ok(_) => {}
            Err(error) => {
                assert!(rx.next().await.is_none(), "an error is followed by the end");
                assert!(rx.next().await.is_none());
                return error;
            }
        }
    }
}

#[test]
fn bytes_of_another_protocol_are_an_error() {
    counted(async |kind| {
        assert!(matches!(
            fault(kind, b"GET / HTTP/1.1\r\n", 0).await,
            Error::BadMagic { found: b'G' }
        ));
        assert!(matches!(fault(kind, b"G", 3).await, Error::BadMagic { found: b'G' }));
        let after_a_frame = [encoded(b"fine", 1), b"G".to_vec()].concat();
        assert!(matches!(fault(kind, &after_a_frame, 2).await, Error::BadMagic { found: b'G' }));
    });
}

#[test]
fn a_frame_with_another_version_or_unknown_flags_is_an_error() {
    counted(async |kind| {
        assert!(matches!(
            fault(kind, &[0xFD, 0x20], 1).await,
            Error::UnsupportedVersion { found: 2 }
        ));
        assert!(matches!(
            fault(kind, &[0xFD, 0x11], 1).await,
            Error::UnsupportedFlags { found: 1 }
        ));
    });
}

#[test]
fn a_frame_over_the_limits_is_an_error() {
    counted(async |kind| {
        let long = [0xFD, 0x10, 0, 1, 0xFF, 0xFF, 0xFF, 0xFF];
        assert!(matches!(
            fault(kind, &long, 1).await,
            Error::FrameTooLong { bytes: 0xFFFF_FFFF, limit: 100 }
        ));
        assert!(matches!(
            fault(kind, &encoded(&[0; 101], 0), 0).await,
            Error::FrameTooLong { bytes: 101, limit: 100 }
        ));
        assert!(matches!(
            fault(kind, &encoded(b"", 4), 4).await,
            Error::TooManyFds { fds: 4, limit: 3 }
        ));
    });
}

#[test]
fn missing_or_surplus_descriptors_are_an_error() {
    counted(async |kind| {
        assert!(matches!(
            fault(kind, &encoded(b"", 2), 1).await,
            Error::MissingFds { expected: 2, received: 1 }
        ));
        assert!(matches!(
            fault(kind, &encoded(b"", 1), 0).await,
            Error::MissingFds { expected: 1, received: 0 }
        ));
        assert!(matches!(fault(kind, &encoded(b"", 1), 2).await, Error::UnclaimedFds { fds: 1 }));
    });
}

#[test]
fn a_connection_with_a_fault_still_sends() {
    on_both_sides(async |kind, side| {
        let (mut rx, peer) = end_with_raw_peer(kind, side);
        raw_send(&peer, b"?", &[]);
        assert!(matches!(rx.error().await, Error::BadMagic { found: b'?' }));
        rx.send(Frame::new("what was that?")).await.unwrap();
        let mut peer = Framed::new(Socket::try_from(peer).unwrap(), FrameCodec::default());
        assert_eq!(peer.try_next().await.unwrap().unwrap().payload, "what was that?");
    });
}

#[test]
fn after_a_fault_the_parts_of_a_connection_have_no_received_bytes_or_descriptors() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let bytes = [encoded(b"fine", 1), b"?".to_vec(), encoded(b"behind it", 1)].concat();
        raw_send(&peer, &bytes, &[marked(1), marked(2)]);
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "fine");
        assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { found: b'?' }))));
        let parts: FramedParts<FrameCodec> = rx.into_parts();
        assert_eq!((&parts.received[..], parts.received_fds.len()), (&b""[..], 0));
        assert!(Framed::from_parts(parts).next().await.is_none());
    });
}

#[test]
fn closing_a_descriptor_that_nobody_claims_does_not_block_the_runtime() {
    use nix::{
        libc,
        sys::socket::{setsockopt, sockopt},
    };
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };
    counted(async |kind| {
        // The last close of a connection that lingers with unsent data blocks until its client has
        // taken the data.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut lingering = listener.accept().unwrap().0;
        setsockopt(&lingering, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 600 })
            .unwrap();
        lingering.set_nonblocking(true).unwrap();
        while lingering.write(&[0; 65536]).is_ok() {}

        // The client reads when the connection under test is dropped, or when it is clear that the
        // close blocks this thread.
        let (dropped, is_dropped) = std::sync::mpsc::channel();
        let client = std::thread::spawn(move || {
            let in_time = is_dropped.recv_timeout(std::time::Duration::from_secs(10));
            client.read_to_end(&mut Vec::new()).unwrap();
            in_time
        });

        // Nobody claims the descriptor, so the library closes it.
        let (mut rx, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[lingering.into()]);
        assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { found: b'?' }))));
        drop(rx);
        let _ = dropped.send(());
        client.join().unwrap().expect("the close blocked the runtime");
    });
}
