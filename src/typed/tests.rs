//! Codecs with integers as descriptors: one that is lost, doubled or kept shows as a wrong number.

use std::sync::{Arc, Mutex};

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use serde::{Deserialize, Serialize, Serializer, ser::Error as _};
use smallvec::SmallVec;

use super::*;
use crate::{
    fd_policy::{FdAccess, FdInfo, FdPolicy, FdType},
    frame::FdCloser,
};

/// Descriptors from this number on have the wrong kind.
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

/// Collects the descriptors that the connection closes.
#[derive(Default)]
struct Closed(Mutex<Vec<u32>>);

impl FdCloser<u32> for Closed {
    fn close(self: Arc<Self>, fds: SmallVec<[u32; 1]>) {
        self.0.lock().unwrap().extend(fds);
    }
}

/// Bytes and descriptors that have arrived, and the descriptors that were closed.
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

    /// Returns a frame with this payload and these descriptors.
    pub(super) fn frame(payload: &[u8], numbers: &[u32]) -> Self {
        Self::new(&framed(payload, numbers.len()), numbers.iter().copied())
    }

    pub(super) fn decode<M>(
        &mut self,
        codec: &mut impl Decoder<u32, Item = M, Error = TypedError>,
    ) -> Result<Option<M>, TypedError> {
        codec.decode(&mut self.src, &mut self.fds)
    }

    /// Closes the descriptors that still wait. Returns all that were closed, in ascending order.
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

/// Encodes a message whose descriptors are numbers, as `Typed` does.
pub(super) fn encoded<M: Serialize>(message: M) -> (Vec<u8>, Vec<u32>) {
    let (payload, fds) = scope::encode::<u32, _>(|| to_postcard(&message)).unwrap();
    drop(message);
    let numbers = fds.into_iter().map(|fd| match fd {
        Outgoing::Given(fd) => Arc::into_inner(fd).expect("one reference").pop().unwrap(),
        Outgoing::Lent(fd) => *fd,
    });
    (payload, numbers.collect())
}

/// Returns the error of a payload with these descriptors, and checks that all of them were closed.
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
    // The bytes choose the shape of a message. Its descriptors are numbered in their order.
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

    /// A mutated message may be an error or a message. Each of its descriptors is closed once.
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

pub(super) type Pair = (Passed<u32>, Passed<u32>);

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

/// A field that fails or panics when it is serialized, after another field with a descriptor.
pub(super) enum Fails {
    WithAnError,
    WithAPanic,
}

impl Serialize for Fails {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::WithAnError => Err(S::Error::custom("as the test requires")),
            Self::WithAPanic => panic!("as the test requires"),
        }
    }
}

#[test]
fn a_message_that_cannot_be_encoded_comes_back_with_its_descriptors() {
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut buf = SendBuf::<crate::SendFd>::new();
    let message = (Passed::from(OwnedFd::from(a)), Fails::WithAnError);
    let error = Typed::default().encode(message, &mut buf).unwrap_err();
    assert!(matches!(error.error, TypedError::Format(_)));
    assert_eq!((buf.len(), buf.fd_count()), (0, 0));
    let (fd, _) = error.item.expect("the message is refused");
    let mut socket = std::os::unix::net::UnixStream::from(fd.into_inner());
    std::io::Write::write_all(&mut socket, b"open").unwrap();
    drop(b);
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
