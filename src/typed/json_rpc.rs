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
/// objects one after the other, with whitespace between them or none, on a STREAM socket. A member
/// `fds` of the object tells how many descriptors a message has.
///
/// Which descriptor is what is up to the application, by their order. So an item is a message and
/// its descriptors, and `M` has no [`Passed`](super::Passed) fields. The codec writes the member
/// `fds`; `M` has none of that name, and ignores or allows it.
///
/// Descriptors may come later than the bytes of their message, with a space for each batch that
/// one call takes. The message waits for them.
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
    /// A codec that takes messages within these limits, in both directions.
    pub const fn new(limits: Limits) -> Self {
        Self { limits, search: Search::new(), message: PhantomData }
    }

    /// Returns the length of the object at the front, if it is there.
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

/// The number of descriptors in a received message.
#[derive(Deserialize)]
struct Count {
    #[serde(default)]
    fds: usize,
}

/// A message to be sent.
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
            // Descriptors come with bytes of their message, or with the spaces behind it.
            let count = if src.is_empty() { fds.len() } else { 0 };
            return if count == 0 {
                Ok(None)
            } else {
                Err(Error::UnclaimedFds { fds: count }.into())
            };
        };
        // An object that waits for descriptors was parsed before.
        let count = match self.search.count {
            Some(count) => count,
            None => serde_json::from_slice::<Count>(&src[..end]).map_err(TypedError::format)?.fds,
        };
        if count > self.limits.max_fds_per_frame {
            return Err(
                Error::TooManyFds { fds: count, limit: self.limits.max_fds_per_frame }.into()
            );
        }
        // The sender may still send spaces, with further descriptors. Those that came have done
        // their work.
        if fds.count() < count && spaces(&src[end..]) == src.len() - end {
            src.truncate(end);
            self.search.count = Some(count);
            return Ok(None);
        }
        // Either all descriptors are there, or the next message has begun without them.
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
    /// The item comes back.
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
        // What does not fit the call of the message goes with a space for each further call.
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

/// How far the end of an object has been searched for. Each byte is looked at once, however slowly
/// they come.
struct Search {
    searched: usize,
    /// Number of braces that are open.
    depth: usize,
    in_string: bool,
    /// The byte before is a backslash in a string.
    is_escaped: bool,
    /// The end, when it was found.
    end: Option<usize>,
    /// The number of descriptors, if the object waits for some of them.
    count: Option<usize>,
}

impl Search {
    const fn new() -> Self {
        Self { searched: 0, depth: 0, in_string: false, is_escaped: false, end: None, count: None }
    }

    /// Returns where the object that begins `src` ends. Whether it is one is for the parser to
    /// find out: here only strings and braces count.
    ///
    /// # Errors
    /// If `src` does not begin with an object.
    fn end(&mut self, src: &[u8]) -> Result<Option<usize>, TypedError> {
        if src.first().is_some_and(|&first| first != b'{') {
            return Err(Error::invalid("a message is not a JSON object").into());
        }
        // Braces in strings do not count, and neither do escaped quotes.
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
