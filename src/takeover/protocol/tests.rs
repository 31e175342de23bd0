//! Tests of the messages as bytes.

use bytes::BytesMut;
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::{
    Error, Frame,
    address::tests::any_address,
    codec::{
        Decoder, FdQueue,
        by_hand::{encoded, frame},
    },
};

prop_compose! {
    fn offered()(
        name: String,
        numbers: (u32, u16, u64),
        family in select(&[Family::Unix, Family::Ipv4, Family::Ipv6][..]),
        kind in select(&[Kind::Stream, Kind::Datagram, Kind::SeqPacket][..]),
        address in any_address(),
        device in option::of("[a-z0-9]{1,15}"),
        v6_only: Option<bool>,
        path_id: Option<(u64, u64)>,
        fd: u32,
    ) -> Offered<u32> {
        let (index, protocol, cookie) = numbers;
        let identity = Identity { name, index, family, kind, protocol, address, device, v6_only };
        Offered { identity, cookie, path_id, fd }
    }
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..300).prop_map(Bytes::from)
}

fn fds(fewest: usize) -> impl Strategy<Value = Fds<u32>> {
    vec(any::<u32>(), fewest..5).prop_map(Fds::from_iter)
}

fn to_taker() -> impl Strategy<Value = ToTaker<u32>> {
    prop_oneof![
        any::<(u8, u32)>().prop_map(|(version, listeners)| ToTaker::Welcome { version, listeners }),
        select(&Refusal::ALL[..]).prop_map(|reason| ToTaker::Refused { reason }),
        vec(offered(), 1..5).prop_map(ToTaker::Listeners),
        (bytes(), fds(0)).prop_map(|(bytes, fds)| ToTaker::State { bytes, fds }),
        (bytes(), fds(0)).prop_map(|(bytes, fds)| ToTaker::Workers { bytes, fds }),
        (any::<(u32, u32)>(), vec(any::<(u32, u32, u32)>(), 0..5)).prop_map(
            |((generation, giver), lanes)| {
                let lane = |(listener, generation, fd)| Lane { listener, generation, fd };
                ToTaker::Lanes { generation, giver, lanes: lanes.into_iter().map(lane).collect() }
            }
        ),
        Just(ToTaker::Complete),
        select(&AbortReason::ALL[..]).prop_map(|reason| ToTaker::Aborted { reason }),
        fds(1).prop_map(|fds| ToTaker::Locks { fds }),
        (bytes(), fds(0)).prop_map(|(baton, fds)| ToTaker::Commit { baton, fds }),
        Just(ToTaker::Resumed),
        Just(ToTaker::Drained),
        vec(any::<(u64, u32)>(), 1..5).prop_map(|generations| {
            let (replaced_for, fds): (_, Vec<u32>) = generations.into_iter().unzip();
            ToTaker::Generations { replaced_for, fds: fds.into_iter().collect() }
        }),
        (any::<(u32, bool)>(), vec(any::<(u32, u64)>(), 0..5)).prop_map(
            |((pid, takeover_in_progress), generations)| {
                ToTaker::Status { pid, takeover_in_progress, generations }
            }
        ),
    ]
}

fn from_taker() -> impl Strategy<Value = FromTaker> {
    prop_oneof![
        any::<(u8, u8)>().prop_map(|(lowest, highest)| FromTaker::Hello { lowest, highest }),
        any::<u32>().prop_map(|number| FromTaker::Decline { number }),
        Just(FromTaker::Ready),
        bytes().prop_map(|baton| FromTaker::HandBack { baton }),
        Just(FromTaker::Release),
        Just(FromTaker::Status),
    ]
}

/// Returns a frame with this payload and number of descriptors, as it was received.
fn received(payload: &[u8], fds: u16) -> (BytesMut, FdQueue<u32>) {
    (frame(payload, fds), (0..fds.into()).collect())
}

proptest! {
    #[test]
    fn every_message_of_a_giver_arrives_as_it_was(message in to_taker()) {
        let (mut bytes, fds) = encoded(GiverCodec::default(), message.clone());
        let mut fds = FdQueue::from_iter(fds);
        prop_assert_eq!(TakerCodec::default().decode(&mut bytes, &mut fds).unwrap(), Some(message));
        prop_assert!(bytes.is_empty() && fds.is_empty());
    }

    #[test]
    fn every_message_of_a_taker_arrives_as_it_was(message in from_taker()) {
        let (mut bytes, _) = encoded(TakerCodec::default(), message.clone());
        let decoded = GiverCodec::default().decode(&mut bytes, &mut FdQueue::<u32>::new());
        prop_assert_eq!(decoded.unwrap(), Some(message));
        prop_assert!(bytes.is_empty());
    }

    /// Rules: B-FIELDS.
    #[test]
    fn a_payload_that_is_cut_or_too_long_is_refused(
        message in to_taker(),
        cut: prop::sample::Index,
    ) {
        let Frame { payload, fds } = message.clone().into_frame().unwrap();
        // The last field of these has any length.
        let is_open = matches!(
            message,
            ToTaker::State { .. }
                | ToTaker::Workers { .. }
                | ToTaker::Commit { .. }
                | ToTaker::Status { .. }
        );
        if !is_open {
            let part = &payload[..cut.index(payload.len())];
            let (mut bytes, mut queue) = received(part, fds.len() as u16);
            // Whole listeners may be cut off; then descriptors are left over.
            prop_assert!(TakerCodec::default().decode(&mut bytes, &mut queue).is_err());
            let (mut bytes, mut queue) = received(&[&payload[..], &[0]].concat(), fds.len() as u16);
            prop_assert!(TakerCodec::default().decode(&mut bytes, &mut queue).is_err());
        }
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(payload in vec(any::<u8>(), 0..200), fds in 0u16..4) {
        let (mut bytes, mut queue) = received(&payload, fds);
        let _ = TakerCodec::default().decode(&mut bytes, &mut queue);
        let (mut bytes, mut queue) = received(&payload, 0);
        let _ = GiverCodec::default().decode(&mut bytes, &mut queue);
    }
}

/// Rules: B-FDS.
#[test]
fn descriptors_come_with_the_messages_that_have_them_only() {
    for payload in [&b"\x85"[..], b"\x81\x01\0\0\0\0", b"\x89", b"\x8A", b"\x86\x01"] {
        let (mut bytes, mut fds) = received(payload, 1);
        assert!(TakerCodec::default().decode(&mut bytes, &mut fds).is_err(), "{payload:?}");
        assert_eq!(fds.len(), 1, "the descriptor is left to be closed");
    }
    let (mut bytes, mut fds) = received(b"\x87", 0);
    assert!(TakerCodec::default().decode(&mut bytes, &mut fds).is_err(), "locks without one");
    let (mut bytes, mut fds) = received(b"\x03", 1);
    let refused = GiverCodec::default().decode(&mut bytes, &mut fds);
    assert!(matches!(refused, Err(Error::UnclaimedFds { fds: 1 })), "{refused:?}");
}

#[test]
fn a_hello_of_another_protocol_is_refused() {
    for hello in [&b"\x01FDHO\x01\x01"[..], b"\x01FDTO\x01", b"\x01FDTO\x01\x01\x01", b"", b"\x07"]
    {
        let (mut bytes, mut fds) = received(hello, 0);
        assert!(GiverCodec::default().decode(&mut bytes, &mut fds).is_err(), "{hello:?}");
    }
}

/// The documented bytes, so that a change of the format is noticed.
#[test]
fn a_listener_has_the_bytes_that_are_documented() {
    let identity = Identity {
        name: "http".to_owned(),
        index: 1,
        family: Family::Ipv4,
        kind: Kind::Stream,
        protocol: 6,
        address: Address::Ip("127.0.0.1:80".parse().unwrap()),
        device: Some("lo".to_owned()),
        v6_only: None,
    };
    let listener = Offered { identity, cookie: 7, path_id: Some((8, 9)), fd: 0u32 };
    let frame = ToTaker::Listeners(vec![listener]).into_frame().unwrap();
    let mut expected = vec![0x83];
    expected.extend(b"\0\x04http\0\0\0\x01\x04\x01\0\x06\x04\x7f\0\0\x01\0\x50\0\x02lo\0");
    expected.extend(b"\0\0\0\0\0\0\0\x07\x01\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x09");
    assert_eq!(frame.payload, expected);
}
