//! Example tests of receiving. [`model`](super::model) has property tests of the same rules.

use bytes::BytesMut;

use super::{buffers::SMALL_PACKET, *};
use crate::frame::Frame;

fn faults(bytes: &[u8], fds: u32) -> Error {
    let mut inbound = Inbound::new(false, BytesMut::from(bytes), FdQueue::from_iter(0..fds));
    let mut codec =
        FrameCodec::new(Limits::default().max_payload_bytes(100).max_fds_per_frame(300));
    loop {
        match inbound.next(&mut codec) {
            Ok(Step::Item(_)) => {}
            Ok(Step::Receive) => inbound.end_of_stream(),
            Ok(Step::End) => panic!("no fault was found"),
            Err(error) => {
                assert!(
                    matches!(inbound.next(&mut codec), Ok(Step::End)),
                    "an error is followed by the end"
                );
                return error;
            }
        }
    }
}

#[test]
fn each_fault_has_its_error() {
    assert!(matches!(faults(b"G", 0), Error::BadMagic { found: b'G' }));
    assert!(matches!(faults(&[0xFD, 0x20], 0), Error::UnsupportedVersion { found: 2 }));
    assert!(matches!(faults(&[0xFD, 0x18], 0), Error::UnsupportedFlags { found: 8 }));
    assert!(matches!(
        faults(&[0xFD, 0x10, 0, 0, 0, 0, 0, 101], 0),
        Error::FrameTooLong { bytes: 101, limit: 100 }
    ));
    assert!(matches!(
        faults(&[0xFD, 0x10, 0, 0, 255, 255, 255, 255], 0),
        Error::FrameTooLong { .. }
    ));
    assert!(matches!(
        faults(&[0xFD, 0x10, 1, 45, 0, 0, 0, 9], 0),
        Error::TooManyFds { fds: 301, limit: 300 }
    ));
    assert!(matches!(
        faults(&[0xFD, 0x10, 0, 2, 0, 0, 0, 0], 1),
        Error::MissingFds { expected: 2, received: 1 }
    ));
    assert!(matches!(faults(&[0xFD, 0x10, 0, 0, 0, 0, 0, 0], 1), Error::UnclaimedFds { fds: 1 }));
    assert!(matches!(faults(&[], 554), Error::UnclaimedFds { fds: 554 }));
    assert!(matches!(faults(&[0xFD, 0x10, 0], 0), Error::UnexpectedEnd { bytes: 3 }));
    assert!(matches!(
        faults(&[0xFD, 0x10, 0, 0, 0, 0, 0, 3, 1], 0),
        Error::UnexpectedEnd { bytes: 9 }
    ));
    assert!(matches!(faults(&[0xFD, 0x10, 0, 0, 0, 0, 0, 0, 1], 0), Error::BadMagic { found: 1 }));
}

#[test]
fn after_a_loss_only_messages_that_need_none_of_it_are_good() {
    /// Decodes three frames of 1, 0 and 2 descriptors, of which the last was lost. Returns the
    /// numbers of descriptors of the good ones.
    fn good(mut codec: impl Decoder<u32, Item = Frame<u32>, Error = Error>) -> Vec<usize> {
        let frames = [1, 0, 2].map(|fds| [0xFD, 0x10, 0, fds, 0, 0, 0, 0]).concat();
        let mut inbound =
            Inbound::new(true, BytesMut::from(&frames[..]), FdQueue::from_iter([1, 2]));
        inbound.received_truncated();
        let mut good = Vec::new();
        loop {
            match inbound.next(&mut codec) {
                Ok(Step::Item(frame)) => good.push(frame.fds.len()),
                Ok(_) => panic!("the loss was not reported"),
                Err(Error::TruncatedControl) => return good,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert_eq!(good(FrameCodec::default()), [1, 0]); // headers count
    assert!(good(PacketCodec::default()).is_empty()); // a packet has what came, and may lack some
}

#[test]
fn a_decoder_that_takes_the_whole_queue_does_not_hide_a_loss() {
    struct TakesTheQueue;
    impl Codec for TakesTheQueue {}
    impl Decoder<u32> for TakesTheQueue {
        type Item = Vec<u32>;
        type Error = Error;
        fn decode(
            &mut self,
            src: &mut BytesMut,
            fds: &mut FdQueue<u32>,
        ) -> Result<Option<Vec<u32>>, Error> {
            let message = (!src.is_empty()).then(|| std::mem::take(fds).into_vec());
            src.clear();
            Ok(message)
        }
    }
    for lost in [false, true] {
        let mut inbound = Inbound::new(true, BytesMut::from("text"), FdQueue::from_iter([1, 2]));
        if lost {
            inbound.received_truncated();
        }
        match inbound.next(&mut TakesTheQueue) {
            Ok(Step::Item(fds)) => assert!(!lost, "{fds:?} of more"),
            Err(Error::TruncatedControl) => assert!(lost),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_result_that_a_loss_may_have_changed_spoils_a_message_and_no_other_does() {
    // Returns whether a call of this function on two descriptors spoils the message.
    type Question = fn(&mut FdQueue<i32>);
    let spoils = |question: Question, lost: bool| {
        let mut fds = FdQueue::from_iter([1, 2]);
        if lost {
            fds.set_truncated();
        }
        question(&mut fds);
        fds.is_spoiled()
    };

    // Results that are the same without the loss.
    let harmless: [Question; 5] = [
        |fds| assert_eq!(fds.claim(2).unwrap().len(), 2),
        |fds| assert_eq!(fds.claim(0).unwrap().len(), 0),
        |fds| assert_eq!(fds.claim_one().unwrap(), 1),
        |fds| assert_eq!(fds.pop_front(), Some(1)),
        |fds| assert!(!fds.is_empty()),
    ];
    for question in harmless {
        assert!(!spoils(question, true));
    }

    // Results that would be different if more descriptors had come.
    let doubtful: [Question; 6] = [
        |fds| drop(fds.claim(3).unwrap_err()),
        |fds| {
            let _two = fds.claim(2);
            drop(fds.claim_one().unwrap_err());
        },
        |fds| while fds.pop_front().is_some() {},
        |fds| assert_eq!(fds.len(), 2),
        |fds| drop(fds.claim(2).map(|_| fds.is_empty())),
        |fds| drop(fds.take_all()),
    ];
    for question in doubtful {
        assert!(spoils(question, true) && !spoils(question, false));
    }

    let mut fds = FdQueue::<i32>::from_iter([1]);
    assert!(matches!(fds.claim(2), Err(Error::MissingFds { expected: 2, received: 1 })));
    fds.set_truncated();
    assert!(matches!(fds.claim(2), Err(Error::TruncatedControl)));
}

#[test]
fn a_long_message_of_unknown_length_is_not_moved_for_every_packet() {
    /// A codec that never finds the end of a message.
    struct Endless;
    impl Codec for Endless {}
    impl Decoder<u32> for Endless {
        type Item = ();
        type Error = Error;
        fn decode(&mut self, _: &mut BytesMut, _: &mut FdQueue<u32>) -> Result<Option<()>, Error> {
            Ok(None)
        }
    }
    let mut inbound = Inbound::new(true, BytesMut::new(), FdQueue::new());
    let mut moves = 0;
    for _ in 0..1000 {
        let before = inbound.bytes.as_ptr();
        assert!(matches!(inbound.next(&mut Endless), Ok(Step::Receive)));
        inbound.make_room(&Endless, BytesMut::new);
        moves += usize::from(inbound.bytes.as_ptr() != before);
        inbound.bytes.extend_from_slice(&[0; SMALL_PACKET]);
        inbound.received();
    }
    assert!(moves < 20, "moved {moves} times");
}

#[test]
fn the_number_of_missing_bytes_of_a_frame_is_exact() {
    let codec = FrameCodec::default();
    let mut buf = SendBuf::<u32>::new();
    let frame = Frame::<u32> { payload: vec![7; 100].into(), fds: Default::default() };
    Encoder::encode(&mut codec.clone(), frame, &mut buf).unwrap();
    let (bytes, _) = buf.into_parts();
    assert_eq!(bytes.len(), 108);
    for received in 0..=bytes.len() {
        let missing = Decoder::<u32>::missing_bytes(&codec, &BytesMut::from(&bytes[..received]));
        assert_eq!(missing, (received >= 8).then_some(108 - received));
    }
    let more = BytesMut::from(&[&bytes[..], &bytes[..]].concat()[..]);
    assert_eq!(Decoder::<u32>::missing_bytes(&codec, &more), Some(0));
}

#[test]
fn room_for_a_packet_of_any_length_is_room_for_the_largest() {
    for packets in [false, true] {
        let mut codec = PacketCodec::new(Limits::default().max_payload_bytes(usize::MAX));
        let mut inbound = Inbound::<u32>::new(packets, BytesMut::new(), FdQueue::new());
        assert!(matches!(inbound.next(&mut codec), Ok(Step::Receive)));
        inbound.make_room(&codec, BytesMut::new);
        let room = inbound.bytes.capacity() - inbound.bytes.len();
        assert!((LARGEST_PACKET..2 * LARGEST_PACKET).contains(&room), "{room}");
    }
}

/// If the sender has not announced the length, it may put other frames into the same packet.
#[test]
fn room_for_the_rest_of_a_frame_is_room_for_a_small_packet() {
    let mut bytes = BytesMut::with_capacity(108);
    bytes.extend_from_slice(&[0xFD, 0x10, 0, 0, 0, 0, 0, 100]);
    let mut inbound = Inbound::<u32>::new(true, bytes, FdQueue::new());
    assert!(matches!(inbound.next(&mut FrameCodec::default()), Ok(Step::Receive)));
    inbound.make_room(&FrameCodec::default(), BytesMut::new);
    assert!(inbound.bytes.capacity() - inbound.bytes.len() >= SMALL_PACKET);
}
