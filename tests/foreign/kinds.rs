//! A protocol like vhost-user: the kind of a message implies its descriptors, for some kinds
//! together with a number or a flag in the payload.
//! <https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fdwire::{
    Error, Frame, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};
use futures::{SinkExt, TryStreamExt};

use crate::{
    common::{KINDS, marked, marks, raw_send, run},
    raw_recv,
};

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_FD: u32 = 7;
const SET_VRING_KICK: u32 = 12;

/// Messages are their kind and a frame. On the wire: kind, flags (the version), length of the
/// payload, payload.
#[derive(Clone)]
struct VhostCodec;

impl VhostCodec {
    const HEADER: usize = 12;
    const VERSION: u32 = 1;

    fn expected_fds(kind: u32, mut payload: &[u8]) -> usize {
        match kind {
            SET_LOG_FD => 1,
            SET_MEM_TABLE => payload.try_get_u32_ne().map_or(0, |regions| regions as usize),
            SET_VRING_KICK => {
                payload.try_get_u64_ne().map_or(0, |queue| usize::from(queue & 0x100 == 0))
            }
            _ => 0,
        }
    }
}

impl Codec for VhostCodec {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst // the peer receives descriptors together with the header
    }
}

impl Decoder for VhostCodec {
    type Item = (u32, Frame);
    type Error = io::Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue,
    ) -> io::Result<Option<(u32, Frame)>> {
        if src.len() < Self::HEADER {
            return Ok(None);
        }
        let mut header = &src[..Self::HEADER];
        let (kind, flags, length) =
            (header.get_u32_ne(), header.get_u32_ne(), header.get_u32_ne() as usize);
        if flags & 3 != Self::VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "unsupported version"));
        }
        if length > self.limits().max_payload_bytes {
            return Err(Error::FrameTooLong {
                bytes: length,
                limit: self.limits().max_payload_bytes,
            }
            .into());
        }
        if src.len() < Self::HEADER + length {
            return Ok(None);
        }
        src.advance(Self::HEADER);
        let payload = src.split_to(length).freeze();
        let fds = fds.claim(Self::expected_fds(kind, &payload))?;
        Ok(Some((kind, Frame { payload, fds })))
    }
}

impl Encoder<(u32, Frame)> for VhostCodec {
    type Error = Error;

    fn encode(
        &mut self,
        item: (u32, Frame),
        dst: &mut SendBuf,
    ) -> Result<(), SendError<(u32, Frame)>> {
        let (expected, present) = (Self::expected_fds(item.0, &item.1.payload), item.1.fds.len());
        if expected != present {
            return Err(SendError::refused(
                item,
                Error::MissingFds { expected, received: present },
            ));
        }
        let (kind, Frame { payload, fds }) = item;
        for field in [kind, Self::VERSION, payload.len() as u32] {
            dst.put_u32_ne(field);
        }
        dst.put_shared(payload);
        dst.put_fds(fds);
        Ok(())
    }
}

fn messages() -> Vec<(u32, Frame)> {
    let payload = |bytes: &[u8]| Frame::new(Bytes::copy_from_slice(bytes));
    let table = [&3u32.to_ne_bytes()[..], &[0; 4 + 3 * 32]].concat();
    vec![
        (GET_FEATURES, payload(&[])),
        (SET_MEM_TABLE, payload(&table).with_fds((1..=3).map(marked))),
        (SET_VRING_KICK, payload(&1u64.to_ne_bytes()).with_fd(marked(4))),
        (SET_VRING_KICK, payload(&0x102u64.to_ne_bytes())),
        (SET_LOG_FD, payload(&[]).with_fd(marked(5))),
        (GET_FEATURES, payload(&[])),
    ]
}

#[test]
fn the_kind_of_a_message_implies_its_descriptors() {
    for kind in KINDS {
        run(async {
            let (a, b) = Socket::pair(kind).unwrap();
            let (mut a, mut b) = (Framed::new(a, VhostCodec), Framed::new(b, VhostCodec));
            a.send_all(&mut futures::stream::iter(messages().into_iter().map(Ok))).await.unwrap();
            for (kind, frame) in messages() {
                let (received_kind, received) = b.try_next().await.unwrap().unwrap();
                assert_eq!((received_kind, &received.payload), (kind, &frame.payload));
                assert_eq!(marks(&received), marks(&frame));
            }
        });
    }
}

/// The peer reads as QEMU does: first the header, with room for descriptors, and then the payload,
/// without.
#[test]
fn a_peer_that_reads_the_header_alone_finds_all_descriptors_with_it() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let mut a = Framed::new(a, VhostCodec);
        a.send_all(&mut futures::stream::iter(messages().into_iter().map(Ok))).await.unwrap();
        for (kind, frame) in messages() {
            let (header, with_header) = raw_recv(&peer, VhostCodec::HEADER);
            assert_eq!(header[..4], kind.to_ne_bytes());
            assert_eq!(with_header, marks(&frame));
            if !frame.payload.is_empty() {
                assert_eq!(raw_recv(&peer, frame.payload.len()), (frame.payload.to_vec(), vec![]));
            }
        }
    });
}

#[test]
fn a_message_without_the_descriptors_of_its_kind_is_refused() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let mut a = Framed::new(a, VhostCodec);
        let refused = a.send((GET_FEATURES, Frame::new("").with_fd(marked(1)))).await.unwrap_err();
        assert!(matches!(refused.error, Error::MissingFds { expected: 0, received: 1 }));
        assert_eq!(marks(&refused.item.unwrap().1), [1]);

        let header = [SET_LOG_FD, VhostCodec::VERSION, 0].map(u32::to_ne_bytes).concat();
        raw_send(&peer, &header, &[]);
        let error = a.try_next().await.unwrap_err();
        assert!(error.to_string().contains("needs 1 descriptors, 0 arrived"), "{error}");
    });
}
