//! Messages that are values of your own, with descriptors in their fields (feature `serde`).
//!
//! A message is any type with serde's `Serialize` and `Deserialize`. A field [`Passed<T>`] is a
//! descriptor: it travels beside the bytes, and comes back as a [`File`](std::fs::File), a socket
//! of std, an [`OwnedFd`] or sealed memory. [`Typed`] is the codec: a [`Framed`](crate::Framed)
//! with it is a `Stream` and a `Sink` of the type, and [`blocking`](crate::blocking) has the same.
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
//! message are closed away from the runtime. Kinds are checked before the message is yielded: see
//! [`Passable`] to be stricter than the types of std are.
//!
//! Two types of messages are not for a peer that you do not trust, because `postcard` does not
//! limit what they take:
//!
//! - A type that contains itself, such as a tree. The peer decides how deep a value is, with a
//!   level for each byte of the [limit](crate::Limits#structfield.max_payload_bytes), and a deep
//!   one overflows the stack. (JSON has a limit of 128 levels.)
//! - A list of values that have no bytes, such as `Vec<()>`. The peer decides how long it takes.
//!
//! # Formats
//!
//! [`Typed`] has one of our frames for each message; its payload is the format of `postcard`. It
//! tells nothing of the names of fields and variants, so both sides need the same types.
//! With the feature `json` there are the formats of other projects: [`Varlink`] and
//! [`JsonRpc`].

#[cfg(feature = "json")]
mod json_rpc;
#[cfg(all(test, feature = "json"))]
mod json_tests;
mod memfd;
mod passed;
mod scope;
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

/// The codec of messages of type `M`: each is the payload of one of our frames.
///
/// One type for both directions, in an enum for example, or one for each with
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

/// A fault of a message, or of the connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypedError {
    /// The connection failed, or the bytes are no frame.
    #[error(transparent)]
    Connection(#[from] Error),

    /// The bytes are no message of the type, or the value cannot be encoded. This is the error of
    /// the format's crate.
    #[error("message: {0}")]
    Format(Box<dyn std::error::Error + Send + Sync>),

    /// There are bytes behind the message in its frame.
    #[error("{bytes} bytes are left over behind the message")]
    LeftOver {
        /// The number of bytes.
        bytes: usize,
    },

    /// The descriptors are not as the message says.
    #[error(transparent)]
    Fd(#[from] FdError),
}

/// A fault of the descriptors of a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FdError {
    /// The message names a descriptor that it has not.
    #[error("message names descriptor {index} and has {count}")]
    Missing {
        /// The descriptor that it names, counted from 0.
        index: u32,
        /// The number of descriptors that it has.
        count: usize,
    },

    /// Two fields of the message name the same descriptor.
    #[error("message names descriptor {index} twice")]
    Doubled {
        /// The descriptor, counted from 0.
        index: u32,
    },

    /// The message has descriptors that none of its fields names.
    #[error("message has {count} descriptors that it does not name")]
    Unclaimed {
        /// The number of these.
        count: usize,
    },

    /// A descriptor is not what its field takes.
    #[error("descriptor {index} of the message: {mismatch}")]
    Mismatch {
        /// The descriptor, counted from 0.
        index: u32,
        /// The difference between what was expected and what came.
        mismatch: FdMismatch,
    },

    /// The message was sent by reference, for example as an `Arc`, and still has its descriptors.
    /// [`SharedFd`] is for those that the sender keeps.
    #[error("message was not sent as a whole and keeps its descriptors; use SharedFd to keep one")]
    Kept,

    /// A descriptor cannot be read or written here: by another serializer than a codec of
    /// [`typed`](self), or on a connection with descriptors of another type.
    #[error("only a codec of fdwire can read and write descriptors, each of its own type")]
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
    /// A codec that takes messages within these limits, in both directions.
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
        // The header's count is the truth: each of these descriptors has to have its field.
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

/// Makes bytes of a message, and takes its descriptors out of it.
///
/// # Errors
/// The message comes back if the bytes cannot be made or are over the limits.
fn encode_within<M, G: From<OwnedFd> + From<Arc<OwnedFd>>>(
    limits: Limits,
    message: M,
    to_bytes: impl FnOnce(&M) -> Result<Vec<u8>, TypedError>,
) -> Result<(Vec<u8>, Fds<G>), SendError<M, TypedError>> {
    // The message is whole until nothing can be wrong with it, so that it can come back.
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
    // holds the same message.
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
