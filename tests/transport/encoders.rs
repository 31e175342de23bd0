//! Encoders that fail in the middle of a message, and encoders of messages with several parts.

use std::{
    fs::File,
    io::IoSliceMut,
    os::fd::{AsFd, AsRawFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
};

use fdwire::{
    Error, Frame, FrameCodec, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Encoder, PacketCodec, SendBuf},
    framed::FramedParts,
};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::{
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
    unistd::close,
};

use crate::{
    common::{mark_of, marked, marks},
    counted,
};

/// Writes half of a message and then fails or panics, if the payload asks for that.
struct Halfway(FrameCodec);

impl Codec for Halfway {}

impl Encoder<Frame> for Halfway {
    type Error = Error;

    fn encode(&mut self, mut frame: Frame, dst: &mut SendBuf) -> Result<(), SendError<Frame>> {
        if frame.payload != "fail" && frame.payload != "panic" {
            return self.0.encode(frame, dst);
        }
        dst.put_slice(b"half of ");
        dst.put_shared(vec![7; 10_000].into());
        dst.put_fds(std::mem::take(&mut frame.fds));
        dst.end_part();
        dst.put_slice(b"a message of several parts");
        dst.put_fd(marked(8));
        assert_ne!(frame.payload, "panic", "on purpose");
        Err(SendError::refused(frame, Error::invalid("on purpose")))
    }
}

/// Returns a frame with the descriptor `mark`. `counted` checks that it is closed on drop.
fn frame(payload: &'static str, mark: u32) -> Frame {
    Frame::new(payload).with_fd(marked(mark))
}

#[test]
fn nothing_is_left_of_a_message_whose_encoder_fails_or_panics() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut tx = Framed::with_codecs(a, FrameCodec::default(), Halfway(FrameCodec::default()));
        let mut rx = Framed::new(b, FrameCodec::default());
        for mark in 0..3 {
            // The message is first the only one, and then behind another that waits.
            for before in [false, true] {
                if before {
                    tx.feed(frame("before", mark)).await.unwrap();
                }
                let unsent = tx.unsent();
                let failed = tx.feed(frame("fail", 9)).await.unwrap_err();
                assert!(matches!(failed.error, Error::Invalid(_)));
                assert_eq!(tx.unsent(), unsent);

                let panicked =
                    catch_unwind(AssertUnwindSafe(|| tx.feed(frame("panic", 9)).now_or_never()));
                assert!(panicked.is_err());
                assert_eq!(tx.unsent(), unsent);

                // Only the message before it is sent.
                tx.flush().await.unwrap();
                if before {
                    assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [mark]);
                }
            }
            // The next message is sent as usual.
            tx.send(frame("after", mark)).await.unwrap();
            let after = rx.try_next().await.unwrap().unwrap();
            assert_eq!((&after.payload[..], marks(&after)), (&b"after"[..], vec![mark]));
        }
        tx.close().await.unwrap();
        assert!(rx.next().await.is_none());
    });
}

#[test]
fn a_half_goes_on_after_an_encoder_that_panics() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut rx = Framed::new(b, FrameCodec::default());
        let framed = Framed::with_codecs(a, FrameCodec::default(), Halfway(FrameCodec::default()));
        let (_read, mut tx) = framed.into_split();
        let permit = tx.reserve().await.unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| permit.send(frame("panic", 9)))).is_err());
        assert_eq!((tx.unsent().bytes, tx.unsent().fds), (0, 0));
        tx.send(frame("after", 1)).await.unwrap();
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [1]);
    });
}

/// Makes one `recvmsg` without the code under test. Returns the number of bytes, the first byte,
/// and the marks of the descriptors.
fn raw_recv(socket: &Socket) -> (usize, u8, Vec<u32>) {
    let (mut bytes, mut control) = (vec![0; 200_000], nix::cmsg_space!([RawFd; 253]));
    let mut room = [IoSliceMut::new(&mut bytes)];
    let (fd, flags) = (socket.as_fd().as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
    let received = recvmsg::<UnixAddr>(fd, &mut room, Some(&mut control), flags).unwrap();
    let mut marks = Vec::new();
    for message in received.cmsgs().unwrap() {
        let ControlMessageOwned::ScmRights(fds) = message else { continue };
        for fd in fds {
            marks.push(mark_of(&File::open(format!("/proc/self/fd/{fd}")).unwrap()));
            close(fd).unwrap();
        }
    }
    let count = received.bytes;
    (count, bytes[0], marks)
}

/// Sends each mark of the payload in a part of its own.
#[derive(Clone)]
struct InParts;

impl Codec for InParts {}

impl Encoder<Vec<u32>> for InParts {
    type Error = Error;

    fn encode(&mut self, parts: Vec<u32>, dst: &mut SendBuf) -> Result<(), SendError<Vec<u32>>> {
        for mark in parts {
            dst.put_slice(&[mark as u8]);
            dst.put_fd(marked(mark));
            dst.end_part();
        }
        Ok(())
    }
}

/// The peer makes one `recvmsg` after the other, with room for any number of bytes and descriptors.
#[test]
fn each_part_of_a_message_is_received_by_itself_whoever_sends_at_the_same_time() {
    counted(async |kind| {
        let (a, peer) = Socket::pair(kind).unwrap();
        let (_read, write) = Framed::with_codecs(a, FrameCodec::default(), InParts).into_split();
        let (sender, driver) = write.into_sender();

        // Ten tasks send a message of three parts each.
        for task in 0..10 {
            let sender = sender.clone();
            tokio::spawn(async move {
                sender.send(vec![10 * task, 10 * task + 1, 10 * task + 2]).await.unwrap()
            });
        }
        drop(sender);
        let half = driver.await;

        // Each receive brings one part with its own descriptor.
        let mut received = Vec::new();
        for _ in 0..30 {
            let (count, byte, marks) = raw_recv(&peer);
            assert_eq!(
                (count, &marks[..]),
                (1, &[u32::from(byte)][..]),
                "the descriptor is that of the byte"
            );
            received.extend(marks);
        }

        // The parts of a message follow each other.
        for message in received.chunks(3) {
            assert_eq!(
                message,
                [message[0], message[0] + 1, message[0] + 2],
                "another message is between the parts"
            );
        }
        drop(half);
    });
}

/// The appended message belongs to the encoder that sends it, not to the one before.
#[test]
fn a_message_that_is_put_into_the_parts_is_grouped_as_the_encoder_wants_it() {
    counted(async |_| {
        let (a, peer) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut tx = Framed::new(a, PacketCodec::default());
        tx.feed(Frame::new("before").with_fd(marked(1))).await.unwrap();
        let mut parts: FramedParts<PacketCodec> = tx.into_parts();
        // Longer than the packets that a receiver expects without being told their length.
        parts.unsent.put_slice(&vec![7; 100_000]);
        parts.unsent.put_fd(marked(2));
        let mut tx = Framed::from_parts(parts);
        tx.feed(Frame::new("behind").with_fd(marked(3))).await.unwrap();
        tx.flush().await.unwrap();
        for (length, mark) in [(6, 1), (100_000, 2), (6, 3)] {
            let (count, _, marks) = raw_recv(&peer);
            assert_eq!((count, marks), (length, vec![mark]));
        }
    });
}
