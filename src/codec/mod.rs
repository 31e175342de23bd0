//! The codecs, which turn bytes and descriptors into messages and back. They are **sans-IO**: they
//! use no socket, no tokio and no clock.
//!
//! Everything here is generic over the type `F` of a descriptor, so that tests can use plain
//! integers. If a descriptor is lost, doubled or assigned to the wrong message, the test finds a
//! wrong number.

mod buffers;
#[cfg(test)]
pub(crate) mod by_hand;
mod carrier;
#[cfg(test)]
mod copies;
mod dry_run;
mod fd_queue;
mod frame_codec;
mod inbound;
mod map;
mod message;
mod messages;
#[cfg(test)]
mod model;
mod packet_codec;
#[cfg(test)]
mod parts;
#[cfg(feature = "tokio-util")]
mod payload;
mod pieces;
mod plan;
#[cfg(test)]
mod receive_rules;
mod send_buf;
#[cfg(test)]
mod send_rules;

use std::os::fd::OwnedFd;

use bytes::BytesMut;

use carrier::LARGEST_PACKET;
pub(crate) use carrier::{Carrier, Plan, largest_packet};
pub use dry_run::{DryRun, SendCall};
pub use fd_queue::FdQueue;
pub use frame_codec::FrameCodec;
pub(crate) use inbound::{Inbound, Step, Unfinished};
pub use map::Map;
pub use packet_codec::PacketCodec;
#[cfg(feature = "tokio-util")]
pub use payload::{PayloadCodec, PayloadError};
pub use send_buf::SendBuf;

use crate::{
    error::{Error, SendError},
    limits::Limits,
    send_fd::SendFd,
};

/// The properties of a protocol that both directions share. Every method has a default.
pub trait Codec {
    /// Returns the limits of a connection. This method is called often, so it should only return a
    /// stored value.
    ///
    /// [`Framed`](crate::Framed) enforces the limits of the queues. The codec itself has to check
    /// `max_payload_bytes` and `max_fds_per_frame`, when it decodes and when it encodes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Returns the rule by which the messages of this codec share system calls. This method is
    /// called for each message.
    ///
    /// The default is [`FdsFirst`](Grouping::FdsFirst), which every receiver of a byte stream
    /// understands. If the receiver counts descriptors, as [`FrameCodec`] does,
    /// [`Free`](Grouping::Free) is faster.
    fn grouping(&self) -> Grouping {
        Grouping::default()
    }

    /// Returns a codec for the same protocol with your own type of message. `decoded` turns a
    /// decoded message into your type, and `encoded` turns your type into a message to be encoded.
    /// Both get the descriptors too.
    ///
    /// An item that `encoded` refuses comes back in its error. A message that the inner codec
    /// refuses after that is lost.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::{fs::File, os::fd::OwnedFd};
    ///
    /// use fdwire::{Error, Frame, FrameCodec, Framed, Socket, SocketKind, codec::Codec};
    /// use futures::{SinkExt, StreamExt};
    ///
    /// let files = |name: &'static str| {
    ///     FrameCodec::default().map(
    ///         |frame: Frame| {
    ///             let [file] = frame
    ///                 .fds
    ///                 .into_array()
    ///                 .map_err(|fds| Error::invalid(format!("{} files", fds.len())))?;
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

/// The codec of a direction that is not used.
impl Codec for () {}

/// A rule for which messages may share a `sendmsg`, and so for what a receiver gets together.
///
/// All waiting messages are sent in as few calls as the rule allows. The [guide](crate::guide) has
/// a table with the needs of each kind of receiver. The [parts](SendBuf::end_part) of a message are
/// grouped as messages are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grouping {
    /// Any messages share a call, so a descriptor may arrive with an earlier message than its own.
    /// This is by far the fastest if many messages have descriptors. Use it only for receivers that
    /// read the number of descriptors from the bytes of a message, take them in the order of
    /// arrival, and have room for 506 descriptors that came before their messages.
    Free,
    /// A message with descriptors begins a call, so the descriptors are attached to its own first
    /// byte. No other message's descriptors are in that call. This is for receivers that read one
    /// message at a time, or have room for the descriptors of only one message.
    #[default]
    FdsFirst,
    /// Each message has its own call. On SEQPACKET a message is one packet, of at most
    /// [`SendBuf::max_packet_bytes`].
    Alone,
}

/// Decodes messages from bytes and descriptors: `tokio_util`'s `Decoder` with a queue of
/// descriptors.
///
/// Descriptors arrive in their own queue, beside the bytes, in the order in which they were sent.
/// Linux does not keep the exact position of a descriptor in the bytes: one `recvmsg` may return
/// bytes that were sent before it and after it. So the bytes of a message have to determine the
/// number of its descriptors, by a number or by the kind of message.
///
/// ```
/// use bytes::{Buf, BytesMut};
/// use fdwire::{Error, codec::{Codec, Decoder, FdQueue}};
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
///     fn decode(
///         &mut self,
///         src: &mut BytesMut,
///         fds: &mut FdQueue<F>,
///     ) -> Result<Option<Self::Item>, Error> {
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
    /// The type of a decoded message.
    type Item;

    /// The error for bytes that are not valid. It is final: nothing is decoded after it.
    type Error: From<Error>;

    /// Takes the next message from `src` and its descriptors from `fds`. Returns `None` if more
    /// bytes are needed.
    ///
    /// `src` grows as long as this returns `None`. So refuse a message as soon as its length is
    /// known to be too large. This method is also called with an empty `src`, and has to return
    /// `None` then.
    ///
    /// Leave the bytes of a message in `src` until it is complete. The connection uses them to
    /// recognize that part of a message has arrived. The time limit, the limits of a uid and the
    /// check that one process has written the whole message depend on that.
    ///
    /// # Errors
    /// An error if the bytes or descriptors do not belong to this protocol. The stream yields the
    /// error and ends. The bytes and descriptors that are left are dropped.
    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Self::Error>;

    /// Takes the next message after the end of the stream. It is called until it returns `None`.
    ///
    /// # Errors
    /// By default the errors of [`decode`](Self::decode), [`Error::UnexpectedEnd`] if bytes are
    /// left, and [`Error::UnclaimedFds`] if descriptors are left.
    fn decode_eof(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Self::Error> {
        match self.decode(src, fds)? {
            Some(item) => Ok(Some(item)),
            None if !src.is_empty() => Err(Error::UnexpectedEnd { bytes: src.len() }.into()),
            None if !fds.is_empty() => Err(Error::UnclaimedFds { fds: fds.len() }.into()),
            None => Ok(None),
        }
    }

    /// Returns the number of bytes that are missing of the message at the start of `src`. The
    /// default is `None`, which means that the number is not known. If it is known, the connection
    /// reserves room for the rest of a large message at once. This is the counterpart of
    /// [`SendBuf::announce_length`].
    ///
    /// This method is called after [`decode`](Self::decode) has returned `None`. Numbers above
    /// [`max_payload_bytes`](Limits#structfield.max_payload_bytes) are reduced to that limit. If a
    /// peer announces lengths and this method does not return them, the peer sends packets that are
    /// larger than the room for them.
    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        let _ = src;
        None
    }

    /// Returns the greatest number of bytes to receive at once. 0 counts as 1. By default, only the
    /// room in the buffer is the limit, which may be more than
    /// [`missing_bytes`](Self::missing_bytes).
    ///
    /// A protocol of packets returns the length of its longest packet. The tail of a longer packet
    /// is lost, and the stream ends with [`Error::TruncatedPacket`].
    fn max_receive_bytes(&self) -> usize {
        usize::MAX
    }
}

/// Encodes messages as bytes and descriptors: `tokio_util`'s `Encoder` with descriptors.
///
/// `F` is the type of a descriptor that is sent, which is [`SendFd`] on a socket. Items may contain
/// descriptors of another type that converts into `F`, such as the [`OwnedFd`] of a received
/// message.
pub trait Encoder<Item, F = SendFd>: Codec {
    /// The error for an item that cannot be sent.
    type Error: From<Error>;

    /// Appends one message to `dst`. A message without bytes and descriptors is not sent.
    ///
    /// # Errors
    /// An error if the item can't be sent. The item should come back in the error, so check it
    /// before you write.
    ///
    /// After an error or a panic, everything that this call has written to `dst` is removed and its
    /// descriptors are closed.
    fn encode(
        &mut self,
        item: Item,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<Item, Self::Error>>;
}
