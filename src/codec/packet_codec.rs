//! A codec without a header.

use bytes::{Bytes, BytesMut};

use super::{Codec, Decoder, Encoder, FdQueue, Grouping, LARGEST_PACKET, SendBuf};
use crate::{
    error::{Error, SendError},
    frame::Frame,
    limits::Limits,
};

/// A codec without a header. On SEQPACKET, a packet is a message. On STREAM, the bytes that arrive
/// together are a message.
///
/// Use it for peers that send packets, and for plain bytes with descriptors. The kernel keeps the
/// bytes and descriptors of a packet together. On a stream it only keeps the order of the
/// descriptors, and the application has to find the ends of messages in the bytes.
///
/// If a connection changes to this codec, the bytes that were received before become one message,
/// even if they came in several packets. An empty message cannot be sent. A packet that is longer
/// than the limit on payloads (256 KiB by default) loses its tail and ends the stream with
/// [`Error::TruncatedPacket`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Frame, Framed, Socket, SocketKind, codec::PacketCodec};
/// use futures::{SinkExt, StreamExt};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut a = Framed::new(a, PacketCodec::default());
/// let mut b = Framed::new(b, PacketCodec::default());
/// a.send_all(&mut futures::stream::iter([Ok(Frame::new("one")), Ok(Frame::new("two"))])).await?;
/// assert_eq!(b.next().await.ok_or("gone")??.payload, "one");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct PacketCodec {
    limits: Limits,
}

impl PacketCodec {
    /// Returns a codec for messages within these limits, in both directions. Each receive needs
    /// room for the longest message, so a large limit costs memory: up to 4 MiB, which no packet
    /// exceeds.
    pub const fn new(limits: Limits) -> Self {
        Self { limits }
    }

    /// Returns the greatest length of a message. It is never zero, because a receive without room
    /// would look like the end of the stream.
    fn max_bytes(&self) -> usize {
        self.limits.max_payload_bytes.clamp(1, LARGEST_PACKET)
    }
}

impl Default for PacketCodec {
    /// Returns a codec for messages of up to 256 KiB. That is more than a packet can hold with the
    /// default send buffer of Linux.
    fn default() -> Self {
        Self::new(Limits::default().max_payload_bytes(256 << 10))
    }
}

impl Codec for PacketCodec {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns `Alone`, because a packet is a message. On a stream the bytes and descriptors of a
    /// message stay in one call.
    fn grouping(&self) -> Grouping {
        Grouping::Alone
    }
}

impl<F> Decoder<F> for PacketCodec {
    type Item = Frame<F>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Frame<F>>, Error> {
        /// Shorter messages are copied out of the buffer. Otherwise the room for the longest packet
        /// would have to be allocated again for each message.
        const SLICE_FROM: usize = 4096;

        if src.is_empty() {
            return Ok(None);
        }
        if fds.count() > self.limits.max_fds_per_frame {
            return Err(Error::TooManyFds {
                fds: fds.count(),
                limit: self.limits.max_fds_per_frame,
            });
        }
        let payload = if src.len() < SLICE_FROM.min(self.limits.max_payload_bytes) {
            let copy = Bytes::copy_from_slice(src);
            src.clear();
            copy
        } else {
            // More bytes than the limit can only be left from another codec.
            src.split_to(src.len().min(self.limits.max_payload_bytes.max(1))).freeze()
        };
        Ok(Some(Frame { payload, fds: fds.take_all() }))
    }

    fn missing_bytes(&self, _src: &BytesMut) -> Option<usize> {
        Some(self.max_bytes())
    }

    fn max_receive_bytes(&self) -> usize {
        self.max_bytes()
    }
}

impl<F, G: From<F>> Encoder<Frame<F>, G> for PacketCodec {
    type Error = Error;

    fn encode(&mut self, frame: Frame<F>, dst: &mut SendBuf<G>) -> Result<(), SendError<Frame<F>>> {
        let bytes = frame.payload.len();
        let limit = self.limits.max_payload_bytes.min(dst.max_packet_bytes().unwrap_or(usize::MAX));
        if bytes == 0 {
            return Err(SendError::refused(frame, Error::EmptyMessage));
        }
        if bytes > limit {
            return Err(SendError::refused(frame, Error::FrameTooLong { bytes, limit }));
        }
        if frame.fds.len() > self.limits.max_fds_per_frame {
            let (fds, limit) = (frame.fds.len(), self.limits.max_fds_per_frame);
            return Err(SendError::refused(frame, Error::TooManyFds { fds, limit }));
        }
        dst.put_shared(frame.payload);
        dst.put_fds(frame.fds);
        Ok(())
    }
}
