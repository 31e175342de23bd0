//! Framed messages that carry open file descriptors between processes on one host.

mod codec;
mod error;
mod frame;
mod framed;
mod limits;
mod socket;
mod sys;

pub use codec::{Codec, Decoder, Encoder, FdQueue, FrameCodec, SendBuf};
pub use error::{Error, SendError};
pub use frame::{Fds, Frame, IntoIter};
pub use framed::{Framed, Parts, Permit, ReadHalf, ReuniteError, WriteHalf};
pub use limits::Limits;
pub use socket::{Listener, PeerCred, Socket, SocketKind};
