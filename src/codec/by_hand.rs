//! Messages as bytes, for the tests of the protocols above the codecs.

use bytes::BytesMut;

use super::{Encoder, SendBuf};
use crate::error::Error;

/// Returns the bytes of an encoded message, and its descriptors as numbers.
pub(crate) fn encoded<I: std::fmt::Debug>(
    mut codec: impl Encoder<I, u32, Error = Error>,
    message: I,
) -> (BytesMut, Vec<u32>) {
    let mut buf = SendBuf::new();
    codec.encode(message, &mut buf).unwrap();
    buf.into_parts()
}

/// Returns the bytes of a frame with this payload and number of descriptors, without a codec.
pub(crate) fn frame(payload: &[u8], fds: u16) -> BytesMut {
    let mut frame = BytesMut::from(&[0xFD, 0x10][..]);
    frame.extend_from_slice(&fds.to_be_bytes());
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}
