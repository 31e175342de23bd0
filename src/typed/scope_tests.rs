//! Unusual uses of serde: fields that are serialized twice, codecs inside the calls of others,
//! panics.

use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::Error as _};

use super::{
    tests::{Arrived, Fails, Pair, encoded},
    *,
};

/// Serializes its content twice, as a serializer does that writes the length first.
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

/// Makes a new field for each call, possibly at the same address as before.
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

/// A value that another call of the format encodes to bytes inside the message.
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

/// Uses another codec while it is serialized.
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

#[test]
fn a_panic_leaves_nothing_behind_for_the_next_message() {
    let message = (Passed::from(5), Fails::WithAPanic);
    let attempt = std::panic::AssertUnwindSafe(|| {
        scope::encode::<u32, _>(|| to_postcard(&message)).map(drop)
    });
    assert!(std::panic::catch_unwind(attempt).is_err());
    assert!(postcard::to_allocvec(&Passed::from(6)).is_err(), "no codec is at work");
    assert_eq!(message.0.into_inner(), 5);
    assert_eq!(encoded(Passed::from(7)).1, [7]);
}

/// A message that panics after it has claimed a descriptor.
struct PanicsBehind;

impl<'de> Deserialize<'de> for PanicsBehind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let _claimed = Passed::<u32>::deserialize(deserializer)?;
        panic!("as the test requires")
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
