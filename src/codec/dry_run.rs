//! A connection without a socket, for tests of codecs.

use bytes::{Bytes, BytesMut};

use super::{Carrier, Encoder, SendBuf, largest_packet};
use crate::error::SendError;

/// A connection without a socket. It shows the system calls by which the messages of a codec are
/// sent.
///
/// A test of a codec against its own decoder passes with any [`Grouping`](super::Grouping), because
/// that decoder takes descriptors in their order. What a foreign receiver gets in each call depends
/// on the grouping, on other messages that wait, and on short writes. A dry run shows all of that,
/// with integers for descriptors.
///
/// [`encode`](Self::encode) accepts messages as a connection does. The iterator yields the calls
/// that send them. On a stream, [`next_short`](Self::next_short) returns a call of which the kernel
/// takes fewer bytes than planned.
///
/// ```
/// use fdwire::{Error, SendError, codec::{Codec, DryRun, Encoder, SendBuf}};
///
/// /// A line of text, and maybe a descriptor with its first byte.
/// struct Lines;
///
/// impl Codec for Lines {}
///
/// impl<F> Encoder<(&'static str, Option<F>), F> for Lines {
///     type Error = Error;
///
///     fn encode(
///         &mut self,
///         (line, fd): (&'static str, Option<F>),
///         dst: &mut SendBuf<F>,
///     ) -> Result<(), SendError<(&'static str, Option<F>)>> {
///         dst.put_slice(line.as_bytes());
///         dst.put_slice(b"\n");
///         dst.put_fds(fd);
///         Ok(())
///     }
/// }
///
/// let mut run = DryRun::stream();
/// for message in [("one", None), ("two", Some(7)), ("three", None), ("four", Some(8))] {
///     run.encode(&mut Lines, message)?;
/// }
/// let call = run.next().ok_or("nothing waits")?;
/// assert_eq!((&call.bytes[..], &call.fds[..]), (&b"one\n"[..], &[][..]));
/// let call = run.next_short(2).ok_or("nothing waits")?;
/// // Descriptors are sent even so.
/// assert_eq!((&call.bytes[..], &call.fds[..]), (&b"tw"[..], &[7][..]));
/// let rest: Vec<_> = run.map(|call| (call.bytes, call.fds)).collect();
/// assert_eq!(rest, [("o\nthree\n".into(), vec![]), ("four\n".into(), vec![8])]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DryRun<F> {
    buf: SendBuf<F>,
    carrier: Carrier,
}

/// The bytes and descriptors of one `sendmsg`. The descriptors are attached to its first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SendCall<F> {
    /// The bytes that the kernel has taken. On SEQPACKET they are a packet.
    pub bytes: Bytes,
    /// The descriptors.
    pub fds: Vec<F>,
}

impl<F> DryRun<F> {
    /// Returns a connection over a STREAM socket.
    pub fn stream() -> Self {
        Self { buf: SendBuf::new(), carrier: Carrier::Stream }
    }

    /// Returns a connection over a SEQPACKET socket with a send buffer of this many bytes
    /// (`SO_SNDBUF`; 212,992 on most systems).
    pub fn packets(send_buffer_bytes: usize) -> Self {
        let mut buf = SendBuf::new();
        buf.set_max_packet_bytes(Some(largest_packet(send_buffer_bytes)));
        Self { buf, carrier: Carrier::packets(send_buffer_bytes) }
    }

    /// Accepts an item, as a connection does before it is flushed. Any number of messages may wait
    /// here. A real connection begins to send when its [`Limits`](crate::Limits) are reached.
    ///
    /// # Errors
    /// The errors of the encoder, and the error for a message that no call can carry. Then nothing
    /// of the item is left.
    pub fn encode<I, E: Encoder<I, F>>(
        &mut self,
        encoder: &mut E,
        item: I,
    ) -> Result<(), SendError<I, E::Error>> {
        self.buf.encode_with(encoder, item, drop)
    }

    /// Returns the next call, of which the kernel takes at most `bytes` bytes, but at least one,
    /// and all descriptors. A packet is always taken whole.
    pub fn next_short(&mut self, bytes: usize) -> Option<SendCall<F>> {
        let plan = self.buf.plan(self.carrier);
        if plan.bytes == 0 {
            return None;
        }
        let taken = match self.carrier {
            Carrier::Stream => bytes.clamp(1, plan.bytes),
            Carrier::Packets { .. } => plan.bytes,
        };
        let mut call = BytesMut::with_capacity(taken);
        self.buf.io_slices(taken).iter().for_each(|piece| call.extend_from_slice(piece));
        Some(SendCall { bytes: call.freeze(), fds: self.buf.sent(plan, taken).collect() })
    }
}

impl<F> Iterator for DryRun<F> {
    type Item = SendCall<F>;

    /// Returns the next call, which the kernel takes whole.
    fn next(&mut self) -> Option<SendCall<F>> {
        self.next_short(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        codec::{Codec, FrameCodec, PacketCodec},
        error::Error,
        frame::Frame,
    };

    fn frame(payload: usize, fds: &[i32]) -> Frame<i32> {
        Frame::from_parts(vec![7; payload], fds.iter().copied())
    }

    fn calls(run: DryRun<i32>) -> Vec<(usize, Vec<i32>)> {
        run.map(|call| (call.bytes.len(), call.fds)).collect()
    }

    #[test]
    fn frames_share_a_call_with_all_their_descriptors() {
        for mut run in [DryRun::stream(), DryRun::packets(212_992)] {
            for (payload, fds) in [(10, &[1, 2][..]), (0, &[]), (20, &[3])] {
                run.encode(&mut FrameCodec::default(), frame(payload, fds)).unwrap();
            }
            assert_eq!(calls(run), [(54, vec![1, 2, 3])]);
        }
    }

    #[test]
    fn short_writes_keep_descriptors_with_bytes_that_are_not_ahead_of_them() {
        let mut run = DryRun::<i32>::stream();
        for first in [0, 200, 400] {
            run.encode(&mut FrameCodec::default(), frame(0, &Vec::from_iter(first..first + 200)))
                .unwrap();
        }
        // At most 253 descriptors are of frames of which no byte is sent.
        let sizes: Vec<usize> =
            std::iter::from_fn(|| run.next_short(1)).map(|call| call.fds.len()).collect();
        assert_eq!((sizes[..3].to_vec(), sizes.iter().sum::<usize>()), (vec![253, 200, 0], 600));
    }

    #[test]
    fn packets_stay_apart_and_have_a_largest_size() {
        let mut run = DryRun::packets(212_992);
        let mut codec = PacketCodec::default();
        run.encode(&mut codec, frame(10, &[1])).unwrap();
        run.encode(&mut codec, frame(100_000, &[2, 3])).unwrap();
        let refused = run.encode(&mut codec, frame(212_961, &[4])).unwrap_err();
        assert!(matches!(refused.error, Error::FrameTooLong { limit: 212_960, .. }));
        assert_eq!(calls(run), [(10, vec![1]), (100_000, vec![2, 3])]);
    }

    #[test]
    fn an_item_that_is_refused_half_way_leaves_nothing_behind() {
        struct Halfway;
        impl Codec for Halfway {}
        impl Encoder<bool, i32> for Halfway {
            type Error = Error;
            fn encode(
                &mut self,
                good: bool,
                dst: &mut SendBuf<i32>,
            ) -> Result<(), SendError<bool>> {
                dst.put_slice(b"half");
                dst.put_fd(1);
                dst.end_part();
                dst.put_fd(2);
                if good {
                    dst.put_slice(b"whole"); // or the second part is a descriptor without a byte
                }
                Ok(())
            }
        }
        let mut run = DryRun::<i32>::stream();
        assert!(matches!(
            run.encode(&mut Halfway, false).unwrap_err().error,
            Error::TooManyFdsForLength { fds: 1, bytes: 0 }
        ));
        run.encode(&mut Halfway, true).unwrap();
        assert_eq!(calls(run), [(4, vec![1]), (5, vec![2])]);
    }
}
