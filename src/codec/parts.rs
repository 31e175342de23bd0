//! Tests of messages with several parts, and of the byte to which the descriptors of each part are
//! attached.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::{
    model::{Wire, carriers},
    *,
};
use crate::limits::SCM_MAX_FD;

/// Bytes and descriptors of a part.
type Part = (usize, usize);

fn parts() -> impl Strategy<Value = Vec<Part>> {
    let bytes = prop_oneof![6 => 0..4usize, 3 => 0..600usize, 1 => 0..100_000usize];
    let fds = prop_oneof![6 => 0..3usize, 2 => 200..600usize];
    prop::collection::vec((bytes, fds), 1..6)
}

/// The place of an accepted part in the bytes and descriptors of the connection.
#[derive(Debug, Clone, Copy)]
struct Placed {
    start: usize,
    end: usize,
    first_fd: usize,
    end_fd: usize,
}

/// A connection without a receiver. It records the content of each call.
struct Calls {
    outbound: SendBuf<u32>,
    wire: Wire,
    placed: Vec<Placed>,
    bytes: usize,
    fds: usize,
}

impl Calls {
    fn new(carrier: Carrier) -> Self {
        let wire = Wire { carrier, queue: VecDeque::new() };
        Self { outbound: SendBuf::new(), wire, placed: Vec::new(), bytes: 0, fds: 0 }
    }

    /// Encodes an item of these parts. Nothing is left of an item that is refused.
    fn encode(&mut self, parts: &[Part], announces: bool, grouping: Grouping) -> Result<(), Error> {
        let mut placed = Vec::new();
        let (mut bytes, mut fds) = (self.bytes, self.fds);
        for &(more_bytes, more_fds) in parts {
            if announces {
                self.outbound.announce_length(); // has no effect in the first part
            }
            self.outbound.put_shared(vec![7; more_bytes].into());
            self.outbound.put_fds((fds..fds + more_fds).map(|fd| fd as u32));
            self.outbound.end_part();
            placed.push(Placed {
                start: bytes,
                end: bytes + more_bytes,
                first_fd: fds,
                end_fd: fds + more_fds,
            });
            (bytes, fds) = (bytes + more_bytes, fds + more_fds);
        }
        let before = (self.bytes, self.fds);
        match self.outbound.commit(grouping) {
            Ok(()) => {
                self.placed.extend(placed);
                (self.bytes, self.fds) = (bytes, fds);
                Ok(())
            }
            Err(error) => {
                assert_eq!(self.outbound.roll_back().len(), fds - before.1);
                Err(error)
            }
        }
    }

    /// Sends everything that is left, and checks each call.
    fn check(mut self, grouping: Grouping) {
        while !self.outbound.is_empty() {
            self.wire.send(&mut self.outbound, 1.0);
        }

        // `start` and `first_fd` are the position of the call in everything that was sent.
        let (mut start, mut first_fd) = (0, 0);
        for call in &self.wire.queue {
            let (end, end_fd) = (start + call.bytes.len(), first_fd + call.fds.len());
            assert!(
                call.fds.iter().map(|&fd| fd as usize).eq(first_fd..end_fd),
                "descriptors keep their order"
            );
            for part in
                self.placed.iter().filter(|part| part.first_fd < end_fd && first_fd < part.end_fd)
            {
                // Some of this part's descriptors are in the call.
                assert!(start < part.end, "descriptors come after their part");
                if grouping != Grouping::Free {
                    assert!(part.start <= start, "descriptors come before their part");
                    assert!(
                        part.first_fd <= first_fd && end_fd <= part.end_fd,
                        "a call has descriptors of two parts"
                    );
                    assert!(
                        part.first_fd < first_fd || part.start == start,
                        "not on the part's first byte"
                    );
                }
            }

            // With `Grouping::Alone`, a call has bytes of one part only.
            let touched =
                self.placed.iter().filter(|part| part.start < end && start < part.end).count();
            assert!(grouping != Grouping::Alone || touched == 1, "a call to itself");
            (start, first_fd) = (end, end_fd);
        }
        assert_eq!((start, first_fd), (self.bytes, self.fds));
    }
}

fn groupings() -> impl Strategy<Value = Grouping> {
    prop_oneof![Just(Grouping::Free), Just(Grouping::FdsFirst), Just(Grouping::Alone)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn descriptors_ride_on_the_first_byte_of_their_own_part(
        carrier in carriers(),
        grouping in groupings(),
        announces: bool,
        items in prop::collection::vec((parts(), prop::option::of(0.0..1.0)), 1..12),
    ) {
        let mut calls = Calls::new(carrier);
        for (parts, short) in items {
            // A part that is a packet of its own can't be cut.
            let most_fds = match (grouping, carrier) {
                (Grouping::Alone, Carrier::Packets { .. }) => SCM_MAX_FD,
                _ => usize::MAX,
            };
            let parts: Vec<Part> =
                parts.into_iter().map(|(bytes, fds)| (bytes, fds.min(most_fds))).collect();
            let fits = parts.iter().all(|(bytes, fds)| *fds <= SCM_MAX_FD * bytes);
            prop_assert_eq!(calls.encode(&parts, announces, grouping).is_ok(), fits);
            if let Some(short) = short && !calls.outbound.is_empty() {
                calls.wire.send(&mut calls.outbound, short);
            }
        }
        calls.check(grouping);
    }
}

#[test]
fn an_item_of_several_parts_has_a_call_for_each_part_with_descriptors() {
    for (grouping, expected) in [
        (Grouping::Free, vec![(13, 3)]),
        (Grouping::FdsFirst, vec![(10, 0), (1, 1), (1, 1), (1, 1)]),
        (Grouping::Alone, vec![(10, 0), (1, 1), (1, 1), (1, 1)]),
    ] {
        let mut calls = Calls::new(Carrier::packets(212_992));
        calls.encode(&[(10, 0), (1, 1), (1, 1), (1, 1)], false, grouping).unwrap();
        while !calls.outbound.is_empty() {
            calls.wire.send(&mut calls.outbound, 1.0);
        }
        let sizes: Vec<_> =
            calls.wire.queue.iter().map(|call| (call.bytes.len(), call.fds.len())).collect();
        assert_eq!(sizes, expected, "{grouping:?}");
    }
}

#[test]
fn an_item_is_refused_if_one_of_its_parts_has_too_many_descriptors() {
    let mut calls = Calls::new(Carrier::Stream);
    calls.encode(&[(1, 1), (1, 0)], false, Grouping::FdsFirst).unwrap();
    for (parts, refused_fds, refused_bytes) in [
        (&[(100, 0), (1, 254), (100, 0)][..], 254, 1),
        (&[(100, 0), (0, 1)], 1, 0),
        (&[(0, 1), (100, 0)], 1, 0),
    ] {
        let error = calls.encode(parts, false, Grouping::FdsFirst).unwrap_err();
        assert!(matches!(
            error,
            Error::TooManyFdsForLength { fds, bytes }
                if (fds, bytes) == (refused_fds, refused_bytes)
        ));
        assert_eq!((calls.outbound.len(), calls.outbound.fd_count()), (2, 1));
    }
    // An empty part is ignored.
    calls.encode(&[(1, 1), (0, 0), (1, 1)], false, Grouping::FdsFirst).unwrap();
    calls.check(Grouping::FdsFirst);
}

#[test]
fn a_later_part_whose_length_is_known_goes_in_large_packets() {
    let packets = Carrier::Packets { small: 100, large: 100 << 10 };
    for (announces, expected) in [(false, 1 + (100_usize << 10).div_ceil(100)), (true, 2)] {
        let mut calls = Calls::new(packets);
        calls.encode(&[(8, 1), (100 << 10, 1)], announces, Grouping::FdsFirst).unwrap();
        while !calls.outbound.is_empty() {
            calls.wire.send(&mut calls.outbound, 1.0);
        }
        assert_eq!(calls.wire.queue.len(), expected, "announced: {announces}");
    }
}

#[test]
fn parts_of_a_message_that_failed_are_not_those_of_the_next() {
    let mut buf = SendBuf::<i32>::new();
    buf.put_slice(b"one");
    buf.put_fd(1);
    buf.end_part();
    buf.put_slice(b"two");
    buf.put_fd(2);
    assert_eq!(buf.roll_back(), [1, 2]);
    buf.put_slice(b"three");
    buf.put_fd(3);
    buf.commit(Grouping::FdsFirst).unwrap();
    assert_eq!(buf.plan(Carrier::Stream), Plan { bytes: 5, fds: 1 });
}

/// Without descriptors, all parts share a call.
#[test]
fn parts_without_descriptors_share_a_call() {
    let mut buf = SendBuf::<i32>::new();
    for _ in 0..100 {
        buf.put_slice(b"one");
        buf.end_part();
        buf.put_slice(b"two");
        buf.commit(Grouping::FdsFirst).unwrap();
    }
    // The next message starts without parts.
    buf.put_slice(b"three");
    buf.put_fd(1);
    buf.commit(Grouping::FdsFirst).unwrap();
    let plan = buf.plan(Carrier::Stream);
    assert_eq!(plan, Plan { bytes: 600, fds: 0 });
    drop(buf.sent(plan, 600));
    assert_eq!(buf.plan(Carrier::Stream), Plan { bytes: 5, fds: 1 });
}
