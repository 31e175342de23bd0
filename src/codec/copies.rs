//! Tests of the number of bytes of a frame that this process copies. Copies are recognized by the
//! addresses of bytes. Those that the kernel makes do not count.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use super::*;
use crate::frame::Frame;

const KIB: usize = 1 << 10;

/// A connection whose kernel takes whole packets, and a limited number of bytes of a stream.
struct Copies {
    carrier: Carrier,
    outbound: SendBuf<u32>,
    inbound: Inbound<u32>,
    /// The bytes that were sent from another place than the frame's payload.
    out: usize,
    /// The bytes that were moved after they had been received.
    moved: usize,
}

fn place(bytes: &[u8]) -> Range<usize> {
    bytes.as_ptr().addr()..bytes.as_ptr().addr() + bytes.len()
}

impl Copies {
    const STREAM_CALL: usize = 200 * KIB;

    fn new(carrier: Carrier) -> Self {
        let inbound = Inbound::new(carrier != Carrier::Stream, BytesMut::new(), FdQueue::new());
        Self { carrier, outbound: SendBuf::new(), inbound, out: 0, moved: 0 }
    }

    /// Delivers everything that is sent, and keeps no frame.
    fn batch(&mut self, payload: &Bytes, frames: usize) {
        // Queue the frames.
        let mut codec = FrameCodec::default();
        for _ in 0..frames {
            codec
                .encode(Frame::<u32>::from_parts(payload.clone(), None), &mut self.outbound)
                .unwrap();
            self.outbound.commit(Grouping::Free).unwrap();
        }

        // Send them, call by call. A slice outside of the payload is a copy.
        let mut received = 0;
        while !self.outbound.is_empty() {
            let plan = self.outbound.plan(self.carrier);
            let taken = if self.carrier == Carrier::Stream {
                plan.bytes.min(Self::STREAM_CALL)
            } else {
                plan.bytes
            };
            let shared = place(payload);
            let mut call = Vec::with_capacity(taken);
            for slice in self.outbound.io_slices(taken) {
                self.out += if shared.contains(&slice.as_ptr().addr()) { 0 } else { slice.len() };
                call.extend_from_slice(&slice);
            }
            drop(self.outbound.sent(plan, taken));

            // Receive the bytes of the call.
            let mut call = &call[..];
            while !call.is_empty() {
                received += self.decode(&mut codec);
                let room = self.make_room(&codec);
                let (now, rest) = call.split_at(room.min(call.len()));
                assert!(
                    rest.is_empty() || self.carrier == Carrier::Stream,
                    "a packet would be cut"
                );
                self.inbound.bytes.put_slice(now);
                self.inbound.received();
                call = rest;
            }
        }
        received += self.decode(&mut codec);
        assert_eq!(received, frames);
    }

    fn make_room(&mut self, codec: &FrameCodec) -> usize {
        let before = place(&self.inbound.bytes);
        let most = self.inbound.make_room(codec, BytesMut::new);
        let after = place(&self.inbound.bytes);
        self.moved += if after.end == before.end { 0 } else { after.len() };
        most.min(self.inbound.bytes.capacity() - self.inbound.bytes.len())
    }

    /// Takes all complete frames.
    fn decode(&mut self, codec: &mut FrameCodec) -> usize {
        let mut frames = 0;
        loop {
            let before = place(&self.inbound.bytes);
            match self.inbound.next(codec).unwrap() {
                Step::Item(Frame { payload, .. }) => {
                    frames += 1;
                    self.moved +=
                        if before.contains(&payload.as_ptr().addr()) { 0 } else { payload.len() };
                }
                Step::Receive => return frames,
                Step::End => unreachable!("there is no end"),
            }
        }
    }
}

#[test]
fn frames_are_copied_when_they_are_small_and_only_then() {
    // Packets of the default send buffer, and of one for bulk.
    let carriers = [
        ("stream", Carrier::Stream),
        ("packets", Carrier::packets(212_992)),
        ("bulk", Carrier::packets(4 << 20)),
    ];
    for (name, carrier) in carriers {
        // The size, the frames in a batch, and the most bytes copied for each frame when it is sent
        // and when it is received.
        for (size, batch, most_out, most_in) in [
            (64, 64, 72, 8),
            (4 * KIB, 64, 8, 512),
            (64 * KIB, 4, 8, 32 * KIB),
            (1024 * KIB, 1, 8, 128 * KIB),
        ] {
            const BATCHES: usize = 100;
            let payload = Bytes::from(vec![7; size]);
            let mut copies = Copies::new(carrier);
            (0..BATCHES).for_each(|_| copies.batch(&payload, batch));
            let (out, moved) = (copies.out / (BATCHES * batch), copies.moved / (BATCHES * batch));
            println!(
                "{size} bytes, {name}: {out} bytes copied on the way out, {moved} on the way in"
            );
            assert!(out <= most_out, "{out} bytes of {size} are copied on the way out, {name}");
            assert!(moved <= most_in, "{moved} bytes of {size} are copied on the way in, {name}");
        }
    }
}
