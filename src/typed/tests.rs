//! Codecs on integers: a descriptor lost, doubled or kept shows as a wrong number.

use std::sync::{Arc, Mutex};

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::Error as _};
use smallvec::SmallVec;

use super::*;
use crate::{
    fd_policy::{FdAccess, FdInfo, FdPolicy, FdType},
    frame::FdCloser,
};

/// A test's descriptor. From this one on it is of the wrong kind.
const WRONG: u32 = 900;

impl Passable for u32 {
    type Fd = u32;

    fn check(fd: &u32) -> Result<(), FdMismatch> {
        let found = FdInfo { fd_type: FdType::Other, access: FdAccess::Neither, is_sealed: false };
        if *fd < WRONG { Ok(()) } else { Err(FdMismatch { expected: FdPolicy::file(), found }) }
    }

    fn from_fd(fd: u32) -> Self {
        fd
    }

    fn into_fd(self) -> u32 {
        self
    }
}

/// Collects what the connection closes.
#[derive(Default)]
struct Closed(Mutex<Vec<u32>>);

impl FdCloser<u32> for Closed {
    fn close(self: Arc<Self>, fds: SmallVec<[u32; 1]>) {
        self.0.lock().unwrap().extend(fds);
    }
}

/// Bytes and descriptors that have arrived, and the place where the latter end.
pub(super) struct Arrived {
    pub(super) src: BytesMut,
    pub(super) fds: FdQueue<u32>,
    closed: Arc<Closed>,
}

impl Arrived {
    pub(super) fn new(bytes: &[u8], numbers: impl IntoIterator<Item = u32>) -> Self {
        let (mut fds, closed) = (FdQueue::from_iter(numbers), Arc::new(Closed::default()));
        fds.set_closer(Arc::clone(&closed) as _);
        Self { src: bytes.into(), fds, closed }
    }

    fn frame(payload: &[u8], numbers: &[u32]) -> Self {
        Self::new(&framed(payload, numbers.len()), numbers.iter().copied())
    }

    pub(super) fn decode<M>(
        &mut self,
        codec: &mut impl Decoder<u32, Item = M, Error = TypedError>,
    ) -> Result<Option<M>, TypedError> {
        codec.decode(&mut self.src, &mut self.fds)
    }

    /// Closes what still waits. Returns everything that was closed, in order of numbers.
    pub(super) fn end(self) -> Vec<u32> {
        drop(self.fds);
        let mut closed = std::mem::take(&mut *self.closed.0.lock().unwrap());
        closed.sort_unstable();
        closed
    }
}

fn framed(payload: &[u8], fds: usize) -> Vec<u8> {
    let mut frame = vec![0xFD, 0x10];
    frame.put_u16(fds as u16);
    frame.put_u32(payload.len() as u32);
    frame.extend_from_slice(payload);
    frame
}

/// Encodes a message on numbers. What is put on the wire is what `Typed` puts there.
fn encoded<M: Serialize>(message: M) -> (Vec<u8>, Vec<u32>) {
    let (payload, fds) = scope::encode::<u32, _>(|| to_postcard(&message)).unwrap();
    drop(message);
    let numbers = fds.into_iter().map(|fd| match fd {
        Outgoing::Given(fd) => Arc::into_inner(fd).expect("one reference").pop().unwrap(),
        Outgoing::Lent(fd) => *fd,
    });
    (payload, numbers.collect())
}

/// The error of a payload with these descriptors, after which all of them are closed.
fn refused<M: DeserializeOwned>(payload: &[u8], numbers: &[u32]) -> TypedError {
    let mut arrived = Arrived::frame(payload, numbers);
    let error =
        arrived.decode(&mut Typed::<M>::default()).err().expect("a message that is refused");
    assert_eq!(arrived.end(), numbers);
    error
}

#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Text(String),
    One { name: String, fd: Passed<u32> },
    Many(Vec<(u8, Option<Passed<u32>>)>),
    Pair(Box<Message>, Box<Message>),
}

fn messages() -> impl Strategy<Value = (u64, Vec<u8>)> {
    // Shapes by a random walk; the numbers are given in order of appearance.
    (any::<u64>(), prop::collection::vec(any::<u8>(), 0..40))
}

fn build(shape: &[u8], depth: u32, next: &mut u32) -> Message {
    let number = |next: &mut u32| {
        *next += 1;
        Passed::from(*next)
    };
    match shape {
        [] => Message::Text(String::new()),
        [first, rest @ ..] if first % 4 == 0 || depth == 0 => Message::Text(format!("{rest:?}")),
        [first, rest @ ..] if first % 4 == 1 => {
            Message::One { name: format!("{}", rest.len()), fd: number(next) }
        }
        [first, rest @ ..] if first % 4 == 2 => {
            let one = |byte: &u8| (*byte, byte.is_multiple_of(2).then(|| number(next)));
            Message::Many(rest.iter().map(one).collect())
        }
        [_, rest @ ..] => {
            let (left, right) = rest.split_at(rest.len() / 2);
            Message::Pair(build(left, depth - 1, next).into(), build(right, depth - 1, next).into())
        }
    }
}

proptest! {
    #[test]
    fn random_messages_survive_with_their_descriptors((_, shape) in messages()) {
        let mut count = 0;
        let message = build(&shape, 6, &mut count);
        let expected = format!("{message:?}");
        let (payload, numbers) = encoded(message);
        prop_assert_eq!(&numbers, &Vec::from_iter(1..=count));
        let mut arrived = Arrived::frame(&payload, &numbers);
        let received: Message = arrived.decode(&mut Typed::default()).unwrap().unwrap();
        prop_assert_eq!(format!("{received:?}"), expected);
        prop_assert!(arrived.end().is_empty());
    }

    /// Whatever a mutated message is, each of its descriptors ends in one place.
    #[test]
    fn a_mutated_message_is_an_error_or_a_message_and_loses_no_descriptor(
        (mask, shape) in messages(),
        surplus in 0..2u32,
    ) {
        let mut count = 0;
        let (payload, mut numbers) = encoded(build(&shape, 6, &mut count));
        numbers.extend((0..surplus).map(|more| count + 1 + more));
        let frame = framed(&payload, numbers.len());
        for position in 0..frame.len() {
            let mut bytes = frame.clone();
            bytes[position] ^= (mask >> (position % 56)) as u8 | 1;
            let mut arrived = Arrived::new(&bytes, numbers.iter().copied());
            let mut codec = Typed::<Message>::default();
            let closed_by_message = Arc::clone(&arrived.closed);
            let received = arrived.decode(&mut codec);
            prop_assert!(closed_by_message.0.lock().unwrap().is_empty(), "closed during the call");
            drop(received);
            prop_assert_eq!(arrived.end(), numbers.clone(), "byte {}", position);
        }
    }
}

type Pair = (Passed<u32>, Passed<u32>);

#[test]
fn each_fault_of_the_descriptors_has_its_error_and_leaks_nothing() {
    let fault = |payload: &[u8], numbers: &[u32]| match refused::<Pair>(payload, numbers) {
        TypedError::Fd(fault) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(&[0, 2], &[5, 6]), FdError::Missing { index: 2, count: 2 });
    assert_eq!(fault(&[0, 1], &[5]), FdError::Missing { index: 1, count: 1 });
    assert_eq!(
        fault(&[0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 0], &[5]),
        FdError::Missing { index: u32::MAX, count: 1 }
    );
    assert_eq!(fault(&[0, 0], &[5, 6]), FdError::Doubled { index: 0 });
    assert_eq!(fault(&[0, 2], &[5, 6, 7]), FdError::Unclaimed { count: 1 });
    assert!(matches!(fault(&[0, 1], &[5, WRONG]), FdError::Mismatch { index: 1, .. }));
    // The order is the sender's.
    let mut arrived = Arrived::frame(&[1, 0], &[5, 6]);
    let (first, second) = arrived.decode(&mut Typed::<Pair>::default()).unwrap().unwrap();
    assert_eq!((first.into_inner(), second.into_inner()), (6, 5));
    assert!(arrived.end().is_empty());
}

#[test]
fn each_fault_of_the_bytes_has_its_error_and_leaks_nothing() {
    assert!(matches!(refused::<Pair>(&[0], &[5, 6]), TypedError::Format(_)));
    assert!(matches!(refused::<Pair>(&[0, 1, 9], &[5, 6]), TypedError::LeftOver { bytes: 1 }));
    assert!(matches!(refused::<Pair>(&[], &[]), TypedError::Format(_)));
    let mut missing = Arrived::new(&framed(&[0, 1], 2), [5]);
    let error = missing.decode(&mut Typed::<Pair>::default()).unwrap_err();
    assert!(matches!(
        error,
        TypedError::Connection(Error::MissingFds { expected: 2, received: 1 })
    ));
    assert_eq!(missing.end(), [5]);
}

#[test]
fn a_message_that_is_dropped_closes_its_descriptors_where_the_connection_does() {
    let mut arrived = Arrived::frame(&[0, 1], &[5, 6]);
    let (first, second) = arrived.decode(&mut Typed::<Pair>::default()).unwrap().unwrap();
    assert_eq!(first.into_inner(), 5);
    drop(second);
    assert_eq!(arrived.end(), [6]);
}

#[test]
fn a_descriptor_of_another_type_than_the_connections_is_refused() {
    let mut arrived = Arrived::frame(&[0], &[5]);
    let error = arrived.decode(&mut Typed::<Passed<OwnedFd>>::default()).unwrap_err();
    assert!(matches!(error, TypedError::Fd(FdError::NoCodec)), "{error:?}");
    assert_eq!(arrived.end(), [5]);
}

#[test]
fn only_a_codec_can_serialize_a_descriptor() {
    assert!(postcard::to_allocvec(&Passed::from(5)).is_err());
    assert!(postcard::from_bytes::<Passed<u32>>(&[0]).is_err());
}

/// Serializes what it has twice, as a serializer does that writes the length first.
struct Twice<T>(T);

impl<T: Serialize> Serialize for Twice<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let length = postcard::to_allocvec(&self.0).map_err(S::Error::custom)?.len();
        (length as u32, &self.0).serialize(serializer)
    }
}

#[test]
fn a_field_that_is_serialized_twice_is_sent_once() {
    let (payload, numbers) = encoded(Twice((Passed::from(5), Passed::from(6))));
    assert_eq!((&payload[..], &numbers[..]), (&[2, 0, 1][..], &[5, 6][..]));
}

/// Makes its field anew each time, at what may be the same address.
struct Made;

impl Serialize for Made {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Passed::from(5).serialize(serializer)
    }
}

#[test]
fn fields_that_are_made_while_they_are_serialized_are_descriptors_of_their_own() {
    let (payload, numbers) = encoded((Made, Made, Made));
    assert_eq!((&payload[..], &numbers[..]), (&[0, 1, 2][..], &[5, 5, 5][..]));
}

/// Bytes within the message that another call of the format has made.
struct Inside<T>(T);

impl<T: Serialize> Serialize for Inside<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        postcard::to_allocvec(&self.0).map_err(S::Error::custom)?.serialize(serializer)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Inside<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        postcard::from_bytes(&bytes).map(Self).map_err(serde::de::Error::custom)
    }
}

#[test]
fn bytes_within_a_message_may_have_its_descriptors() {
    let (payload, numbers) = encoded((Passed::from(5), Inside((Passed::from(6), Passed::from(7)))));
    assert_eq!(numbers, [5, 6, 7]);
    let mut arrived = Arrived::frame(&payload, &numbers);
    let mut codec = Typed::<(Passed<u32>, Inside<Pair>)>::default();
    let (first, Inside((second, third))) = arrived.decode(&mut codec).unwrap().unwrap();
    assert_eq!([first, second, third].map(Passed::into_inner), [5, 6, 7]);
}

/// Uses a codec while another one is at work.
struct Elsewhere<T>(T);

impl<T: Serialize> Serialize for Elsewhere<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (bytes, fds) =
            scope::encode::<u32, _>(|| to_postcard(&Passed::from(99))).map_err(S::Error::custom)?;
        assert_eq!((&bytes[..], fds.len()), (&[0][..], 1));
        self.0.serialize(serializer)
    }
}

#[test]
fn a_codec_that_is_used_within_another_ones_call_has_its_own_descriptors() {
    let (payload, numbers) =
        encoded((Passed::from(5), Elsewhere(Passed::from(6)), Passed::from(7)));
    assert_eq!((&payload[..], &numbers[..]), (&[0, 1, 2][..], &[5, 6, 7][..]));
}

/// Fails or panics behind a descriptor.
struct Fails(bool);

impl Serialize for Fails {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        if self.0 {
            panic!("as the test wants")
        } else {
            Err(S::Error::custom("as the test wants"))
        }
    }
}

#[test]
fn a_message_that_cannot_be_encoded_comes_back_with_its_descriptors() {
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut buf = SendBuf::<crate::SendFd>::new();
    let message = (Passed::from(OwnedFd::from(a)), Fails(false));
    let error = Typed::default().encode(message, &mut buf).unwrap_err();
    assert!(matches!(error.error, TypedError::Format(_)));
    assert_eq!((buf.len(), buf.fd_count()), (0, 0));
    let (fd, _) = error.item.expect("the message is refused");
    let mut socket = std::os::unix::net::UnixStream::from(fd.into_inner());
    std::io::Write::write_all(&mut socket, b"open").unwrap();
    drop(b);
}

#[test]
fn a_panic_leaves_nothing_behind_for_the_next_message() {
    let message = (Passed::from(5), Fails(true));
    let attempt = std::panic::AssertUnwindSafe(|| {
        scope::encode::<u32, _>(|| to_postcard(&message)).map(drop)
    });
    assert!(std::panic::catch_unwind(attempt).is_err());
    assert!(postcard::to_allocvec(&Passed::from(6)).is_err(), "no codec is at work");
    assert_eq!(message.0.into_inner(), 5);
    assert_eq!(encoded(Passed::from(7)).1, [7]);
}

/// Panics after it has claimed a descriptor.
struct PanicsBehind;

impl<'de> Deserialize<'de> for PanicsBehind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let _claimed = Passed::<u32>::deserialize(deserializer)?;
        panic!("as the test wants")
    }
}

#[test]
fn a_panic_of_a_receiver_closes_the_descriptors() {
    let mut arrived = Arrived::frame(&[0], &[5]);
    let attempt = std::panic::AssertUnwindSafe(|| {
        arrived.decode(&mut Typed::<PanicsBehind>::default()).map(drop)
    });
    assert!(std::panic::catch_unwind(attempt).is_err());
    assert!(postcard::from_bytes::<Passed<u32>>(&[0]).is_err(), "no codec is at work");
    assert_eq!(arrived.end(), [5]);
}

#[test]
fn a_message_that_is_kept_elsewhere_is_not_sent() {
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let kept = Passed::from(OwnedFd::from(a));
    let mut buf = SendBuf::<crate::SendFd>::new();
    let error = Typed::<&Passed<OwnedFd>>::default().encode(&kept, &mut buf).unwrap_err();
    assert!(matches!(error.error, TypedError::Fd(FdError::Kept)));
    assert_eq!((buf.len(), buf.fd_count()), (0, 0));
    drop(kept.into_inner());
}

#[test]
fn a_message_over_the_limits_comes_back() {
    let limits = Limits::default().max_payload_bytes(10).max_fds_per_frame(1);
    let null = || Passed::from(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let mut codec = Typed::<(Vec<u8>, Vec<Passed<OwnedFd>>)>::new(limits);
    for (bytes, fds) in [(20, 1), (1, 2)] {
        let message = (vec![7; bytes], Vec::from_iter((0..fds).map(|_| null())));
        let refused = codec.encode(message, &mut SendBuf::<crate::SendFd>::new()).unwrap_err();
        assert!(matches!(
            refused.error,
            TypedError::Connection(
                Error::FrameTooLong { bytes: 23, limit: 10 }
                    | Error::TooManyFds { fds: 2, limit: 1 }
            )
        ));
        assert_eq!(refused.item.unwrap().1.len(), fds);
    }
}
