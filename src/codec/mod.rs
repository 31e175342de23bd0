//! Bytes and descriptors in, messages out, and back: **sans-IO**. No socket, no tokio, no clock.
//!
//! Everything here is generic over the type `F` of a descriptor, so that the rules run in tests on
//! plain integers, where a descriptor lost, doubled or given to the wrong message shows as a wrong
//! number.

mod buffers;
#[cfg(test)]
mod copies;
mod dry_run;
mod fd_queue;
mod frame_codec;
mod inbound;
mod map;
mod messages;
#[cfg(test)]
mod model;
mod packet_codec;
#[cfg(test)]
mod parts;
mod payload;
mod pieces;
mod plan;
#[cfg(test)]
mod rules;
mod send_buf;

use std::os::fd::OwnedFd;

use bytes::BytesMut;

pub use dry_run::{DryRun, SendCall};
pub use fd_queue::FdQueue;
pub use frame_codec::FrameCodec;
pub(crate) use inbound::{Inbound, Step, Unfinished};
pub use map::Map;
pub use packet_codec::PacketCodec;
pub use payload::{Payload, PayloadError};
use plan::LARGEST_PACKET;
pub(crate) use plan::{Carrier, Plan, largest_packet};
pub use send_buf::SendBuf;

use crate::{Error, Limits, SendError, send_fd::SendFd};

/// What a codec says of its protocol, whichever direction it is used in. Every item has a default.
pub trait Codec {
    /// What a connection takes at most. Asked often: should only return a stored value.
    ///
    /// [`Framed`](crate::Framed) sees to the queues; `max_payload_bytes` and `max_fds_per_frame`
    /// are the codec's own to check, when it decodes and when it encodes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Returns how the messages it encodes share system calls. A connection asks for each message.
    ///
    /// [`FdsFirst`](Grouping::FdsFirst) by default, which every receiver of a byte stream
    /// understands. A codec whose receiver counts descriptors is faster with
    /// [`Free`](Grouping::Free), as [`FrameCodec`] is.
    fn grouping(&self) -> Grouping {
        Grouping::default()
    }

    /// The same protocol with values of your own for messages: `decoded` makes them of what was
    /// decoded, `encoded` makes what is encoded of them. Both have the descriptors in hand.
    ///
    /// What `encoded` refuses comes back in its error. What the codec refuses after it does not.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::{fs::File, os::fd::OwnedFd};
    ///
    /// use fdwire::{Codec, Error, Frame, FrameCodec, Framed, Socket, SocketKind};
    /// use futures::{SinkExt, StreamExt};
    ///
    /// let files = |name: &'static str| {
    ///     FrameCodec::default().map(
    ///         |frame: Frame| {
    ///             let [file] = frame.fds.into_array().map_err(|fds| Error::invalid(format!("{} files", fds.len())))?;
    ///             Ok(File::from(file))
    ///         },
    ///         move |file: File| Ok(Frame::new(name).with_fd(file)),
    ///     )
    /// };
    /// let (a, b) = Socket::pair(SocketKind::Stream)?;
    /// let (mut a, mut b) = (Framed::new(a, files("a")), Framed::new(b, files("b")));
    /// a.send(File::open("/dev/null")?).await?;
    /// let file: File = b.next().await.ok_or("gone")??;
    /// # drop(file); Ok(()) }
    /// ```
    fn map<D, E>(self, decoded: D, encoded: E) -> Map<Self, D, E>
    where
        Self: Sized,
    {
        Map { codec: self, decoded, encoded }
    }
}

/// Stands for no protocol, in a direction of a connection that is not used.
impl Codec for () {}

/// How messages share a `sendmsg`, and so what a receiver finds together.
///
/// All messages that wait go out in as few calls as this allows. The [guide](crate::guide) has a
/// table of what each kind of receiver needs. The [parts](SendBuf::end_part) of a message are
/// grouped as messages are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grouping {
    /// Any messages share a call, descriptors included: they may come with an earlier message. The
    /// fastest by far if many messages have descriptors. Only for receivers that learn from the
    /// bytes how many descriptors a message has, take them in the order of arrival, and have room
    /// for 506 that came before their messages.
    Free,
    /// A message with descriptors begins a call, and no other message's descriptors come in it:
    /// they are attached to its own first byte. For receivers that read one message at a time, or
    /// have room for one message's descriptors only.
    #[default]
    FdsFirst,
    /// A message has a call to itself. On SEQPACKET it is one packet, of at most
    /// [`SendBuf::max_packet_bytes`].
    Alone,
}

/// Takes messages off the bytes and descriptors that arrived: `tokio_util`'s `Decoder` plus a queue
/// of descriptors.
///
/// Descriptors are a second first-in first-out queue beside the bytes. On Linux the position of a
/// descriptor in the bytes is not preserved exactly (one `recvmsg` may return bytes sent before it
/// and after it), so a protocol says in its bytes how many descriptors a message has, or implies it
/// by the kind of message.
///
/// ```
/// use bytes::{Buf, BytesMut};
/// use fdwire::{Codec, Decoder, Error, FdQueue};
///
/// /// One letter a message; `F` comes with a descriptor.
/// struct Letters;
///
/// impl Codec for Letters {}
///
/// impl<F> Decoder<F> for Letters {
///     type Item = (char, Option<F>);
///     type Error = Error;
///
///     fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<Self::Item>, Error> {
///         if src.is_empty() {
///             return Ok(None);
///         }
///         let letter = char::from(src.get_u8());
///         let fd = match letter {
///             'F' => Some(fds.claim_one()?),
///             _ => None,
///         };
///         Ok(Some((letter, fd)))
///     }
/// }
///
/// let mut fds = FdQueue::from_iter([7]); // a test: descriptors are numbers
/// let mut src = BytesMut::from("aF");
/// assert_eq!(Letters.decode(&mut src, &mut fds)?, Some(('a', None)));
/// assert_eq!(Letters.decode(&mut src, &mut fds)?, Some(('F', Some(7))));
/// # Ok::<(), Error>(())
/// ```
pub trait Decoder<F = OwnedFd>: Codec {
    /// A message.
    type Item;

    /// What makes the bytes unusable. Final: nothing is decoded after it.
    type Error: From<Error>;

    /// Takes the next message off `src` and its descriptors off `fds`. `None` means that more bytes
    /// are needed; a decoder has to refuse a message that is too long before that, since `src`
    /// grows as long as it says so. Also asked with an empty `src`, which is no message.
    ///
    /// Leave the bytes of a message in `src` until it is complete. Only by them does the connection
    /// know that part of a message has arrived: for the time limit, for the limits of a uid, and
    /// to notice that several processes have written it.
    ///
    /// # Errors
    /// When the bytes, or the descriptors beside them, are none of this protocol's. The
    /// connection's stream yields the error and ends; the bytes and descriptors still waiting are
    /// dropped.
    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<Self::Item>, Self::Error>;

    /// Takes the next message after the end of the stream. Called until it returns `None`.
    ///
    /// # Errors
    /// By default what [`decode`](Self::decode) refuses, [`Error::UnexpectedEnd`] if bytes are left
    /// over, and [`Error::UnclaimedFds`] if descriptors are.
    fn decode_eof(&mut self, src: &mut BytesMut, fds: &mut FdQueue<F>) -> Result<Option<Self::Item>, Self::Error> {
        match self.decode(src, fds)? {
            Some(item) => Ok(Some(item)),
            None if !src.is_empty() => Err(Error::UnexpectedEnd { bytes: src.len() }.into()),
            None if !fds.is_empty() => Err(Error::UnclaimedFds { fds: fds.len() }.into()),
            None => Ok(None),
        }
    }

    /// How many bytes the message that begins in `src` still needs, once that is known: the
    /// counterpart of [`SendBuf::announce_length`]. Makes room for the rest of a large message in
    /// one piece. By default unknown.
    ///
    /// Asked after [`decode`](Self::decode) has returned `None`, and believed up to
    /// [`max_payload_bytes`](Limits#structfield.max_payload_bytes). A peer that announces lengths
    /// to a decoder that does not know them sends packets it has no room for.
    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        let _ = src;
        None
    }

    /// Most bytes to receive in one go; 0 counts as 1. By default as many as there is room for,
    /// which may be more than was [asked for](Self::missing_bytes).
    ///
    /// A protocol of packets says here how long one may be: the tail of a longer one is lost, and
    /// the stream ends with [`Error::TruncatedPacket`].
    fn max_receive_bytes(&self) -> usize {
        usize::MAX
    }
}

/// Writes messages as bytes and descriptors: `tokio_util`'s `Encoder` with descriptors.
///
/// `F` is the type of a descriptor on its way out, [`SendFd`] on a socket. Items may hold another
/// one that becomes an `F`, such as the [`OwnedFd`] of a received message.
pub trait Encoder<Item, F = SendFd>: Codec {
    /// Why an item cannot be sent.
    type Error: From<Error>;

    /// Appends one message to `dst`. One without bytes and descriptors is not sent at all.
    ///
    /// # Errors
    /// When the item is not fit to be sent. It should come back in the error: check first, then
    /// write.
    ///
    /// What was written to `dst` before an error or a panic is taken out again, and its descriptors
    /// are closed.
    fn encode(&mut self, item: Item, dst: &mut SendBuf<F>) -> Result<(), SendError<Item, Self::Error>>;
}
