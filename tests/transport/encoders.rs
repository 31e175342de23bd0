//! An encoder that stops in the middle of a message leaves nothing of it behind.

use std::panic::{AssertUnwindSafe, catch_unwind};

use fdwire::{Codec, Encoder, Error, Frame, FrameCodec, Framed, SendBuf, SendError, Socket};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};

use crate::{
    common::{marked, marks},
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
        dst.put_slice(b"a message");
        dst.put_fds(std::mem::take(&mut frame.fds));
        assert_ne!(frame.payload, "panic", "on purpose");
        Err(SendError::refused(frame, Error::invalid("on purpose")))
    }
}

/// A frame with the descriptor `mark`. Closed on drop, as `counted` checks.
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
            // Alone, then behind a message that waits.
            for before in [false, true] {
                if before {
                    tx.feed(frame("before", mark)).await.unwrap();
                }
                let unsent = tx.unsent();
                let failed = tx.feed(frame("fail", 9)).await.unwrap_err();
                assert!(matches!(failed.error, Error::Invalid(_)));
                assert_eq!(tx.unsent(), unsent);

                let panicked = catch_unwind(AssertUnwindSafe(|| tx.feed(frame("panic", 9)).now_or_never()));
                assert!(panicked.is_err());
                assert_eq!(tx.unsent(), unsent);

                tx.flush().await.unwrap();
                if before {
                    assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [mark]);
                }
            }
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
        assert_eq!(tx.unsent(), (0, 0));
        tx.send(frame("after", 1)).await.unwrap();
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [1]);
    });
}
