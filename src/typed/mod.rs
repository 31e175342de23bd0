//! Messages of your own types, with descriptors in their fields (feature `serde`).
//!
//! A message is any type with serde's `Serialize` and `Deserialize`. A field of type [`Passed<T>`]
//! is a descriptor. It is sent beside the bytes, and the receiver gets it as a
//! [`File`](std::fs::File), a socket of std, an [`OwnedFd`] or sealed memory. [`Typed`] is the
//! codec: a [`Framed`](crate::Framed) with this codec is a `Stream` and a `Sink` of the type. A
//! [`blocking::Framed`](crate::blocking::Framed) can use it too.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{fs::File, os::unix::net::UnixStream};
//!
//! use fdwire::{Framed, Socket, SocketKind, typed::{Passed, Typed}};
//! use futures::{SinkExt, StreamExt};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! enum Request {
//!     Log { name: String, file: Passed<File> },
//!     Serve(Vec<Passed<UnixStream>>),
//! }
//!
//! let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
//! let (mut a, mut b) = (Framed::new(a, Typed::default()), Framed::new(b, Typed::default()));
//!
//! let file = File::open("/dev/null")?.into();
//! a.send(Request::Log { name: "null".into(), file }).await?;
//! match b.next().await.ok_or("the peer is gone")?? {
//!     Request::Log { name, file } => {
//!         let file: File = file.into_inner();
//!         assert_eq!((&name[..], file.metadata()?.is_file()), ("null", false));
//!     }
//!     Request::Serve(_) => unreachable!(),
//! }
//! # Ok(()) }
//! ```
//!
//! # What a peer can do
//!
//! A message has exactly the descriptors that its fields name. If one is missing, left over, named
//! twice or of the wrong kind, the stream ends with a [`TypedError`], and all descriptors of the
//! message are closed away from the runtime. Kinds are checked before the message is yielded.
//! Implement [`Passable`] for checks that are stricter than those for the types of std.
//!
//! Do not use two kinds of types with a peer that you do not trust, because `postcard` does not
//! limit the stack and the time that they need:
//!
//! - A type that contains itself, such as a tree. The peer decides how deep a value is. One byte of
//!   the [payload](crate::Limits#structfield.max_payload_bytes) can be one level, and a deep value
//!   overflows the stack. (For JSON, `serde_json` has a limit of 128 levels.)
//! - A list of values without bytes, such as `Vec<()>`. The peer decides how long decoding takes.
//!
//! # Formats
//!
//! [`Typed`] sends each message as one frame of [`FrameCodec`]. The payload is in the format of
//! `postcard`. It does not contain the names of fields and variants, so both sides need the same
//! types. With the feature `json`, [`Varlink`] and [`JsonRpc`] are codecs for the formats of other
//! projects.

#[cfg(feature = "json")]
mod json_rpc;
#[cfg(all(test, feature = "json"))]
mod json_tests;
mod memfd;
mod passed;
mod scope;
#[cfg(test)]
mod scope_tests;
#[cfg(test)]
mod tests;
#[cfg(feature = "json")]
mod varlink;

use std::{fmt, marker::PhantomData, os::fd::OwnedFd, sync::Arc};

use bytes::BytesMut;
use serde::{Serialize, de::DeserializeOwned};

#[cfg(feature = "json")]
pub use json_rpc::JsonRpc;
pub use memfd::{SealedBytes, SealedMemfd};
pub use passed::{Passable, Passed, SharedFd};
use scope::{Outgoing, Slots};
#[cfg(feature = "json")]
pub use varlink::Varlink;

use crate::{
    codec::{Codec, Decoder, Encoder, FdQueue, FrameCodec, Grouping, SendBuf},
    error::{Error, SendError},
    fd_policy::FdMismatch,
    frame::{Fds, Frame},
    limits::Limits,
};

/// The codec of messages of type `M`. Each message is the payload of one frame of [`FrameCodec`].
///
/// Use one type for both directions, for example an enum, or another type for each direction with
/// [`Framed::with_codecs`](crate::Framed::with_codecs).
///
/// ```
/// use fdwire::{SocketKind, blocking::{Framed, Socket}, typed::Typed};
///
/// let (a, b) = Socket::pair(SocketKind::Stream)?;
/// let mut tx = Framed::with_codecs(a, (), Typed::<(String, u32)>::default());
/// let mut rx = Framed::with_codecs(b, Typed::<(String, u32)>::default(), ());
/// tx.send(("seven".into(), 7))?;
/// assert_eq!(rx.next().ok_or("gone")??, ("seven".into(), 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Typed<M> {
    frames: FrameCodec,
    message: PhantomData<fn(M) -> M>,
}

/// The error of a message, or of the connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypedError {
    /// The connection failed, or the bytes are not a frame.
    #[error(transparent)]
    Connection(#[from] Error),

    /// The bytes are not a message of the type, or the value cannot be encoded. The source is the
    /// error of `postcard` or `serde_json`.
    #[error("message: {0}")]
    Format(Box<dyn std::error::Error + Send + Sync>),

    /// The frame has bytes after the message.
    #[error("{bytes} bytes are left over after the message")]
    LeftOver {
        /// The number of bytes.
        bytes: usize,
    },

    /// The descriptors do not match the fields of the message.
    #[error(transparent)]
    Fd(#[from] FdError),
}

/// The error of a descriptor of a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FdError {
    /// The message names a descriptor that it does not have.
    #[error("message names descriptor {index}, counted from 0, and has {count}")]
    Missing {
        /// The position of the descriptor, counted from 0.
        index: u32,
        /// The number of descriptors of the message.
        count: usize,
    },

    /// Two fields of the message name the same descriptor.
    #[error("message names descriptor {index} twice")]
    Doubled {
        /// The position of the descriptor, counted from 0.
        index: u32,
    },

    /// The message has descriptors that none of its fields names.
    #[error("message has {count} descriptors that it does not name")]
    Unclaimed {
        /// The number of these descriptors.
        count: usize,
    },

    /// A descriptor does not have the kind that its field requires.
    #[error("descriptor {index} of the message: {mismatch}")]
    Mismatch {
        /// The position of the descriptor, counted from 0.
        index: u32,
        /// The expected and the received kind.
        mismatch: FdMismatch,
    },

    /// The message was sent by reference, for example as an `Arc`, so it would keep its
    /// descriptors. Use [`SharedFd`] for a descriptor that the sender keeps.
    #[error("a message that is sent by reference keeps its descriptors; use SharedFd for these")]
    Kept,

    /// A field with a descriptor was serialized or deserialized without a codec of [`typed`](self),
    /// or on a connection that has descriptors of another type.
    #[error("descriptors can only be read and written by a codec of fdwire, and of its type")]
    NoCodec,
}

impl TypedError {
    fn format(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Format(Box::new(error))
    }
}

/// Drops the message, and so closes its descriptors.
impl<M> From<SendError<M, TypedError>> for TypedError {
    fn from(error: SendError<M, TypedError>) -> Self {
        error.error
    }
}

impl From<TypedError> for std::io::Error {
    fn from(error: TypedError) -> Self {
        match error {
            TypedError::Connection(error) => error.into(),
            error => Self::new(std::io::ErrorKind::InvalidData, error),
        }
    }
}

impl<M> Typed<M> {
    /// Returns a codec with these limits for messages, in both directions.
    pub const fn new(limits: Limits) -> Self {
        Self { frames: FrameCodec::new(limits), message: PhantomData }
    }
}

impl<M> Default for Typed<M> {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl<M> Clone for Typed<M> {
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<M> fmt::Debug for Typed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Typed").field(&self.frames.limits()).finish()
    }
}

impl<M> Codec for Typed<M> {
    fn limits(&self) -> Limits {
        self.frames.limits()
    }

    fn grouping(&self) -> Grouping {
        self.frames.grouping()
    }
}

impl<M: DeserializeOwned, F: 'static> Decoder<F> for Typed<M> {
    type Item = M;
    type Error = TypedError;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<M>, TypedError> {
        let Some(frame) = self.frames.decode(src, fds)? else { return Ok(None) };
        // The header of the frame has the number of descriptors. Each of them has to have a field.
        let (message, slots) =
            scope::decode(Slots::counted(frame.fds), || from_postcard(&frame.payload));
        slots.give_back(fds);
        message.map(Some)
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&self.frames, src)
    }
}

impl<M, G> Encoder<M, G> for Typed<M>
where
    M: Serialize,
    G: From<OwnedFd> + From<Arc<OwnedFd>>,
{
    type Error = TypedError;

    /// # Errors
    /// The message comes back with its descriptors, unless the error is [`FdError::Kept`].
    fn encode(&mut self, message: M, dst: &mut SendBuf<G>) -> Result<(), SendError<M, TypedError>> {
        let (payload, fds) = encode_within(self.limits(), message, to_postcard)?;
        let frame = Frame::<G> { payload: payload.into(), fds };
        self.frames
            .encode(frame, dst)
            .map_err(|refused| SendError::from(TypedError::from(refused.error)))
    }
}

fn to_postcard<M: Serialize>(message: &M) -> Result<Vec<u8>, TypedError> {
    postcard::to_allocvec(message).map_err(TypedError::format)
}

fn from_postcard<M: DeserializeOwned>(payload: &[u8]) -> Result<M, TypedError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(TypedError::LeftOver { bytes: rest.len() }),
        Err(error) => Err(TypedError::format(error)),
    }
}

/// Encodes a message to bytes, and takes its descriptors out.
///
/// # Errors
/// The message comes back if it can't be encoded or is over the limits.
fn encode_within<M, G: From<OwnedFd> + From<Arc<OwnedFd>>>(
    limits: Limits,
    message: M,
    to_bytes: impl FnOnce(&M) -> Result<Vec<u8>, TypedError>,
) -> Result<(Vec<u8>, Fds<G>), SendError<M, TypedError>> {
    // Until everything is checked, the message keeps its descriptors, so that it can come back.
    let (bytes, fds) = match scope::encode(|| to_bytes(&message)) {
        Ok(encoded) => encoded,
        Err(error) => return Err(SendError::refused(message, error)),
    };
    let (length, count) = (bytes.len(), fds.len());
    if length > limits.max_payload_bytes {
        let error = Error::FrameTooLong { bytes: length, limit: limits.max_payload_bytes };
        return Err(SendError::refused(message, error));
    }
    if count > limits.max_fds_per_frame {
        let error = Error::TooManyFds { fds: count, limit: limits.max_fds_per_frame };
        return Err(SendError::refused(message, error));
    }
    // Now it gives its descriptors away: `fds` has the last reference to each, unless somebody else
    // still holds the same message, for example by an `Arc`.
    drop(message);
    let is_kept = |fd: &Outgoing<_>| matches!(fd, Outgoing::Given(fd) if Arc::strong_count(fd) > 1);
    if fds.iter().any(is_kept) {
        return Err(SendError::from(TypedError::from(FdError::Kept)));
    }
    let fds = fds.into_iter().flat_map(|fd| match fd {
        Outgoing::Given(fd) => Arc::into_inner(fd).and_then(|mut fd| fd.pop()).map(G::from),
        Outgoing::Lent(fd) => Some(G::from(fd)),
    });
    Ok((bytes, fds.collect()))
}
