//! Example tests of sending. [`model`](super::model) has property tests of the same rules.

use super::{buffers::SMALL_PACKET, model::Connection, *};
use crate::{frame::Frame, limits::SCM_MAX_FD};

/// Sends `frames` whole. Returns the number of bytes and descriptors of each call.
fn each_call(
    carrier: Carrier,
    grouping: Grouping,
    frames: impl IntoIterator<Item = Frame<u32>>,
) -> Vec<(usize, usize)> {
    let mut connection = Connection::new(carrier, grouping);
    for frame in frames {
        connection.encode(frame).unwrap();
    }
    while !connection.outbound.is_empty() {
        connection.wire.send(&mut connection.outbound, 1.0);
    }
    connection.wire.queue.iter().map(|chunk| (chunk.bytes.len(), chunk.fds.len())).collect()
}

fn calls(carrier: Carrier, frames: impl IntoIterator<Item = Frame<u32>>) -> usize {
    each_call(carrier, Grouping::Free, frames).len()
}

fn frame(payload: usize, fds: u32) -> Frame<u32> {
    Frame { payload: vec![7; payload].into(), fds: (0..fds).collect() }
}

const PACKETS: Carrier = Carrier::Packets { small: SMALL_PACKET, large: 196_608 };

#[test]
fn waiting_frames_go_out_in_one_call() {
    for carrier in [Carrier::Stream, PACKETS] {
        assert_eq!(calls(carrier, (0..64).map(|_| frame(64, 1))), 1);
        assert_eq!(calls(carrier, (0..64).map(|_| frame(0, 0))), 1);
    }
}

#[test]
fn codecs_choose_how_messages_share_calls() {
    for carrier in [Carrier::Stream, PACKETS] {
        let frames =
            || [frame(0, 0), frame(0, 2), frame(0, 0), frame(0, 1), frame(0, 254), frame(0, 0)];
        assert_eq!(each_call(carrier, Grouping::Free, frames()), [(39, 253), (9, 4)]);
        assert_eq!(
            each_call(carrier, Grouping::FdsFirst, frames()),
            [(8, 0), (16, 2), (8, 1), (7, 253), (9, 1)],
            "a message with descriptors begins a call"
        );
        assert_eq!(
            each_call(carrier, Grouping::Alone, frames()[..4].to_vec()),
            [(8, 0), (8, 2), (8, 0), (8, 1)],
            "a message has a call to itself"
        );
    }
    assert_eq!(
        each_call(PACKETS, Grouping::Alone, [frame(100_000, 1), frame(1, 0)]),
        [(100_008, 1), (9, 0)]
    );
}

#[test]
fn a_codec_that_does_not_ask_is_safe_for_any_receiver_of_a_stream() {
    struct Silent;
    impl Codec for Silent {}
    assert_eq!(Silent.grouping(), Grouping::FdsFirst);
    assert_eq!(FrameCodec::default().grouping(), Grouping::Free);
    assert_eq!(PayloadCodec::new(FrameCodec::default(), ()).grouping(), Grouping::Free);
    assert_eq!(PacketCodec::default().grouping(), Grouping::Alone);
}

/// After a change of codec, messages of both groupings wait.
#[test]
fn messages_without_descriptors_share_calls_with_those_of_another_grouping() {
    let mut buf = SendBuf::<i32>::new();
    for grouping in [Grouping::FdsFirst, Grouping::Free, Grouping::FdsFirst] {
        for fds in [0, 0, 1] {
            buf.put_slice(b"text");
            buf.put_fds(0..fds);
            buf.commit(grouping).unwrap();
        }
    }
    let mut calls = Vec::new();
    while !buf.is_empty() {
        let plan = buf.plan(Carrier::Stream);
        calls.push((plan.bytes, plan.fds));
        drop(buf.sent(plan, plan.bytes));
    }
    // No descriptor comes with an earlier message that was encoded for a receiver that can't handle
    // it.
    assert_eq!(calls, [(8, 0), (12, 1), (12, 1), (4, 1)]);
}

/// The strictest message of a call decides, not the first one.
#[test]
fn no_descriptor_comes_early_in_a_call_with_a_message_that_has_to_be_kept_apart() {
    let mut buf = SendBuf::<i32>::new();
    for (grouping, fds) in [(Grouping::Free, 0), (Grouping::FdsFirst, 0), (Grouping::Free, 1)] {
        buf.put_slice(b"text");
        buf.put_fds(0..fds);
        buf.commit(grouping).unwrap();
    }
    let plan = buf.plan(Carrier::Stream);
    assert_eq!(plan, Plan { bytes: 8, fds: 0 });
    drop(buf.sent(plan, plan.bytes));
    assert_eq!(buf.plan(Carrier::Stream), Plan { bytes: 4, fds: 1 });
}

#[test]
fn a_message_that_has_to_fit_a_packet_and_does_not_is_refused() {
    let mut buf = SendBuf::<i32>::new();
    buf.set_max_packet_bytes(Some(196_608));
    buf.put_slice(&[0; 196_609]);
    assert!(matches!(
        buf.commit(Grouping::Alone),
        Err(Error::FrameTooLong { bytes: 196_609, limit: 196_608 })
    ));
    buf.roll_back();
    buf.put_slice(b"two");
    buf.put_fds(0..254);
    assert!(matches!(buf.commit(Grouping::Alone), Err(Error::TooManyFds { fds: 254, limit: 253 })));
    assert_eq!(buf.roll_back().len(), 254);
    assert!(buf.is_empty());
}

/// The example in the documentation of `plan`.
#[test]
fn a_message_with_more_descriptors_than_are_left_is_cut() {
    let waiting = || {
        let mut buf = SendBuf::<u32>::new();
        for (bytes, fds) in [(10, 2u32), (8, 300), (20, 1)] {
            buf.put_slice(&vec![7; bytes]);
            buf.put_fds(0..fds);
            buf.commit(Grouping::Free).unwrap();
        }
        buf
    };
    for (taken, next) in [(17, Plan { bytes: 21, fds: 50 }), (5, Plan { bytes: 12, fds: 2 })] {
        let mut buf = waiting();
        let plan = buf.plan(Carrier::Stream);
        assert_eq!(plan, Plan { bytes: 17, fds: 253 });
        assert_eq!(buf.sent(plan, taken).count(), 253);
        assert_eq!(buf.plan(Carrier::Stream), next, "after {taken} bytes");
    }
    let packets = |send_buffer_bytes| {
        let calls =
            each_call(Carrier::packets(send_buffer_bytes), Grouping::Free, [frame(102_400, 0)]);
        Vec::from_iter(calls.into_iter().map(|(bytes, _)| bytes))
    };
    assert_eq!(packets(1 << 20), [8, 102_400]);
    assert_eq!(packets(212_992), [65_600, 36_808]);
}

#[test]
fn more_than_253_descriptors_take_more_calls() {
    for carrier in [Carrier::Stream, PACKETS] {
        assert_eq!(calls(carrier, [frame(0, 253)]), 1);
        assert_eq!(calls(carrier, [frame(0, 254)]), 2);
        assert_eq!(calls(carrier, [frame(0, 2024)]), 8);
        assert_eq!(calls(carrier, [frame(100, 1000), frame(100, 1000)]), 8);
    }
}

#[test]
fn the_rest_of_a_large_frame_goes_in_large_packets() {
    assert_eq!(calls(PACKETS, [frame(SMALL_PACKET - 8, 0)]), 1);
    assert_eq!(calls(PACKETS, [frame(SMALL_PACKET - 7, 0)]), 2);
    assert_eq!(calls(PACKETS, [frame(SMALL_PACKET + 196_608 - 8, 0)]), 2);
    assert_eq!(
        calls(PACKETS, [frame(1 << 20, 0)]),
        1 + ((1 << 20) + 8 - SMALL_PACKET).div_ceil(196_608)
    );
}

/// A receiver in another language may have room for the rest of the frame only.
#[test]
fn the_rest_of_a_long_frame_has_a_packet_to_itself() {
    let mut connection = Connection::new(Carrier::packets(212_992), Grouping::Free);
    connection.encode(frame(75_600, 0)).unwrap();
    connection.wire.send(&mut connection.outbound, 1.0);
    connection.encode(frame(1, 0)).unwrap();
    connection.encode(frame(1, 0)).unwrap();
    while !connection.outbound.is_empty() {
        connection.wire.send(&mut connection.outbound, 1.0);
    }
    let packets = Vec::from_iter(connection.wire.queue.iter().map(|packet| packet.bytes.len()));
    assert_eq!(packets, [SMALL_PACKET, 10_008, 18]);
}

#[test]
fn packets_get_smaller_without_memory_and_larger_again_with_it() {
    let full = Carrier::packets(1 << 20);
    assert_eq!(full, Carrier::Packets { small: SMALL_PACKET, large: 262_144 });
    let scarce = full.smaller_than(20_000).smaller_than(10_000);
    assert_eq!(scarce, Carrier::Packets { small: 5000, large: 5000 });
    assert_eq!(scarce.larger(full), Carrier::Packets { small: 10_000, large: 10_000 });
    assert_eq!((0..6).fold(scarce, |carrier, _| carrier.larger(full)), full);
    assert_eq!(scarce.smaller_than(1), Carrier::Packets { small: 2048, large: 2048 });
    assert_eq!(Carrier::Stream.smaller_than(1), Carrier::Stream);
}

#[test]
fn a_frame_that_fits_a_packet_is_not_cut() {
    // The second does not fit beside the first, and would leave a packet of a few bytes.
    assert_eq!(calls(PACKETS, [frame(40_000, 0), frame(40_000, 0), frame(20_000, 0)]), 2);
}

#[test]
fn more_pieces_than_iov_max_take_more_calls() {
    assert_eq!(calls(Carrier::Stream, (0..512).map(|_| frame(4096, 0))), 1);
    assert_eq!(calls(Carrier::Stream, (0..513).map(|_| frame(4096, 1))), 3);
}

#[test]
fn a_message_in_any_number_of_pieces_goes_in_one_call() {
    for grouping in [Grouping::Free, Grouping::Alone] {
        let mut buf = SendBuf::<u32>::new();
        (0..1100).for_each(|_| {
            buf.put_slice(b"-");
            buf.put_shared(vec![0; 2048].into());
        });
        buf.commit(grouping).unwrap();
        let plan = buf.plan(Carrier::Stream);
        assert_eq!(plan.bytes, 1100 * 2049);
        assert!(buf.io_slices(plan.bytes).len() <= 1024);
    }
}

#[test]
fn descriptors_do_not_run_far_ahead_of_short_writes() {
    let mut connection = Connection::new(Carrier::Stream, Grouping::Free);
    for _ in 0..1000 {
        connection.encode(frame(10, 10)).unwrap();
    }
    // Each write takes one byte: without the rule, 1,000 writes would carry 10,000 descriptors.
    let mut sent_fds = 0;
    for sent_bytes in 1..1000 {
        connection.wire.send(&mut connection.outbound, 0.0);
        sent_fds += connection.wire.queue.back().unwrap().fds.len();
        let begun = usize::div_ceil(sent_bytes, 18);
        assert!(sent_fds <= begun * 10 + SCM_MAX_FD);
    }
}

#[test]
fn an_encoder_that_fails_leaves_nothing_behind() {
    let mut buf = SendBuf::<i32>::new();
    buf.put_slice(b"whole");
    buf.put_fd(1);
    buf.commit(Grouping::Free).unwrap();

    buf.put_slice(b"part");
    buf.put_shared(vec![0; 10_000].into());
    buf.put_slice(b"more");
    buf.put_fds([2, 3]);
    assert_eq!(buf.roll_back(), [2, 3]);

    assert_eq!((buf.len(), buf.fd_count()), (5, 1));
    assert_eq!(buf.plan(Carrier::Stream), Plan { bytes: 5, fds: 1 });
    let (bytes, fds) = buf.into_parts();
    assert_eq!((&bytes[..], &fds[..]), (&b"whole"[..], &[1][..]));
}

#[test]
fn descriptors_without_bytes_to_ride_on_are_refused() {
    let mut buf = SendBuf::<i32>::new();
    buf.put_fd(1);
    assert!(matches!(
        buf.commit(Grouping::Free),
        Err(Error::TooManyFdsForLength { fds: 1, bytes: 0 })
    ));
    assert_eq!(buf.roll_back(), [1]);
}

/// Encoders of other crates write in this way.
#[test]
fn bytes_are_written_as_to_any_other_buffer() {
    use bytes::BufMut;
    let mut buf = SendBuf::<i32>::new();
    buf.put_u8(1);
    buf.put_shared(vec![2; 5000].into());
    buf.put_u16(0x0304);
    buf.put_bytes(5, 3);
    BufMut::put(&mut buf, &b"six"[..]);
    let room = buf.chunk_mut().len();
    // Written and not advanced over: not a part of it.
    buf.chunk_mut().copy_from_slice(&vec![7; room]);
    assert_eq!(buf.len(), 1 + 5000 + 2 + 3 + 3);
    buf.commit(Grouping::FdsFirst).unwrap();
    let expected = [&[1][..], &[2; 5000], &[3, 4, 5, 5, 5], b"six"].concat();
    assert_eq!(&buf.into_parts().0[..], expected);
}

#[test]
fn a_refused_frame_comes_back() {
    let mut codec = FrameCodec::new(Limits::default().max_payload_bytes(10).max_fds_per_frame(2));
    for refused in [frame(11, 1), frame(1, 3)] {
        let mut buf = SendBuf::<u32>::new();
        let error = codec.encode(refused.clone(), &mut buf).unwrap_err();
        assert_eq!(error.item, Some(refused));
        assert!(buf.is_empty());
    }
}
