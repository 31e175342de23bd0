//! The codec of varlink.

use std::{fmt, marker::PhantomData, os::fd::OwnedFd, sync::Arc};

use bytes::{Buf, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    TypedError, encode_within,
    scope::{self, Slots},
};
use crate::{
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
    error::{Error, SendError},
    limits::Limits,
};

/// The codec of [varlink](https://varlink.org): each message is a JSON object and a NUL byte. It
/// uses systemd's convention for descriptors: the value of a field is the position of its
/// descriptor among those that came with the message. A [`Passed`](super::Passed) field has this
/// form in JSON. So fields that systemd's interfaces call `fileDescriptor` and the like are
/// `Passed` fields of `M`.
///
/// `M` is the whole JSON object of a call or a reply. A call has `method` and `parameters`, a reply
/// has `parameters` or `error`. systemd omits `parameters` if there are none, so give the field a
/// serde default.
///
/// A message does not contain the number of its descriptors. It has those that it names, from 0
/// upwards without a gap, and senders attach them to its first byte. As with systemd's
/// `SD_VARLINK_SERVER_FD_PASSING_INPUT_STRICT`, descriptors that no field names are an error.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::fs::File;
///
/// use fdwire::{Framed, Socket, SocketKind, typed::{Passed, Varlink}};
/// use futures::{SinkExt, StreamExt};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// #[serde(tag = "method", content = "parameters")]
/// enum Call {
///     #[serde(rename = "org.example.Logs.Add", rename_all = "camelCase")]
///     Add { name: String, file_descriptor: Passed<File> },
/// }
///
/// let (a, b) = Socket::pair(SocketKind::Stream)?;
/// let mut client = Framed::with_codecs(a, (), Varlink::<Call>::default());
/// let mut service = Framed::with_codecs(b, Varlink::<Call>::default(), ());
/// let file_descriptor = File::open("/dev/null")?.into();
/// // {"method":"org.example.Logs.Add","parameters":{"name":"null","fileDescriptor":0}}
/// client.send(Call::Add { name: "null".into(), file_descriptor }).await?;
/// let Call::Add { name, file_descriptor } = service.next().await.ok_or("gone")??;
/// assert_eq!(name, "null");
/// let file: File = file_descriptor.into_inner();
/// # drop(file); Ok(()) }
/// ```
pub struct Varlink<M> {
    limits: Limits,
    /// The number of bytes at the front that are known to contain no NUL.
    searched: usize,
    /// True if the message that was encoded last has descriptors.
    sent_fds: bool,
    message: PhantomData<fn(M) -> M>,
}

impl<M> Varlink<M> {
    /// Returns a codec with these limits for messages, in both directions. The NUL byte does not
    /// count.
    pub const fn new(limits: Limits) -> Self {
        Self { limits, searched: 0, sent_fds: false, message: PhantomData }
    }
}

impl<M> Default for Varlink<M> {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl<M> Clone for Varlink<M> {
    fn clone(&self) -> Self {
        Self::new(self.limits)
    }
}

impl<M> fmt::Debug for Varlink<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Varlink").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl<M> Codec for Varlink<M> {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns [`Grouping::Alone`] for a message with descriptors: it must not share a system call
    /// with others. Some receivers, such as `zlink`, assign descriptors to the message in which a
    /// read ends. Messages without descriptors share calls.
    fn grouping(&self) -> Grouping {
        if self.sent_fds { Grouping::Alone } else { Grouping::FdsFirst }
    }
}

impl<M: DeserializeOwned, F: 'static> Decoder<F> for Varlink<M> {
    type Item = M;
    type Error = TypedError;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<M>, TypedError> {
        // Each byte is searched once, even if the message comes in many small pieces.
        let end =
            src[self.searched..].iter().position(|&byte| byte == 0).map(|end| self.searched + end);
        let (bytes, limit) = (end.unwrap_or(src.len()), self.limits.max_payload_bytes);
        if bytes > limit {
            return Err(Error::FrameTooLong { bytes, limit }.into());
        }
        self.searched = if end.is_some() { 0 } else { bytes };
        let Some(end) = end else { return Ok(None) };

        // The message takes as many descriptors off the queue as its fields name.
        let json = src.split_to(end);
        src.advance(1);
        let parse = || serde_json::from_slice(&json).map_err(TypedError::format);
        let (message, slots) = scope::decode(Slots::waiting(fds), parse);
        slots.give_back(fds);
        let message = message?;
        // Descriptors come with the first byte of their message. As no further message has begun,
        // those that are left belong to this one or to one before it, which did not name them.
        if src.is_empty() && !fds.is_empty() {
            return Err(Error::UnclaimedFds { fds: fds.len() }.into());
        }
        Ok(Some(message))
    }
}

impl<M, G> Encoder<M, G> for Varlink<M>
where
    M: Serialize,
    G: From<OwnedFd> + From<Arc<OwnedFd>>,
{
    type Error = TypedError;

    /// # Errors
    /// The errors of [`Typed`](super::Typed).
    fn encode(&mut self, message: M, dst: &mut SendBuf<G>) -> Result<(), SendError<M, TypedError>> {
        let to_json = |message: &M| serde_json::to_vec(message).map_err(TypedError::format);
        let (json, fds) = encode_within::<_, G>(self.limits, message, to_json)?;
        self.sent_fds = !fds.is_empty();
        dst.put_shared(json.into());
        dst.put_slice(&[0]);
        dst.put_fds(fds);
        Ok(())
    }
}
