//! Codecs whose limits are 0 or the largest number.

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, Frame, FrameCodec, Framed, Limits, Socket,
    codec::{Codec, Decoder, FdQueue, PacketCodec},
};
use futures::{SinkExt, StreamExt, TryStreamExt};

use crate::{
    common::{marked, marks, raw_send},
    counted,
};

#[test]
fn packets_arrive_without_a_limit_of_their_size() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let codec = PacketCodec::new(Limits::default().max_payload_bytes(usize::MAX));
        let (mut tx, mut rx) = (Framed::new(a, codec), Framed::new(b, codec));
        for bytes in [1, 5000, 30_000] {
            tx.feed(Frame::new(vec![7; bytes]).with_fd(marked(1))).await.unwrap();
            let (sent, frame) = tokio::join!(SinkExt::<Frame>::flush(&mut tx), rx.try_next());
            sent.unwrap();
            let frame = frame.unwrap().unwrap();
            assert_eq!((frame.payload.len(), marks(&frame)), (bytes, vec![1]), "{kind:?}");
        }
    });
}

#[test]
fn frames_arrive_without_a_limit_of_their_size() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let codec = FrameCodec::new(
            Limits::default().max_payload_bytes(usize::MAX).max_fds_per_frame(usize::MAX),
        );
        let (mut tx, mut rx) = (Framed::new(a, codec), Framed::new(b, codec));
        tx.send(Frame::new(vec![7; 100_000]).with_fd(marked(1))).await.unwrap();
        let frame = rx.try_next().await.unwrap().unwrap();
        assert_eq!((frame.payload.len(), marks(&frame)), (100_000, vec![1]), "{kind:?}");
    });
}

/// A codec whose message is a letter, and whose largest receive is 0 bytes.
struct Nothing;

impl Codec for Nothing {
    fn limits(&self) -> Limits {
        Limits::default().max_payload_bytes(0)
    }
}

impl Decoder for Nothing {
    type Item = u8;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, _: &mut FdQueue) -> Result<Option<u8>, Error> {
        Ok((!src.is_empty()).then(|| src.get_u8()))
    }

    fn missing_bytes(&self, _: &BytesMut) -> Option<usize> {
        Some(0)
    }

    fn max_receive_bytes(&self) -> usize {
        0
    }
}

#[test]
fn a_codec_that_receives_nothing_receives_a_byte_at_a_time() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut rx = Framed::with_codecs(a, Nothing, ());
        raw_send(&b, b"a", &[]);
        raw_send(&b, b"b", &[]);
        drop(b);
        assert_eq!(
            (rx.next().await.unwrap().unwrap(), rx.next().await.unwrap().unwrap()),
            (b'a', b'b')
        );
        assert!(rx.next().await.is_none());
    });
}
