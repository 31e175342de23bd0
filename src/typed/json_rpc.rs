//! The codec of JSON-RPC with descriptors.

use std::{fmt, marker::PhantomData};

use bytes::{Buf, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::TypedError;
use crate::{
    codec::{Codec, Decoder, Encoder, FdQueue, SendBuf},
    error::{Error, SendError},
    frame::Fds,
    limits::Limits,
    limits::SCM_MAX_FD,
};

/// The codec of [JSON-RPC 2.0 with descriptors](https://github.com/bootc-dev/jsonrpc-fdpass): JSON
/// objects one after another, with or without whitespace between them, on a STREAM socket. The
/// member `fds` of the object is the number of descriptors of the message.
///
/// The meaning of each descriptor depends on its position, and is up to the application. So an item
/// is a pair of a message and its descriptors, and `M` has no [`Passed`](super::Passed) fields. The
/// codec writes the member `fds`. `M` must not write one, and must not refuse it.
///
/// Descriptors may come later than the bytes of their message, because one call carries at most 253
/// of them. Each further batch comes with a space. The message waits for all of them.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::fs::File;
///
/// use fdwire::{Fds, Framed, SendFd, Socket, SocketKind, typed::JsonRpc};
/// use futures::{SinkExt, StreamExt};
/// use serde_json::{Value, json};
///
/// let (a, b) = Socket::pair(SocketKind::Stream)?;
/// let mut a = Framed::new(a, JsonRpc::<Value>::default());
/// let mut b = Framed::new(b, JsonRpc::<Value>::default());
/// let fds = Fds::from_iter([SendFd::from(File::open("/dev/null")?)]);
/// a.send((json!({ "jsonrpc": "2.0", "method": "read" }), fds)).await?;
/// let (message, fds) = b.next().await.ok_or("gone")??;
/// assert_eq!((&message["method"], fds.len()), (&json!("read"), 1));
/// # Ok(()) }
/// ```
pub struct JsonRpc<M> {
    limits: Limits,
    search: Search,
    message: PhantomData<fn(M) -> M>,
}

impl<M> JsonRpc<M> {
    /// Returns a codec with these limits for messages, in both directions.
    pub const fn new(limits: Limits) -> Self {
        Self { limits, search: Search::new(), message: PhantomData }
    }

    /// Returns the length of the object at the front, if it is complete.
    fn object(&mut self, src: &mut BytesMut) -> Result<Option<usize>, TypedError> {
        if self.search.searched == 0 {
            src.advance(spaces(src));
        }
        let end = self.search.end(src)?;
        let (bytes, limit) = (end.unwrap_or(src.len()), self.limits.max_payload_bytes);
        if bytes > limit {
            return Err(Error::FrameTooLong { bytes, limit }.into());
        }
        Ok(end)
    }
}

impl<M> Default for JsonRpc<M> {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl<M> Clone for JsonRpc<M> {
    fn clone(&self) -> Self {
        Self::new(self.limits)
    }
}

impl<M> fmt::Debug for JsonRpc<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonRpc").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl<M> Codec for JsonRpc<M> {
    fn limits(&self) -> Limits {
        self.limits
    }
}

/// The number of descriptors of a received message.
#[derive(Deserialize)]
struct Count {
    #[serde(default)]
    fds: usize,
}

/// A message that is sent, with the number of its descriptors.
#[derive(Serialize)]
struct Counted<'a, M> {
    #[serde(flatten)]
    message: &'a M,
    #[serde(skip_serializing_if = "is_zero")]
    fds: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl<M: DeserializeOwned, F> Decoder<F> for JsonRpc<M> {
    type Item = (M, Fds<F>);
    type Error = TypedError;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, TypedError> {
        let Some(end) = self.object(src)? else {
            // Descriptors come with bytes of their message, or with the spaces after it. If there
            // is no byte of a message, these belong to none.
            let count = if src.is_empty() { fds.len() } else { 0 };
            return if count == 0 {
                Ok(None)
            } else {
                Err(Error::UnclaimedFds { fds: count }.into())
            };
        };
        // If the object already waits for descriptors, their number is known.
        let count = match self.search.count {
            Some(count) => count,
            None => serde_json::from_slice::<Count>(&src[..end]).map_err(TypedError::format)?.fds,
        };
        if count > self.limits.max_fds_per_frame {
            return Err(
                Error::TooManyFds { fds: count, limit: self.limits.max_fds_per_frame }.into()
            );
        }
        // Descriptors are missing, and only spaces have come after the message. So the sender may
        // still send further spaces with descriptors. Remove the spaces that have come.
        if fds.count() < count && spaces(&src[end..]) == src.len() - end {
            src.truncate(end);
            self.search.count = Some(count);
            return Ok(None);
        }
        // Either all descriptors are there, or the next message has begun without them. In the
        // second case, `claim` returns the error.
        let message = serde_json::from_slice(&src[..end]).map_err(TypedError::format)?;
        let fds = fds.claim(count)?;
        src.advance(end);
        self.search = Search::new();
        Ok(Some((message, fds)))
    }

    /// # Errors
    /// [`Error::MissingFds`] if the stream ends before the descriptors of a message have come.
    fn decode_eof(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, TypedError> {
        match self.decode(src, fds)? {
            Some(item) => Ok(Some(item)),
            None if let Some(count) = self.search.count => Err(fds
                .claim(count)
                .err()
                .unwrap_or(Error::UnexpectedEnd { bytes: src.len() })
                .into()),
            None if !src.is_empty() => Err(Error::UnexpectedEnd { bytes: src.len() }.into()),
            None => Ok(None),
        }
    }
}

impl<M: Serialize, F, G: From<F>> Encoder<(M, Fds<F>), G> for JsonRpc<M> {
    type Error = TypedError;

    /// # Errors
    /// The errors of [`Typed`](super::Typed), except those that concern `Passed` fields. The item
    /// comes back.
    fn encode(
        &mut self,
        (message, fds): (M, Fds<F>),
        dst: &mut SendBuf<G>,
    ) -> Result<(), SendError<(M, Fds<F>), TypedError>> {
        let json = match self.to_json(&message, fds.len()) {
            Ok(json) => json,
            Err(error) => return Err(SendError::refused((message, fds), error)),
        };
        dst.put_shared(json.into());
        // One call carries at most 253 descriptors. For each further call, send a space.
        for (number, fd) in fds.into_iter().enumerate() {
            if number > 0 && number.is_multiple_of(SCM_MAX_FD) {
                dst.end_part();
                dst.put_slice(b" ");
            }
            dst.put_fd(fd);
        }
        Ok(())
    }
}

impl<M: Serialize> JsonRpc<M> {
    /// Encodes a message with the number of its descriptors, within the limits.
    fn to_json(&self, message: &M, fds: usize) -> Result<Vec<u8>, TypedError> {
        let limits = self.limits;
        if fds > limits.max_fds_per_frame {
            return Err(Error::TooManyFds { fds, limit: limits.max_fds_per_frame }.into());
        }
        let json = serde_json::to_vec(&Counted { message, fds }).map_err(TypedError::format)?;
        let (bytes, limit) = (json.len(), limits.max_payload_bytes);
        if bytes > limit { Err(Error::FrameTooLong { bytes, limit }.into()) } else { Ok(json) }
    }
}

/// The state of the search for the end of an object. Each byte is searched once, even if the object
/// comes in many small pieces.
struct Search {
    /// The number of bytes that were searched.
    searched: usize,
    /// The number of braces that are open.
    depth: usize,
    in_string: bool,
    /// True if the last byte was a backslash in a string, and not itself escaped.
    is_escaped: bool,
    /// The end, once it was found.
    end: Option<usize>,
    /// The number of descriptors, if the object waits for some of them.
    count: Option<usize>,
}

impl Search {
    const fn new() -> Self {
        Self { searched: 0, depth: 0, in_string: false, is_escaped: false, end: None, count: None }
    }

    /// Returns the end of the object at the front of `src`. Only strings and braces are recognized
    /// here. The parser checks the rest.
    ///
    /// # Errors
    /// If `src` does not begin with an object.
    fn end(&mut self, src: &[u8]) -> Result<Option<usize>, TypedError> {
        if src.first().is_some_and(|&first| first != b'{') {
            return Err(Error::invalid("a message is not a JSON object").into());
        }
        // A brace in a string does not count. An escaped quote does not end a string.
        while self.end.is_none()
            && let Some(&byte) = src.get(self.searched)
        {
            self.searched += 1;
            if self.in_string {
                self.in_string = self.is_escaped || byte != b'"';
                self.is_escaped = byte == b'\\' && !self.is_escaped;
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' => self.depth += 1,
                b'}' => self.depth -= 1,
                _ => {}
            }
            if self.depth == 0 {
                self.end = Some(self.searched);
            }
        }
        Ok(self.end)
    }
}

/// Returns the number of bytes at the front that are whitespace of JSON.
fn spaces(src: &[u8]) -> usize {
    src.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count()
}
