//! `PacketCodec`: each message is a packet on SEQPACKET, and STREAM carries plain bytes.

use bytes::Bytes;
use fdwire::{
    Error, Frame, FrameCodec, Framed, Limits, Socket, SocketKind,
    codec::{Codec, PacketCodec},
};
use futures::{SinkExt, StreamExt, TryStreamExt};

use crate::{
    common::{KINDS, marked, marks, raw_send, run},
    raw_recv,
};

fn pair(kind: SocketKind) -> (Framed<PacketCodec>, Framed<PacketCodec>) {
    let (a, b) = Socket::pair(kind).unwrap();
    (Framed::new(a, PacketCodec::default()), Framed::new(b, PacketCodec::default()))
}

#[test]
fn limits_hold_for_descriptors_and_for_bytes_that_were_received_with_another_codec() {
    run(async {
        let limits = Limits::default().max_payload_bytes(10).max_fds_per_frame(1);
        let (a, b) = Socket::pair(SocketKind::Stream).unwrap();
        let (mut a, mut b) =
            (Framed::new(a, FrameCodec::default()), Framed::new(b, FrameCodec::default()));
        a.feed(Frame::new("hello")).await.unwrap();
        let mut a = a.map_codecs(|_, _| (PacketCodec::default(), PacketCodec::default()));
        a.send(Frame::new(vec![7; 25])).await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "hello");
        let mut b = b.map_codecs(|_, _| (PacketCodec::new(limits), PacketCodec::new(limits)));
        for length in [10, 10, 5] {
            assert_eq!(b.try_next().await.unwrap().unwrap().payload.len(), length);
        }
        a.send(Frame::new("two").with_fds([marked(1), marked(2)])).await.unwrap();
        assert!(matches!(b.try_next().await, Err(Error::TooManyFds { fds: 2, limit: 1 })));
    });
}

#[test]
fn each_message_is_one_packet_with_its_descriptors() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut a = Framed::new(a, PacketCodec::default());
        for (text, fds) in [("one", 0..1), ("two", 0..0), ("three", 1..254), ("four", 0..0)] {
            a.feed(Frame::new(text).with_fds(fds.map(marked))).await.unwrap();
        }
        a.flush().await.unwrap();
        for (text, fds) in [("one", 0..1), ("two", 0..0), ("three", 1..254), ("four", 0..0)] {
            assert_eq!(raw_recv(&peer, 1000), (text.into(), fds.collect()));
        }

        raw_send(&peer, b"first", &[marked(1), marked(2)]);
        raw_send(&peer, b"second", &[]);
        raw_send(&peer, b"third", &[marked(3)]);
        for (text, fds) in [("first", vec![1, 2]), ("second", vec![]), ("third", vec![3])] {
            let frame = a.try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], marks(&frame)), (text.as_bytes(), fds));
        }
    });
}

#[test]
fn the_largest_packet_goes_through_and_one_more_byte_is_refused_and_given_back() {
    run(async {
        let (mut a, mut b) = pair(SocketKind::SeqPacket);
        let largest = a.socket().send_buffer_size().unwrap() - 32;
        let message = |length| Frame::new(vec![7; length]).with_fd(marked(length as u32));
        a.send(message(largest)).await.unwrap();
        let frame = b.try_next().await.unwrap().unwrap();
        assert_eq!((frame.payload.len(), marks(&frame)), (largest, vec![largest as u32]));

        let refused = a.send(message(largest + 1)).await.unwrap_err();
        assert!(matches!(
            refused.error,
            Error::FrameTooLong { bytes, limit } if (bytes, limit) == (largest + 1, largest)
        ));
        let item = refused.item.unwrap();
        assert_eq!((item.payload.len(), marks(&item)), (largest + 1, vec![largest as u32 + 1]));

        a.send(Frame::new("next")).await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "next");
    });
}

#[test]
fn an_empty_message_is_refused_and_given_back() {
    for kind in KINDS {
        run(async {
            let (mut a, mut b) = pair(kind);
            let refused = a.send(Frame::new("").with_fd(marked(1))).await.unwrap_err();
            assert!(matches!(refused.error, Error::EmptyMessage));
            assert_eq!(marks(&refused.item.unwrap()), [1]);

            a.send(Frame::new("next")).await.unwrap();
            assert_eq!(b.try_next().await.unwrap().unwrap().payload, "next");
        });
    }
}

#[test]
fn a_message_over_a_limit_of_the_codec_is_refused_and_given_back() {
    for kind in KINDS {
        run(async {
            let (a, _b) = Socket::pair(kind).unwrap();
            let mut a = Framed::new(
                a,
                PacketCodec::new(Limits::default().max_payload_bytes(4).max_fds_per_frame(2)),
            );
            let refused = a.send(Frame::new("12345")).await.unwrap_err();
            assert!(matches!(refused.error, Error::FrameTooLong { bytes: 5, limit: 4 }));
            assert_eq!(refused.item.unwrap().payload, "12345");
            let refused =
                a.send(Frame::new("1234").with_fds((0..3).map(marked))).await.unwrap_err();
            assert!(matches!(refused.error, Error::TooManyFds { fds: 3, limit: 2 }));
            assert_eq!(marks(&refused.item.unwrap()), [0, 1, 2]);
            a.send(Frame::new("1234").with_fds((0..2).map(marked))).await.unwrap();
        });
    }
}

fn check_a_packet_above(limit: usize) {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::SeqPacket).unwrap();
        peer.set_send_buffer_size(1 << 20).unwrap();
        if peer.send_buffer_size().unwrap() < limit + 100 {
            return eprintln!("skipped: wmem_max is too small for packets of {limit} bytes");
        }
        let mut a = Framed::new(a, PacketCodec::new(Limits::default().max_payload_bytes(limit)));
        raw_send(&peer, &vec![1; limit], &[marked(1)]);
        let frame = a.try_next().await.unwrap().unwrap();
        assert_eq!((frame.payload.len(), marks(&frame)), (limit, vec![1]));

        raw_send(&peer, &vec![2; limit + 1], &[marked(2)]);
        raw_send(&peer, b"not seen", &[]);
        match a.next().await {
            Some(Err(Error::TruncatedPacket)) => {}
            other => panic!(
                "limit {limit}: {:?}",
                other.map(|result| result.map(|frame| frame.payload.len()))
            ),
        }
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_packet_above_the_default_limit_ends_the_stream() {
    check_a_packet_above(PacketCodec::default().limits().max_payload_bytes);
}

#[test]
fn a_packet_above_a_small_limit_ends_the_stream() {
    for limit in [1, 1000, 100_000] {
        check_a_packet_above(limit);
    }
}

/// An empty packet looks like the end of the connection, and later packets are lost. Only its
/// descriptors show that it was a packet.
#[test]
fn an_empty_packet_is_received_as_the_end() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut a = Framed::new(a, PacketCodec::default());
        raw_send(&peer, b"one", &[]);
        raw_send(&peer, b"", &[marked(1)]);
        assert_eq!(a.try_next().await.unwrap().unwrap().payload, "one");
        assert!(matches!(a.next().await, Some(Err(Error::UnclaimedFds { fds: 1 }))));
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_stream_gives_plain_bytes_with_the_descriptors_beside_them() {
    run(async {
        let (mut a, mut b) = pair(SocketKind::Stream);
        let bytes: Bytes = (0..600_000u32).map(|n| n as u8).collect();
        let mut pieces = futures::stream::iter([
            Ok(Frame::new(bytes.slice(..200_000)).with_fd(marked(1))),
            Ok(Frame::new(bytes.slice(200_000..400_000))),
            Ok(Frame::new(bytes.slice(400_000..)).with_fds([2, 3].map(marked))),
        ]);
        let send = async {
            a.send_all(&mut pieces).await.unwrap();
            a.close().await.unwrap();
        };
        let receive = async {
            let (mut received, mut fds) = (Vec::new(), Vec::new());
            while let Some(frame) = b.try_next().await.unwrap() {
                fds.extend(marks(&frame));
                received.extend_from_slice(&frame.payload);
            }
            assert!(received == bytes);
            assert_eq!(fds, [1, 2, 3]);
        };
        tokio::join!(send, receive);
    });
}
