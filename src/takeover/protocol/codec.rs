//! Conversion between messages and frames.

use bytes::{Bytes, BytesMut};

use super::{
    AbortReason, FromTaker, Identity, Lane, MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, Offered, Refusal,
    ToTaker,
};
use crate::{
    Error, Fds, Frame, FrameCodec, Limits, SendError,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
    fields::Fields,
};

/// The first bytes of a HELLO, after its type.
const MAGIC: [u8; 4] = *b"FDTO";

/// The length in bytes of the fields of one lane.
const LANE_BYTES: usize = 8;

/// The taker's codec: [`ToTaker`] in, [`FromTaker`] out.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Framed, Socket, SocketKind, takeover::protocol::*};
/// use futures::{SinkExt, StreamExt};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut taker = Framed::new(a, TakerCodec::default());
/// let mut giver = Framed::new(b, GiverCodec::default());
///
/// taker.send(FromTaker::Hello { lowest: LOWEST_VERSION, highest: HIGHEST_VERSION }).await?;
/// assert!(matches!(giver.next().await, Some(Ok(FromTaker::Hello { lowest: 1, .. }))));
/// giver.send(ToTaker::Refused { reason: Refusal::Busy }).await?;
/// assert!(matches!(taker.next().await, Some(Ok(ToTaker::Refused { .. }))));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct TakerCodec(());

/// The giver's codec: [`FromTaker`] in, [`ToTaker`] out. See [`TakerCodec`].
#[derive(Debug, Clone, Copy, Default)]
pub struct GiverCodec(());

fn limits() -> Limits {
    Limits::default().max_payload_bytes(MAX_MESSAGE_BYTES).max_fds_per_frame(MAX_MESSAGE_FDS)
}

fn frames() -> FrameCodec {
    FrameCodec::new(limits())
}

impl Codec for TakerCodec {
    fn limits(&self) -> Limits {
        limits()
    }

    /// Returns `Free`: the header of a frame has the number of its descriptors, so several frames
    /// with descriptors may share a system call.
    fn grouping(&self) -> Grouping {
        Grouping::Free
    }
}

impl Codec for GiverCodec {
    fn limits(&self) -> Limits {
        limits()
    }

    /// Returns `Free`: the header of a frame has the number of its descriptors, so several frames
    /// with descriptors may share a system call.
    fn grouping(&self) -> Grouping {
        Grouping::Free
    }
}

impl<F> Decoder<F> for TakerCodec {
    type Item = ToTaker<F>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<ToTaker<F>>, Error> {
        let Some(frame) = frames().decode(src, fds)? else { return Ok(None) };
        ToTaker::read(&frame.payload, frame.fds).map(Some).map_err(|unclaimed| {
            // Descriptors that are left in the queue are closed away from the runtime.
            fds.extend(unclaimed);
            Error::invalid("not a message of a takeover's giver")
        })
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<FromTaker, F> for TakerCodec {
    type Error = Error;

    fn encode(
        &mut self,
        message: FromTaker,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<FromTaker>> {
        let frame = Frame::<F> { payload: message.to_payload().into(), fds: Fds::default() };
        frames().encode(frame, dst).map_err(|refused| SendError::refused(message, refused.error))
    }
}

impl<F> Decoder<F> for GiverCodec {
    type Item = FromTaker;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<FromTaker>, Error> {
        // No message of a taker has a descriptor. Report that at once, without waiting for the rest
        // of a message.
        if !fds.is_empty() {
            return Err(Error::UnclaimedFds { fds: fds.len() });
        }
        let Some(frame) = frames().decode(src, fds)? else { return Ok(None) };
        FromTaker::read(&frame.payload)
            .map(Some)
            .ok_or_else(|| Error::invalid("not a message of a takeover's taker"))
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> Encoder<ToTaker<F>, F> for GiverCodec {
    type Error = Error;

    /// # Errors
    /// [`Error::FrameTooLong`] for more than [`MAX_MESSAGE_BYTES`], and [`Error::TooManyFds`] for
    /// more than [`MAX_MESSAGE_FDS`]. The error does not contain the message.
    fn encode(
        &mut self,
        message: ToTaker<F>,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<ToTaker<F>>> {
        let frame = message.into_frame()?;
        frames().encode(frame, dst).map_err(|refused| SendError::from(refused.error))
    }
}

impl FromTaker {
    fn to_payload(&self) -> Vec<u8> {
        let mut dst = Vec::with_capacity(16);
        match self {
            Self::Hello { lowest, highest } => {
                dst.push(0x01);
                dst.extend(MAGIC);
                dst.extend([lowest, highest]);
            }
            Self::Decline { number } => {
                dst.push(0x02);
                dst.extend(number.to_be_bytes());
            }
            Self::Ready => dst.push(0x03),
            Self::HandBack { baton } => {
                dst.push(0x04);
                dst.extend(baton);
            }
            Self::Release => dst.push(0x05),
            Self::Status => dst.push(0x06),
        }
        dst
    }

    fn read(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let message = match fields.u8()? {
            0x01 if fields.array()? == MAGIC => {
                Self::Hello { lowest: fields.u8()?, highest: fields.u8()? }
            }
            0x02 => Self::Decline { number: fields.u32()? },
            0x03 => Self::Ready,
            0x04 => Self::HandBack { baton: Bytes::copy_from_slice(fields.rest()) },
            0x05 => Self::Release,
            0x06 => Self::Status,
            _ => return None,
        };
        fields.is_at_end().then_some(message)
    }
}

impl<F> ToTaker<F> {
    pub(super) fn into_frame(self) -> Result<Frame<F>, Error> {
        let mut dst = Vec::with_capacity(64);
        let mut carried = Fds::default();
        // The types and fields are those of the tables in protocol.md.
        match self {
            Self::Welcome { version, listeners } => {
                dst.extend([0x81, version]);
                dst.extend(listeners.to_be_bytes());
            }
            Self::Refused { reason } => dst.extend([0x82, reason.number()]),
            Self::Listeners(listeners) => {
                dst.push(0x83);
                for Offered { identity, cookie, path_id, fd } in listeners {
                    identity.put(&mut dst)?;
                    dst.extend(cookie.to_be_bytes());
                    dst.push(path_id.is_some().into());
                    if let Some((device, inode)) = path_id {
                        dst.extend(device.to_be_bytes());
                        dst.extend(inode.to_be_bytes());
                    }
                    carried.push(fd);
                }
            }
            Self::State { bytes, fds } => {
                dst.push(0x84);
                dst.extend(bytes);
                carried = fds;
            }
            Self::Workers { bytes, fds } => {
                dst.push(0x8E);
                dst.extend(bytes);
                carried = fds;
            }
            Self::Complete => dst.push(0x85),
            Self::Aborted { reason } => dst.extend([0x86, reason.number()]),
            Self::Locks { fds } => {
                dst.push(0x87);
                carried = fds;
            }
            Self::Commit { baton, fds } => {
                dst.push(0x88);
                dst.extend(baton);
                carried = fds;
            }
            Self::Resumed => dst.push(0x89),
            Self::Drained => dst.push(0x8A),
            Self::Generations { replaced_for, fds } => {
                dst.push(0x8B);
                replaced_for.iter().for_each(|milliseconds| dst.extend(milliseconds.to_be_bytes()));
                carried = fds;
            }
            Self::Status { pid, takeover_in_progress, generations } => {
                dst.push(0x8C);
                dst.extend(pid.to_be_bytes());
                dst.push(takeover_in_progress.into());
                for (pid, milliseconds) in generations {
                    dst.extend(pid.to_be_bytes());
                    dst.extend(milliseconds.to_be_bytes());
                }
            }
            Self::Lanes { generation, giver, lanes } => {
                dst.push(0x8D);
                dst.extend(generation.to_be_bytes());
                dst.extend(giver.to_be_bytes());
                for Lane { listener, generation, fd } in lanes {
                    dst.extend(listener.to_be_bytes());
                    dst.extend(generation.to_be_bytes());
                    carried.push(fd);
                }
            }
        }
        Ok(Frame { payload: dst.into(), fds: carried })
    }

    /// Reads a message. Returns the descriptors if the payload is not one.
    fn read(payload: &[u8], fds: Fds<F>) -> Result<Self, Fds<F>> {
        let mut fields = Fields(payload);
        match fields.u8() {
            Some(0x83) => {
                // One description for each descriptor.
                let mut described = Vec::with_capacity(fds.len());
                while !fields.is_at_end() {
                    let Some(listener) = Offered::read(&mut fields) else { return Err(fds) };
                    described.push(listener);
                }
                if described.len() != fds.len() || described.is_empty() {
                    return Err(fds);
                }
                let with_fds =
                    described.into_iter().zip(fds).map(|(listener, fd)| listener.with_fd(|()| fd));
                Ok(Self::Listeners(with_fds.collect()))
            }
            // The bytes are copied, because a slice would keep the whole read buffer in memory.
            Some(0x84) => Ok(Self::State { bytes: Bytes::copy_from_slice(fields.rest()), fds }),
            Some(0x8E) => Ok(Self::Workers { bytes: Bytes::copy_from_slice(fields.rest()), fds }),
            Some(0x87) if fields.is_at_end() && !fds.is_empty() => Ok(Self::Locks { fds }),
            Some(0x88) => Ok(Self::Commit { baton: Bytes::copy_from_slice(fields.rest()), fds }),
            Some(0x8B) => {
                let mut replaced_for = Vec::with_capacity(fds.len());
                while let Some(milliseconds) = fields.u64() {
                    replaced_for.push(milliseconds);
                }
                match fields.is_at_end() && replaced_for.len() == fds.len() && !fds.is_empty() {
                    true => Ok(Self::Generations { replaced_for, fds }),
                    false => Err(fds),
                }
            }
            Some(0x8D) => {
                let (Some(generation), Some(giver)) = (fields.u32(), fields.u32()) else {
                    return Err(fds);
                };
                if fields.0.len() != fds.len() * LANE_BYTES {
                    return Err(fds);
                }
                let lane =
                    |fd| Some(Lane { listener: fields.u32()?, generation: fields.u32()?, fd });
                Ok(Self::Lanes {
                    generation,
                    giver,
                    lanes: fds.into_iter().filter_map(lane).collect(),
                })
            }
            _ if !fds.is_empty() => Err(fds),
            _ => Self::read_without_fds(payload).ok_or(fds),
        }
    }

    /// Reads a message that has no descriptors.
    fn read_without_fds(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let message = match fields.u8()? {
            0x81 => Self::Welcome { version: fields.u8()?, listeners: fields.u32()? },
            0x82 => Self::Refused { reason: Refusal::from_number(fields.u8()?)? },
            0x85 => Self::Complete,
            0x86 => Self::Aborted { reason: AbortReason::from_number(fields.u8()?)? },
            0x89 => Self::Resumed,
            0x8A => Self::Drained,
            0x8C => {
                let (pid, takeover_in_progress) = (fields.u32()?, fields.bool()?);
                let mut generations = Vec::new();
                while !fields.is_at_end() {
                    generations.push((fields.u32()?, fields.u64()?));
                }
                Self::Status { pid, takeover_in_progress, generations }
            }
            _ => return None,
        };
        fields.is_at_end().then_some(message)
    }
}

impl Offered<()> {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            identity: Identity::read(fields)?,
            cookie: fields.u64()?,
            path_id: match fields.u8()? {
                0 => None,
                1 => Some((fields.u64()?, fields.u64()?)),
                _ => return None,
            },
            fd: (),
        })
    }
}

impl Refusal {
    pub(super) const ALL: [Self; 2] = [Self::Busy, Self::Version];

    fn number(self) -> u8 {
        match self {
            Self::Busy => 1,
            Self::Version => 2,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.number() == number)
    }
}

impl AbortReason {
    pub(super) const ALL: [Self; 4] =
        [Self::TimedOut, Self::Misbehaved, Self::Withdrawn, Self::Failed];

    fn number(self) -> u8 {
        match self {
            Self::TimedOut => 1,
            Self::Misbehaved => 2,
            Self::Withdrawn => 3,
            Self::Failed => 4,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.number() == number)
    }
}
