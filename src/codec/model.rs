//! Property tests of the wire format: random frames go through a model of the kernel's two kinds of
//! socket, with integers for descriptors.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::{buffers::SMALL_PACKET, *};
use crate::{frame::Frame, limits::SCM_MAX_FD};

/// The bytes and descriptors of one `sendmsg` in the queue of a socket.
pub(super) struct Chunk {
    pub(super) bytes: VecDeque<u8>,
    /// The descriptors, which are attached to the first byte.
    pub(super) fds: Vec<u32>,
}

/// A model of the kernel: one direction of two connected sockets.
pub(super) struct Wire {
    pub(super) carrier: Carrier,
    pub(super) queue: VecDeque<Chunk>,
}

impl Wire {
    /// Models a `sendmsg` of which the kernel takes only part of the bytes, but all descriptors. A
    /// packet is taken whole.
    pub(super) fn send(&mut self, buf: &mut SendBuf<u32>, short: f64) {
        let plan = buf.plan(self.carrier);
        assert!(plan.bytes > 0, "no progress");
        assert!(plan.fds <= SCM_MAX_FD, "the kernel takes 253");
        let bytes: Vec<u8> =
            buf.io_slices(plan.bytes).iter().flat_map(|slice| slice.to_vec()).collect();
        assert_eq!(bytes.len(), plan.bytes);
        assert!(buf.io_slices(plan.bytes).len() <= 1024, "IOV_MAX");
        let taken = match self.carrier {
            Carrier::Stream => (plan.bytes as f64 * short) as usize,
            Carrier::Packets { .. } => plan.bytes,
        };
        let taken = taken.clamp(1, plan.bytes);
        let fds = buf.first_fds(plan.fds).copied().collect();
        self.queue.push_back(Chunk { bytes: bytes[..taken].iter().copied().collect(), fds });
        drop(buf.sent(plan, taken));
    }

    /// Models a `recvmsg`. It never returns descriptors of two sends. On a stream, it reads on from
    /// bytes without descriptors into bytes with descriptors, and then stops.
    fn recv(&mut self, inbound: &mut Inbound<u32>, codec: &FrameCodec, most: usize) {
        let most = most.min(inbound.make_room(codec, BytesMut::new));
        let room = inbound.bytes.capacity() - inbound.bytes.len();
        assert!(room > 0, "no room");

        // A packet is received whole. A stream is read up to the next descriptors.
        if let Carrier::Packets { .. } = self.carrier {
            let packet = self.queue.pop_front().unwrap();
            assert!(
                packet.bytes.len() <= room,
                "packet of {} truncated to {room}",
                packet.bytes.len()
            );
            inbound.bytes.extend(packet.bytes);
            inbound.fds.extend(packet.fds);
        } else {
            let mut left = room.min(most);
            while left > 0
                && let Some(chunk) = self.queue.front_mut()
            {
                let barrier = !chunk.fds.is_empty();
                let taken = left.min(chunk.bytes.len());
                inbound.bytes.extend(chunk.bytes.drain(..taken));
                inbound.fds.extend(chunk.fds.drain(..));
                left -= taken;
                if chunk.bytes.is_empty() {
                    self.queue.pop_front();
                }
                if barrier {
                    break;
                }
            }
        }
        inbound.received();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Encode { payload: usize, fds: usize, later: bool, parts: usize },
    Send { short: f64 },
    Receive { most: usize },
}

const MAX_FDS: usize = 3000;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let payload = prop_oneof![6 => 0..40usize, 3 => 0..5000usize, 1 => 0..300_000usize];
    let fds = prop_oneof![6 => 0..3usize, 3 => 200..600usize, 1 => 0..=MAX_FDS];
    let op = prop_oneof![
        (payload, fds, any::<bool>(), 1..4usize)
            .prop_map(|(payload, fds, later, parts)| Op::Encode { payload, fds, later, parts }),
        prop_oneof![1 => Just(0.0), 2 => Just(1.0), 2 => 0.0..1.0]
            .prop_map(|short| Op::Send { short }),
        prop_oneof![1 => 1..20usize, 1 => 1..100_000usize].prop_map(|most| Op::Receive { most }),
    ];
    prop::collection::vec(op, 1..80)
}

pub(super) fn carriers() -> impl Strategy<Value = Carrier> {
    let packets = (1..=SMALL_PACKET, 0..400_000usize)
        .prop_map(|(small, more)| Carrier::Packets { small, large: small + more });
    prop_oneof![Just(Carrier::Stream), packets]
}

/// A connection: sender, kernel and receiver.
pub(super) struct Connection {
    codec: FrameCodec,
    /// True if the sender announces lengths.
    announces: bool,
    grouping: Grouping,
    pub(super) outbound: SendBuf<u32>,
    /// Messages to be appended to `outbound`, in any state of it.
    later: SendBuf<u32>,
    pub(super) wire: Wire,
    inbound: Inbound<u32>,
    received: Vec<Frame<u32>>,
}

impl Connection {
    pub(super) fn new(carrier: Carrier, grouping: Grouping) -> Self {
        Self {
            grouping,
            announces: true,
            codec: FrameCodec::new(Limits::default().max_fds_per_frame(MAX_FDS)),
            outbound: SendBuf::new(),
            later: SendBuf::new(),
            wire: Wire { carrier, queue: VecDeque::new() },
            inbound: Inbound::new(carrier != Carrier::Stream, BytesMut::new(), FdQueue::new()),
            received: Vec::new(),
        }
    }

    pub(super) fn encode(&mut self, frame: Frame<u32>) -> Result<(), Error> {
        self.outbound.append(&mut self.later);
        encode(&mut self.outbound, &mut self.codec, frame, self.announces, self.grouping)
    }

    /// Encodes a frame of several parts. Each part after the first has one byte and a share of the
    /// descriptors.
    fn encode_parts(&mut self, frame: Frame<u32>, parts: usize, later: bool) -> Result<(), Error> {
        let Self { codec, outbound, later: later_buf, .. } = self;
        if !later {
            outbound.append(later_buf);
        }
        let buf = if later { later_buf } else { outbound };
        let mut whole = SendBuf::<u32>::new();
        codec.encode(frame, &mut whole)?;
        let (bytes, fds) = whole.into_parts();
        let (first, rest) = bytes.split_at(bytes.len() - (parts - 1));
        let mut shares = fds.chunks(fds.len().div_ceil(parts).max(1));
        buf.put_slice(&first[..8]);
        if self.announces {
            buf.announce_length();
        }
        buf.put_slice(&first[8..]);
        buf.put_fds(shares.next().unwrap_or_default().iter().copied());
        for byte in rest {
            buf.end_part();
            if self.announces {
                buf.announce_length();
            }
            buf.put_slice(&[*byte]);
            buf.put_fds(shares.next().unwrap_or_default().iter().copied());
        }
        buf.commit(self.grouping).inspect_err(|_| drop(buf.roll_back()))
    }

    fn encode_later(&mut self, frame: Frame<u32>) -> Result<(), Error> {
        encode(&mut self.later, &mut self.codec, frame, self.announces, self.grouping)
    }

    /// Decodes all complete messages. Returns true if bytes can be received.
    fn decode(&mut self) -> Result<bool, Error> {
        loop {
            match self.inbound.next(&mut self.codec)? {
                Step::Item(frame) => self.received.push(frame),
                Step::Receive => return Ok(true),
                Step::End => return Ok(false),
            }
        }
    }

    fn receive(&mut self, most: usize) -> Result<(), Error> {
        assert!(self.decode()?);
        if !self.wire.queue.is_empty() {
            self.wire.recv(&mut self.inbound, &self.codec, most);
            let bound = MAX_FDS + SCM_MAX_FD;
            assert!(
                self.inbound.fds.len() <= bound,
                "{} descriptors wait, over {bound}",
                self.inbound.fds.len()
            );
        }
        Ok(())
    }

    /// Delivers everything that is queued.
    fn settle(&mut self) -> Result<(), Error> {
        self.outbound.append(&mut self.later);
        loop {
            if !self.outbound.is_empty() {
                self.wire.send(&mut self.outbound, 1.0);
            } else if self.wire.queue.is_empty() {
                self.decode()?;
                return Ok(());
            }
            self.receive(usize::MAX)?;
        }
    }
}

/// Encodes one message. If that fails, nothing of it is left in the buffer.
fn encode(
    buf: &mut SendBuf<u32>,
    codec: &mut FrameCodec,
    frame: Frame<u32>,
    announces: bool,
    grouping: Grouping,
) -> Result<(), Error> {
    codec.encode(frame, buf)?;
    if !announces {
        buf.withdraw_announcements();
    }
    buf.commit(grouping).inspect_err(|_| drop(buf.roll_back()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_frame_arrives_once_with_its_own_descriptors(
        carrier in carriers(),
        grouping in prop_oneof![Just(Grouping::Free), Just(Grouping::FdsFirst)],
        announces: bool,
        ops in ops(),
    ) {
        let mut connection = Connection::new(carrier, grouping);
        connection.announces = announces;
        let mut sent = Vec::new();
        let mut fd_numbers = 0..;
        for op in ops {
            match op {
                Op::Encode { payload, fds, later, parts } => {
                    let payload = Bytes::from_iter((0..payload).map(|i| (i + sent.len()) as u8));
                    let frame = Frame { payload, fds: fd_numbers.by_ref().take(fds).collect() };
                    let parts = parts.min(1 + frame.payload.len());
                    // A frame of few bytes with too many descriptors is refused as a whole,
                    // whichever part has them.
                    let mut fits = fds <= SCM_MAX_FD * (8 + frame.payload.len());
                    let share = fds.div_ceil(parts);
                    fits &= parts == 1 || share.min(fds - share) <= SCM_MAX_FD;
                    let encoded = match later {
                        _ if parts > 1 => connection.encode_parts(frame.clone(), parts, later),
                        true => connection.encode_later(frame.clone()),
                        false => connection.encode(frame.clone()),
                    };
                    prop_assert_eq!(encoded.is_ok(), fits);
                    if fits {
                        sent.push(frame);
                    }
                }
                Op::Send { .. } if connection.outbound.is_empty() => {}
                Op::Send { short } => connection.wire.send(&mut connection.outbound, short),
                Op::Receive { most } => connection.receive(most).unwrap(),
            }
        }
        connection.settle().unwrap();
        prop_assert_eq!(connection.outbound.fd_count(), 0);
        prop_assert!(connection.received == sent);

        connection.inbound.end_of_stream();
        prop_assert!(!connection.decode().unwrap());
        prop_assert_eq!(connection.inbound.fds.len(), 0);
    }

    /// Every byte and descriptor of a message was sent, or is still in the buffer.
    #[test]
    fn what_was_not_sent_can_be_taken_out(ops in ops()) {
        let mut connection = Connection::new(Carrier::Stream, Grouping::Free);
        let (mut bytes, mut fds) = (0, 0);
        for op in ops {
            match op {
                Op::Encode { payload, fds: count, later, .. }
                    if count <= SCM_MAX_FD * (8 + payload) =>
                {
                    bytes += 8 + payload;
                    fds += count;
                    let fds = (0..count as u32).collect();
                    let frame = Frame { payload: vec![0; payload].into(), fds };
                    match later {
                        true => connection.encode_later(frame).unwrap(),
                        false => connection.encode(frame).unwrap(),
                    }
                }
                Op::Send { short } if !connection.outbound.is_empty() => {
                    connection.wire.send(&mut connection.outbound, short);
                }
                _ => {}
            }
        }
        connection.outbound.append(&mut connection.later);
        prop_assert!(connection.later.is_empty() && connection.later.fd_count() == 0);
        let on_the_wire = connection.wire.queue;
        let (unsent_bytes, unsent_fds) = connection.outbound.into_parts();
        let sent_bytes: usize = on_the_wire.iter().map(|chunk| chunk.bytes.len()).sum();
        let sent_fds: usize = on_the_wire.iter().map(|chunk| chunk.fds.len()).sum();
        prop_assert_eq!(unsent_bytes.len() + sent_bytes, bytes);
        prop_assert_eq!(unsent_fds.len() + sent_fds, fds);
    }

    /// Random bytes from a peer are an error or frames. They never cause a panic, and never take
    /// more room than the limit allows.
    #[test]
    fn any_bytes_are_frames_or_an_error(
        chunks in
            prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), 0..5u32), 0..20),
        header in prop::option::of((0..5u16, 0..100u32)),
    ) {
        let limits = Limits::default().max_payload_bytes(64).max_fds_per_frame(3).max_queued_fds(6);
        let mut codec = FrameCodec::new(limits);
        let mut inbound = Inbound::new(false, BytesMut::new(), FdQueue::new());
        // Random bytes are rarely a header, so some streams begin with one.
        if let Some((fds, bytes)) = header {
            inbound.bytes.extend_from_slice(&[0xFD, 0x10]);
            inbound.bytes.extend_from_slice(&fds.to_be_bytes());
            inbound.bytes.extend_from_slice(&bytes.to_be_bytes());
        }
        // Receive each part, and decode all frames that are complete.
        for (bytes, fds) in chunks {
            inbound.bytes.extend_from_slice(&bytes);
            inbound.fds.extend(0..fds);
            inbound.received();
            loop {
                match inbound.next(&mut codec) {
                    Ok(Step::Item(frame)) => {
                        prop_assert!(frame.payload.len() <= 64 && frame.fds.len() <= 3);
                    }
                    Ok(Step::Receive) => {
                        inbound.make_room(&codec, BytesMut::new);
                        break;
                    }
                    Ok(Step::End) => return Ok(()),
                    Err(_) => prop_assert!(matches!(inbound.next(&mut codec), Ok(Step::End))),
                }
            }
            prop_assert!(inbound.bytes.capacity() <= 8 * SMALL_PACKET);
            prop_assert!(inbound.fds.len() <= 6);
        }
    }
}
