use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*};

use super::{wire::NO_LIMIT, *};
use crate::{
    Error,
    address::tests::any_address,
    codec::{
        Decoder, Encoder, FdQueue, SendBuf,
        by_hand::{encoded, frame},
    },
};

prop_compose! {
    fn offer()(
        cookie: u64,
        tcp: bool,
        (peer, local) in (any_address(), any_address()),
        (prefix, metadata) in (vec(any::<u8>(), 0..5000), vec(any::<u8>(), 0..50)),
        (fd, bundle) in (any::<u32>(), vec(any::<u32>(), 0..MAX_OFFER_FDS)),
    ) -> Offer<u32> {
        let transport = if tcp { Transport::Tcp } else { Transport::UnixStream };
        let (prefix, metadata) = (prefix.into(), metadata.into());
        Offer { cookie, transport, peer, local, prefix, metadata, fd, bundle }
    }
}

fn to_worker() -> impl Strategy<Value = ToWorker<Offer<u32>, NewLink<u32>>> {
    prop_oneof![
        any::<u8>().prop_map(|version| ToWorker::Welcome { version }),
        (any::<u64>(), offer()).prop_map(|(number, offer)| ToWorker::Offer { number, offer }),
        any::<u64>().prop_map(|before| ToWorker::Recall { before }),
        any::<u64>().prop_map(|nonce| ToWorker::Ping { nonce }),
        proptest::option::of(0..u64::from(NO_LIMIT))
            .prop_map(|millis| ToWorker::Drain { within: millis.map(Duration::from_millis) }),
        Just(ToWorker::Fenced),
        any::<(u64, u32)>().prop_map(|(cookie, socket)| ToWorker::Move(NewLink { cookie, socket })),
    ]
}

fn reason() -> impl Strategy<Value = RejectReason> {
    prop_oneof![
        proptest::sample::select(&RejectReason::KNOWN[..]),
        (5u8..).prop_map(RejectReason::Other)
    ]
}

fn from_worker() -> impl Strategy<Value = FromWorker> {
    prop_oneof![
        any::<(u8, u8, u8, Option<u64>)>().prop_map(|(lowest, highest, max_fds, open)| {
            FromWorker::Hello { lowest, highest, max_fds, open }
        }),
        any::<u64>().prop_map(|total| FromWorker::Demand { total }),
        any::<(u64, u32)>().prop_map(|(first, count)| FromWorker::Adopted { first, count }),
        (any::<(u64, u32)>(), reason()).prop_map(|((first, count), reason)| FromWorker::Rejected {
            first,
            count,
            reason
        }),
        any::<u64>().prop_map(|finished| FromWorker::Load { finished }),
        any::<u64>().prop_map(|nonce| FromWorker::Pong { nonce }),
        Just(FromWorker::Draining),
        Just(FromWorker::Goodbye),
    ]
}

proptest! {
    #[test]
    fn messages_of_a_dispatcher_arrive(message in to_worker()) {
        let (mut bytes, fds) = encoded(DispatcherCodec::default(), message.clone());
        let mut fds = FdQueue::from_iter(fds);
        let decoded = WorkerCodec::default().decode(&mut bytes, &mut fds).unwrap();
        prop_assert_eq!(decoded, Some(message));
        prop_assert!(bytes.is_empty() && fds.is_empty());
    }

    #[test]
    fn messages_of_a_worker_arrive(message in from_worker()) {
        let (mut bytes, _) = encoded(WorkerCodec::default(), message);
        let decoded = DispatcherCodec::default().decode(&mut bytes, &mut FdQueue::<u32>::new());
        prop_assert_eq!(decoded.unwrap(), Some(message));
    }

    /// Nothing shorter than a message is accepted, and nothing with a descriptor too many. Bytes
    /// behind the fields are of a later revision, and are ignored.
    ///
    /// Rules: P-FIELDS.
    #[test]
    fn only_whole_messages_are_messages(message in to_worker(), cut in 0.0..1.0) {
        let (bytes, fds) = encoded(DispatcherCodec::default(), message.clone());
        let payload = &bytes[8..];
        let cut = (payload.len() as f64 * cut) as usize;
        let other = if fds.is_empty() { 1 } else { 0 };
        for (payload, wrong) in [(&payload[..cut], fds.len()), (payload, other)] {
            let mut queue = (0..wrong as u32).collect();
            let mut bytes = frame(payload, wrong as u16);
            let refused = WorkerCodec::default().decode(&mut bytes, &mut queue);
            prop_assert!(refused.is_err());
            prop_assert_eq!(queue.len(), wrong, "descriptors are left to be closed");
        }
        let longer = [payload, b"later"].concat();
        let mut bytes = frame(&longer, fds.len() as u16);
        let decoded = WorkerCodec::default().decode(&mut bytes, &mut FdQueue::from_iter(fds));
        prop_assert_eq!(decoded.unwrap(), Some(message));
    }

    #[test]
    fn garbage_is_refused_without_a_panic(payload in vec(any::<u8>(), 0..100)) {
        let mut one = FdQueue::from_iter([1]);
        let _ = WorkerCodec::default().decode(&mut frame(&payload, 1), &mut one);
        let mut none = FdQueue::<u32>::new();
        let _ = DispatcherCodec::default().decode(&mut frame(&payload, 0), &mut none);
    }
}

/// The bytes are those of the documentation, so that programs in other languages can rely on it.
///
/// Rules: P-FRAME.
#[test]
fn messages_in_bytes() {
    for (message, bytes) in [
        (
            FromWorker::Hello { lowest: 1, highest: 2, max_fds: 3, open: None },
            &b"\x01FDHO\x01\x02\x03"[..],
        ),
        (
            FromWorker::Hello { lowest: 1, highest: 2, max_fds: 3, open: Some(7) },
            b"\x01FDHO\x01\x02\x03\0\0\0\0\0\0\0\x07",
        ),
        (FromWorker::Demand { total: 64 }, b"\x02\0\0\0\0\0\0\0\x40"),
        (FromWorker::Adopted { first: 5, count: 3 }, b"\x03\0\0\0\0\0\0\0\x05\0\0\0\x03"),
        (
            FromWorker::Rejected { first: 5, count: 3, reason: RejectReason::Recalled },
            b"\x04\0\0\0\0\0\0\0\x05\0\0\0\x03\x03",
        ),
        (FromWorker::Load { finished: 258 }, b"\x05\0\0\0\0\0\0\x01\x02"),
        (FromWorker::Pong { nonce: 1 }, b"\x06\0\0\0\0\0\0\0\x01"),
        (FromWorker::Draining, b"\x07"),
        (FromWorker::Goodbye, b"\x08"),
    ] {
        assert_eq!(encoded(WorkerCodec::default(), message).0, frame(bytes, 0));
    }
    for (message, bytes) in [
        (ToWorker::Welcome { version: 1 }, &b"\x81\x01"[..]),
        (ToWorker::Recall { before: 5 }, b"\x83\0\0\0\0\0\0\0\x05"),
        (ToWorker::Ping { nonce: 1 }, b"\x84\0\0\0\0\0\0\0\x01"),
        (ToWorker::Drain { within: Some(Duration::from_secs(1)) }, b"\x85\0\0\x03\xe8"),
        (ToWorker::Drain { within: None }, b"\x85\xff\xff\xff\xff"),
        (ToWorker::Fenced, b"\x86"),
    ] {
        assert_eq!(encoded(DispatcherCodec::default(), message).0, frame(bytes, 0));
    }
    let offer = Offer {
        cookie: 9,
        transport: Transport::Tcp,
        peer: Address::Ip("127.0.0.1:256".parse().unwrap()),
        local: Address::Ip("[::1%7]:80".parse().unwrap()),
        prefix: "GET".into(),
        metadata: "m".into(),
        fd: 5,
        bundle: vec![6, 7],
    };
    let bytes = b"\x82\0\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0\x09\x01\x04\x7f\0\0\x01\x01\0\
        \x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\x50\0\0\0\0\0\0\0\x07\
        \0\0\0\x03GET\0\0\0\x01m";
    let message = ToWorker::Offer { number: 10, offer: offer.clone() };
    assert_eq!(encoded(DispatcherCodec::default(), message), (frame(bytes, 3), vec![5, 6, 7]));
    let link = NewLink { cookie: 9, socket: 5 };
    assert_eq!(
        encoded(DispatcherCodec::default(), ToWorker::Move(link)),
        (frame(b"\x87\0\0\0\0\0\0\0\x09", 1), vec![5])
    );
    let unix = Offer {
        transport: Transport::UnixStream,
        peer: Address::Unnamed,
        local: Address::Path("/run/x".into()),
        prefix: Bytes::new(),
        metadata: Bytes::new(),
        bundle: Vec::new(),
        ..offer
    };
    let bytes = b"\x82\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x09\x02\0\x01\0\x06/run/x\0\0\0\0\0\0\0\0";
    assert_eq!(
        encoded(DispatcherCodec::default(), ToWorker::Offer { number: 0, offer: unix }).0,
        frame(bytes, 1)
    );
}

/// Rules: P-LENGTH, D-OFFER-FDS.
#[test]
fn an_offer_that_is_too_long_comes_back() {
    let offer = |prefix: usize, path: usize, fds: usize| {
        let offer = Offer {
            cookie: 0,
            transport: Transport::Tcp,
            peer: Address::Path("x".repeat(path).into()),
            local: Address::Unnamed,
            prefix: vec![0; prefix].into(),
            metadata: Bytes::new(),
            fd: 7,
            bundle: vec![8; fds - 1],
        };
        ToWorker::Offer { number: 0, offer }
    };
    for message in
        [offer(MAX_MESSAGE_BYTES, 0, 1), offer(0, 65_536, 1), offer(0, 0, MAX_OFFER_FDS + 1)]
    {
        let refused =
            DispatcherCodec::default().encode(message.clone(), &mut SendBuf::new()).unwrap_err();
        assert!(matches!(refused.error, Error::FrameTooLong { .. } | Error::TooManyFds { .. }));
        assert_eq!(refused.item, Some(message));
    }
}

/// Any other message of an unknown type is an error.
///
/// Rules: P-TYPES.
#[test]
fn unknown_extensions_are_skipped() {
    let frames = |payloads: &[&[u8]]| {
        BytesMut::from(
            &payloads.iter().map(|payload| frame(payload, 0)).collect::<Vec<_>>().concat()[..],
        )
    };
    let mut bytes = frames(&[b"\x41new", b"\x7f", b"\x07"]);
    let decoded = DispatcherCodec::default().decode(&mut bytes, &mut FdQueue::<u32>::new());
    assert_eq!(decoded.unwrap(), Some(FromWorker::Draining));
    let mut bytes = frames(&[b"\xc1new", b"\xff", b"\x81\x01"]);
    let decoded = WorkerCodec::default().decode(&mut bytes, &mut FdQueue::<u32>::new());
    assert_eq!(decoded.unwrap(), Some(ToWorker::Welcome { version: 1 }));
    for unknown in [b"\x3f", b"\xbf", b"\x00"] {
        assert!(
            DispatcherCodec::default()
                .decode(&mut frame(unknown, 0), &mut FdQueue::<u32>::new())
                .is_err()
        );
        assert!(
            WorkerCodec::default()
                .decode(&mut frame(unknown, 0), &mut FdQueue::<u32>::new())
                .is_err()
        );
    }
}

/// Descriptors from a worker are reported as an error, and the other messages are still read.
#[test]
fn a_worker_has_no_descriptors_to_send() {
    let (mut bytes, mut fds) = (frame(&[0x07], 0), FdQueue::from_iter([1]));
    let mut codec = TolerantCodec::default();
    assert!(matches!(codec.decode(&mut bytes, &mut fds), Ok(Some(Ok(FromWorker::Draining)))));
    assert!(matches!(
        codec.decode(&mut bytes, &mut fds),
        Ok(Some(Err(Error::UnclaimedFds { fds: 1 })))
    ));
    assert!(matches!(codec.decode(&mut bytes, &mut fds), Ok(None)));
    let (mut bytes, mut fds) = (frame(&[0x07], 2), FdQueue::from_iter([1, 2]));
    bytes.extend_from_slice(&frame(&[0x08], 0));
    assert!(matches!(
        codec.decode(&mut bytes, &mut fds),
        Ok(Some(Err(Error::UnclaimedFds { fds: 2 })))
    ));
    assert!(matches!(codec.decode(&mut bytes, &mut fds), Ok(Some(Ok(FromWorker::Goodbye)))));
}
