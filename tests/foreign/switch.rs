//! A change of the codec in the middle of a connection: after a handshake in text come binary
//! frames. Nothing is lost in either direction.

use bytes::{Buf, BytesMut};
use fdwire::{
    Error, Frame, FrameCodec, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, PacketCodec, SendBuf},
};
use futures::{SinkExt, StreamExt, TryStreamExt};

use crate::common::{KINDS, encoded, marked, marks, raw_send, run};

/// Words of text, each with a line feed, without descriptors.
#[derive(Clone)]
struct Words;

impl Codec for Words {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst
    }
}

impl Decoder for Words {
    type Item = String;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, _: &mut FdQueue) -> Result<Option<String>, Error> {
        let Some(end) = src.iter().position(|&byte| byte == b'\n') else { return Ok(None) };
        let word = String::from_utf8_lossy(&src.split_to(end)).into_owned();
        src.advance(1);
        Ok(Some(word))
    }
}

impl Encoder<&str> for Words {
    type Error = Error;

    fn encode<'a>(&mut self, word: &'a str, dst: &mut SendBuf) -> Result<(), SendError<&'a str>> {
        dst.put_slice(word.as_bytes());
        dst.put_slice(b"\n");
        Ok(())
    }
}

fn binary<D, E>(framed: Framed<D, E>) -> Framed<FrameCodec> {
    framed.map_codecs(|_, _| (FrameCodec::default(), FrameCodec::default()))
}

#[test]
fn frames_that_arrive_together_with_the_handshake_are_decoded_by_the_next_codec() {
    for kind in KINDS {
        run(async {
            let (a, peer) = Socket::pair(kind).unwrap();
            let burst = [
                &b"HELLO\nBEGIN\n"[..],
                &encoded(b"one", 2),
                &encoded(b"two", 0),
                &encoded(b"three", 1),
            ]
            .concat();
            let (now, later) = burst.split_at(burst.len() - 4); // the last frame is cut
            raw_send(&peer, now, &[1, 2, 3].map(marked));

            let mut words = Framed::new(a, Words);
            assert_eq!(words.try_next().await.unwrap().unwrap(), "HELLO");
            assert_eq!(words.try_next().await.unwrap().unwrap(), "BEGIN");
            let mut frames = binary(words);
            raw_send(&peer, later, &[]);
            drop(peer);
            for (text, fds) in [("one", vec![1, 2]), ("two", vec![]), ("three", vec![3])] {
                let frame = frames.try_next().await.unwrap().unwrap();
                assert_eq!((&frame.payload[..], marks(&frame)), (text.as_bytes(), fds));
            }
            assert!(frames.next().await.is_none());
        });
    }
}

#[test]
fn unsent_messages_go_out_before_those_that_the_next_codec_encodes() {
    for kind in KINDS {
        run(async {
            // Two words, and frames behind them.
            let (a, b) = Socket::pair(kind).unwrap();
            let mut words = Framed::new(a, Words);
            words.feed("HELLO").await.unwrap();
            words.feed("BEGIN").await.unwrap();
            assert_eq!((words.unsent().bytes, words.unsent().fds), (12, 0));
            let mut frames = binary(words);
            for n in 0..600 {
                frames
                    .feed(Frame::new(n.to_string()).with_fds((0..n % 3).map(|_| marked(n))))
                    .await
                    .unwrap();
            }

            // Back to words, with hundreds of descriptors unsent.
            assert!(frames.unsent().fds > 0);
            let mut words = frames.map_codecs(|_, _| (Words, Words));
            words.feed("END").await.unwrap();

            // Everything arrives in this order.
            let mut peer = Framed::new(b, Words);
            let receive = async {
                assert_eq!(peer.try_next().await.unwrap().unwrap(), "HELLO");
                assert_eq!(peer.try_next().await.unwrap().unwrap(), "BEGIN");
                let mut peer = binary(peer);
                for n in 0..600 {
                    let frame = peer.try_next().await.unwrap().unwrap();
                    assert_eq!(
                        (&frame.payload[..], marks(&frame)),
                        (n.to_string().as_bytes(), vec![n; n as usize % 3])
                    );
                }
                let mut peer = peer.map_codecs(|_, _| (Words, Words));
                assert_eq!(peer.try_next().await.unwrap().unwrap(), "END");
                assert!(peer.next().await.is_none());
            };
            let (closed, ()) = tokio::join!(words.close(), receive);
            closed.unwrap();
        });
    }
}

/// Both ends begin at the same time: each sends its handshake and its first frames in one flush,
/// before it has read a byte.
#[test]
fn both_ends_switch_without_waiting_for_each_other() {
    async fn end(socket: Socket, mark: u32) -> Vec<u32> {
        let mut words = Framed::new(socket, Words);
        words.feed("BEGIN").await.unwrap();
        let mut frames = binary(words);
        frames.feed(Frame::new("early").with_fds([marked(mark), marked(mark + 1)])).await.unwrap();
        frames.flush().await.unwrap();

        // Receiving is still in the handshake, while sending has changed the codec.
        let mut words = frames.map_codecs(|_, encoder| (Words, encoder));
        assert_eq!(words.try_next().await.unwrap().unwrap(), "BEGIN");
        let mut frames = words.map_codecs(|_, encoder| (FrameCodec::default(), encoder));
        frames.send(Frame::new("late").with_fd(marked(mark + 2))).await.unwrap();
        let mut seen = Vec::new();
        for text in ["early", "late"] {
            let frame = frames.try_next().await.unwrap().unwrap();
            assert_eq!(frame.payload, text);
            seen.extend(marks(&frame));
        }
        seen
    }
    for kind in KINDS {
        run(async {
            let (a, b) = Socket::pair(kind).unwrap();
            let (of_b, of_a) = tokio::join!(end(a, 10), end(b, 20));
            assert_eq!((of_b, of_a), (vec![20, 21, 22], vec![10, 11, 12]));
        });
    }
}

/// A message that was accepted keeps the grouping of the codec that encoded it.
#[test]
fn packets_that_wait_unsent_stay_packets() {
    run(async {
        let (a, b) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut packets = Framed::new(a, PacketCodec::default());
        packets.feed(Frame::new("one").with_fd(marked(1))).await.unwrap();
        packets.feed(Frame::new("two")).await.unwrap();
        let mut frames = binary(packets);
        frames.send(Frame::new("three").with_fd(marked(3))).await.unwrap();

        let mut peer = Framed::new(b, PacketCodec::default());
        for (text, fds) in [("one", vec![1]), ("two", vec![])] {
            let frame = peer.try_next().await.unwrap().unwrap();
            assert_eq!((&frame.payload[..], marks(&frame)), (text.as_bytes(), fds));
        }
        let frame = binary(peer).try_next().await.unwrap().unwrap();
        assert_eq!((&frame.payload[..], marks(&frame)), (&b"three"[..], vec![3]));
    });
}
