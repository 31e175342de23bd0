//! Protocols of text with descriptors attached, and one that sends them with zero bytes in between.

use std::os::fd::OwnedFd;

use bytes::{Buf, Bytes, BytesMut};
use fdwire::{
    Error, Frame, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};
use futures::{SinkExt, StreamExt, TryStreamExt};
use tokio_util::codec::{self, LinesCodec, LinesCodecError};

use crate::{
    common::{KINDS, mark_of, marked, marks, raw_send, run},
    raw_recv,
};

/// Lines of text; one that ends with ` fd` has a descriptor. `tokio_util`'s codec does the lines.
#[derive(Clone, Default)]
struct LineFdCodec(LinesCodec);

#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error(transparent)]
    Wire(#[from] Error),
    #[error(transparent)]
    Line(#[from] LinesCodecError),
}

impl Codec for LineFdCodec {}

impl Decoder for LineFdCodec {
    type Item = (String, Option<OwnedFd>);
    type Error = LineError;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue,
    ) -> Result<Option<Self::Item>, LineError> {
        let Some(line) = codec::Decoder::decode(&mut self.0, src)? else { return Ok(None) };
        let Some(name) = line.strip_suffix(" fd") else { return Ok(Some((line, None))) };
        let fd = fds.claim_one()?;
        Ok(Some((name.to_owned(), Some(fd))))
    }
}

impl Encoder<(&str, Option<OwnedFd>)> for LineFdCodec {
    type Error = LineError;

    fn encode<'a>(
        &mut self,
        (line, fd): (&'a str, Option<OwnedFd>),
        dst: &mut SendBuf,
    ) -> Result<(), SendError<(&'a str, Option<OwnedFd>), LineError>> {
        let mut bytes = BytesMut::new();
        let suffix = if fd.is_some() { " fd" } else { "" };
        codec::Encoder::encode(&mut self.0, [line, suffix].concat(), &mut bytes)
            .map_err(LineError::from)?;
        dst.put_shared(bytes.freeze());
        dst.put_fds(fd);
        Ok(())
    }
}

#[test]
fn lines_bring_the_descriptors_that_they_name() {
    for kind in KINDS {
        run(async {
            let (a, b) = Socket::pair(kind).unwrap();
            let (mut a, mut b) =
                (Framed::new(a, LineFdCodec::default()), Framed::new(b, LineFdCodec::default()));
            let names: Vec<String> = (0..300).map(|n| format!("line {n}")).collect();
            for (name, n) in names.iter().zip(0..) {
                a.feed((name, (n % 3 == 0).then(|| marked(n)))).await.unwrap();
            }
            a.close().await.unwrap();
            for (name, n) in names.iter().zip(0..) {
                let (line, fd) = b.try_next().await.unwrap().unwrap();
                assert_eq!((&line, fd.as_ref().map(mark_of)), (name, (n % 3 == 0).then_some(n)));
            }
            assert!(b.next().await.is_none());
        });
    }
}

#[test]
fn lines_that_a_peer_writes_in_any_pieces_bring_their_descriptors() {
    for kind in KINDS {
        run(async {
            let (a, peer) = Socket::pair(kind).unwrap();
            let mut a = Framed::new(a, LineFdCodec::default());
            // Descriptors are always attached to the first byte of a call.
            raw_send(&peer, b"plain\nlog f", &[marked(1)]);
            raw_send(&peer, b"d\r\ntwo f", &[marked(2)]);
            raw_send(&peer, b"d\nthree fd\n", &[marked(3)]);
            drop(peer);
            let mut seen = Vec::new();
            while let Some((line, fd)) = a.try_next().await.unwrap() {
                seen.push((line, fd.as_ref().map(mark_of)));
            }
            let expected =
                [("plain", None), ("log", Some(1)), ("two", Some(2)), ("three", Some(3))];
            assert!(seen.iter().map(|(line, mark)| (&**line, *mark)).eq(expected), "{seen:?}");
        });
    }
}

/// Lines, and descriptors that each come with a zero byte of their own, as in the messages of
/// OpenSSH's multiplexing.
#[derive(Clone)]
struct ZeroByteCodec;

#[derive(Debug)]
enum Part {
    Line(Bytes),
    Fd(OwnedFd),
}

impl Codec for ZeroByteCodec {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst // the peer reads one byte with one descriptor
    }
}

impl Decoder for ZeroByteCodec {
    type Item = Part;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> Result<Option<Part>, Error> {
        if src.first() == Some(&0) {
            src.advance(1);
            return Ok(Some(Part::Fd(fds.claim_one()?)));
        }
        let Some(end) = src.iter().position(|&byte| byte == b'\n') else { return Ok(None) };
        let line = src.split_to(end).freeze();
        src.advance(1);
        Ok(Some(Part::Line(line)))
    }
}

impl Encoder<Part> for ZeroByteCodec {
    type Error = Error;

    fn encode(&mut self, part: Part, dst: &mut SendBuf) -> Result<(), SendError<Part>> {
        match part {
            Part::Line(line) => {
                dst.put_shared(line);
                dst.put_slice(b"\n");
            }
            Part::Fd(fd) => {
                dst.put_slice(b"\0");
                dst.put_fd(fd);
            }
        }
        Ok(())
    }
}

#[test]
fn descriptors_with_a_zero_byte_each_are_sent_and_received_in_order() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let mut a = Framed::new(a, ZeroByteCodec);

        // The peer sends.
        raw_send(&peer, b"open\n", &[]);
        raw_send(&peer, b"\0", &[marked(1)]);
        raw_send(&peer, b"\0", &[marked(2)]);
        raw_send(&peer, b"done\n", &[]);
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(match a.try_next().await.unwrap().unwrap() {
                Part::Line(line) => Err(line),
                Part::Fd(fd) => Ok(mark_of(&fd)),
            });
        }
        assert_eq!(seen, [Err("open".into()), Ok(1), Ok(2), Err("done".into())]);

        // The peer receives, with one call for each part.
        for part in [
            Part::Line("open".into()),
            Part::Fd(marked(3)),
            Part::Fd(marked(4)),
            Part::Line("done".into()),
        ] {
            a.feed(part).await.unwrap();
        }
        a.flush().await.unwrap();
        assert_eq!(raw_recv(&peer, 5), (b"open\n".to_vec(), vec![]));
        assert_eq!(raw_recv(&peer, 1), (b"\0".to_vec(), vec![3]));
        assert_eq!(raw_recv(&peer, 1), (b"\0".to_vec(), vec![4]));
        assert_eq!(raw_recv(&peer, 5), (b"done\n".to_vec(), vec![]));
    });
}

/// Text up to an empty line. Only a receiver that has read all of it knows its end, and the number
/// of descriptors that came with its first byte, which is in one of its lines.
#[derive(Clone)]
struct RecordCodec;

impl Codec for RecordCodec {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst
    }
}

impl Decoder for RecordCodec {
    type Item = Frame;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> Result<Option<Frame>, Error> {
        let Some(end) = src.windows(2).position(|end| end == b"\n\n") else { return Ok(None) };
        let payload = src.split_to(end).freeze();
        src.advance(2);
        let text = String::from_utf8_lossy(&payload);
        let expected =
            text.lines().find_map(|line| line.strip_prefix("fds: ")?.parse().ok()).unwrap_or(0);
        let fds = fds.claim(expected)?;
        Ok(Some(Frame { payload, fds }))
    }
}

impl Encoder<Frame> for RecordCodec {
    type Error = Error;

    fn encode(&mut self, frame: Frame, dst: &mut SendBuf) -> Result<(), SendError<Frame>> {
        dst.put_shared(frame.payload);
        dst.put_slice(b"\n\n");
        dst.put_fds(frame.fds);
        Ok(())
    }
}

#[test]
fn descriptors_at_the_start_of_a_message_are_found_when_its_length_is_known_only_at_its_end() {
    for kind in KINDS {
        run(async {
            let (a, peer) = Socket::pair(kind).unwrap();
            let mut a = Framed::new(a, RecordCodec);
            raw_send(&peer, b"one\n\ntwo\nfds", &[marked(1), marked(2)]);
            raw_send(&peer, b": 2\nmore of two\n", &[]);
            raw_send(&peer, b"\nthree\n\n", &[]);
            raw_send(&peer, b"fds: 1\n\nfive\nfds: 1\n\n", &[marked(4), marked(5)]);
            drop(peer);
            let mut seen = Vec::new();
            while let Some(frame) = a.try_next().await.unwrap() {
                seen.push(marks(&frame));
            }
            assert_eq!(seen, [vec![], vec![1, 2], vec![], vec![4], vec![5]]);
        });
    }
}

#[test]
fn messages_that_are_sent_begin_with_their_descriptors() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let mut a = Framed::new(a, RecordCodec);
        for (text, fds) in [("one", 0..0), ("fds: 2", 1..3), ("three", 0..0), ("fds: 1", 4..5)] {
            a.feed(Frame::new(text).with_fds(fds.map(marked))).await.unwrap();
        }
        a.flush().await.unwrap();
        for (text, fds) in
            [("one", vec![]), ("fds: 2", vec![1, 2]), ("three", vec![]), ("fds: 1", vec![4])]
        {
            assert_eq!(raw_recv(&peer, 1), (text.as_bytes()[..1].to_vec(), fds), "{text}");
            assert_eq!(
                raw_recv(&peer, text.len() + 1),
                ([&text.as_bytes()[1..], b"\n\n"].concat(), vec![])
            );
        }
    });
}
