//! The errors of a connection.

use std::{fmt, io};

/// An error of a connection, with one variant for each fault.
///
/// An error is final for the direction in which it occurred, except [`TimedOut`](Self::TimedOut). A
/// [`Stream`](futures::Stream) yields its error once and then ends. Everything that was received
/// and not yet yielded is closed. A [`Sink`](futures::Sink) that has failed repeats its error, and
/// each further item comes back in a [`SendError`].
///
/// An `Error` converts into [`io::Error`], for functions that return `io::Result`. Your own codecs
/// may use the variants too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),

    /// A frame does not begin with the magic byte: the peer uses another protocol, or bytes were
    /// lost.
    #[error("bad magic byte {found:#04x} where a frame should begin")]
    BadMagic {
        /// The byte that was found.
        found: u8,
    },

    /// A frame has a version of the wire format that this crate does not support.
    #[error("wire format version {found} is not supported")]
    UnsupportedVersion {
        /// The version in the frame's header.
        found: u8,
    },

    /// A frame has flags that have no meaning in this version of the wire format.
    #[error("frame flags {found:#03x} are not supported")]
    UnsupportedFlags {
        /// The flags in the frame's header, a number of 4 bits.
        found: u8,
    },

    /// The payload of a frame is longer than
    /// [`Limits::max_payload_bytes`](crate::Limits#structfield.max_payload_bytes).
    #[error("frame payload of {bytes} bytes is over the limit of {limit}")]
    FrameTooLong {
        /// The length of the payload in bytes.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
    },

    /// A frame has more descriptors than
    /// [`Limits::max_fds_per_frame`](crate::Limits#structfield.max_fds_per_frame).
    #[error("frame with {fds} descriptors is over the limit of {limit}")]
    TooManyFds {
        /// The number of descriptors of the frame.
        fds: usize,
        /// The limit.
        limit: usize,
    },

    /// A message, or a [part](crate::codec::SendBuf::end_part) of one, has more descriptors than
    /// its bytes can carry. One `sendmsg` takes at most 253 descriptors and has to carry at least
    /// one byte.
    #[error(
        "{fds} descriptors are too many for a message of {bytes} bytes: \
         each byte carries at most 253"
    )]
    TooManyFdsForLength {
        /// The number of descriptors of the message or part.
        fds: usize,
        /// The length of the whole message or part in bytes, its header included.
        bytes: usize,
    },

    /// A message without bytes can't be sent as a packet. The receiver would take an empty packet
    /// for the end of the stream.
    #[error("an empty message cannot be sent as a packet")]
    EmptyMessage,

    /// A frame is complete, but fewer descriptors arrived than its header announces.
    #[error("frame needs {expected} descriptors, {received} arrived")]
    MissingFds {
        /// The number of descriptors in the frame's header.
        expected: usize,
        /// The number of descriptors that had arrived.
        received: usize,
    },

    /// Descriptors arrived that no message claims. Their number is more than
    /// [`Limits::max_queued_fds`](crate::Limits#structfield.max_queued_fds), or they were left at
    /// the end of the stream.
    #[error("{fds} descriptors arrived that no message claims")]
    UnclaimedFds {
        /// The number of unclaimed descriptors. All of them are closed.
        fds: usize,
    },

    /// The kernel lost descriptors on receipt (`MSG_CTRUNC`). A connection ends, because later
    /// descriptors would be assigned to the wrong frames. A
    /// [`DatagramSocket`](crate::socket::DatagramSocket) still receives the next datagram.
    #[error(
        "descriptors were lost on receipt (control data truncated); \
         the likely cause is this process's RLIMIT_NOFILE"
    )]
    TruncatedControl,

    /// A packet was longer than the room for it (`MSG_TRUNC`), because the peer violates the packet
    /// sizes of the wire format. Or a datagram was longer than the limit of a
    /// [`DatagramSocket`](crate::socket::DatagramSocket), which still receives the next one.
    #[error("packet was longer than the room for it and lost its tail")]
    TruncatedPacket,

    /// The peer closed the connection inside a message.
    #[error("connection ended inside a message, {bytes} bytes of it had arrived")]
    UnexpectedEnd {
        /// The number of bytes of the unfinished message.
        bytes: usize,
    },

    /// The rest of a message did not arrive within
    /// [`Limits::max_unfinished_time`](crate::Limits#structfield.max_unfinished_time), or
    /// descriptors arrived that no message claimed within it.
    #[error(
        "message is still unfinished: {bytes} bytes and {fds} descriptors of it arrived, \
         and nothing more in time"
    )]
    Unfinished {
        /// The number of bytes of the unfinished message.
        bytes: usize,
        /// The number of descriptors that no message has claimed. All of them are closed.
        fds: usize,
    },

    /// The connections of one uid hold more bytes or descriptors of unfinished messages than their
    /// listener allows ([`UidLimits`](crate::socket::UidLimits)). This connection received the last
    /// of them.
    #[error(
        "the connections of uid {uid} hold {bytes} bytes and {fds} descriptors of unfinished \
         messages, which is more than the listener allows"
    )]
    OverUidLimit {
        /// The uid of the peer.
        uid: u32,
        /// The number of bytes that the connections of the uid hold.
        bytes: usize,
        /// The number of descriptors that they hold.
        fds: usize,
    },

    /// A message was written by several processes, so it has no sender. This occurs only on a
    /// socket that is set to [report senders](crate::Socket::set_pass_credentials).
    #[error("a message was written by several processes, so it has no sender")]
    MixedSenders,

    /// The peer closed its end before it had read everything: the last messages, with their
    /// descriptors, did not arrive. The stream yields this error after everything that the peer had
    /// sent, and then ends.
    #[error("peer closed the connection without reading everything that was sent to it")]
    Reset,

    /// The time limit of a call in [`blocking`](crate::blocking) was reached. Nothing is lost: the
    /// next call goes on with the bytes that have arrived and the messages that were accepted for
    /// sending. This is the only error that is not final.
    #[error("the time set for this call is over")]
    TimedOut,

    /// A message is invalid in its protocol. A codec of your own can use this, made by
    /// [`invalid`](Self::invalid), if it needs no error type of its own.
    #[error("invalid message: {0}")]
    Invalid(Box<dyn std::error::Error + Send + Sync>),

    /// The sending side is closed.
    #[error("sending side is closed")]
    Closed,
}

impl Error {
    /// Returns true if the error only means that the peer is gone. The kernel reports that in
    /// several ways: [`Reset`](Self::Reset), [`UnexpectedEnd`](Self::UnexpectedEnd), and `EPIPE` or
    /// `ECONNRESET` from a send. A stream that ends between two messages ends without an error.
    pub fn is_peer_gone(&self) -> bool {
        match self {
            Self::Reset | Self::UnexpectedEnd { .. } => true,
            Self::Io(error) => {
                matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
            }
            _ => false,
        }
    }

    /// Returns [`Error::Invalid`] with a reason, which may be a text or an error.
    ///
    /// ```
    /// let error = fdwire::Error::invalid("no such command");
    /// assert_eq!(error.to_string(), "invalid message: no such command");
    /// ```
    pub fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Invalid(reason.into())
    }
}

/// Returns an error with the same number, or the same kind and message, which [`io::Error`] cannot
/// clone.
pub(crate) fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::Io(error) => return error,
            Error::UnexpectedEnd { .. } => io::ErrorKind::UnexpectedEof,
            Error::Reset => io::ErrorKind::ConnectionReset,
            Error::Unfinished { .. } | Error::TimedOut => io::ErrorKind::TimedOut,
            Error::Closed => io::ErrorKind::BrokenPipe,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

/// The error of a send, with the item if it was refused.
///
/// `item` is `Some` if the item was refused. Then nothing of it was sent, and it still has its
/// descriptors. It is `None` if the failure does not concern one item, as in a failed flush, or if
/// the encoder had already taken the item apart. Items that were accepted earlier and not sent are
/// in [`into_parts`](crate::Framed::into_parts).
///
/// A `SendError` converts into `E`, and for `E = Error` into [`io::Error`]. These conversions drop
/// the item, which closes its descriptors.
pub struct SendError<I, E = Error> {
    /// The reason.
    pub error: E,
    /// The item, if it was refused.
    pub item: Option<I>,
}

impl<I, E> SendError<I, E> {
    /// Returns an error that contains the refused item.
    pub fn refused(item: I, error: impl Into<E>) -> Self {
        Self { error: error.into(), item: Some(item) }
    }
}

impl<I, E> From<E> for SendError<I, E> {
    fn from(error: E) -> Self {
        Self { error, item: None }
    }
}

impl<I> From<SendError<I>> for Error {
    fn from(error: SendError<I>) -> Self {
        error.error
    }
}

impl<I> From<SendError<I>> for io::Error {
    fn from(error: SendError<I>) -> Self {
        error.error.into()
    }
}

impl<I, E: fmt::Debug> fmt::Debug for SendError<I, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendError")
            .field("error", &self.error)
            .field("refused", &self.item.is_some())
            .finish()
    }
}

impl<I, E: fmt::Display> fmt::Display for SendError<I, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<I, E: std::error::Error> std::error::Error for SendError<I, E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_small_enough_to_be_returned_by_value() {
        assert!(size_of::<Error>() <= 24);
        assert!(size_of::<SendError<crate::Frame>>() <= 96);
    }

    #[test]
    fn a_peer_that_is_gone_is_recognized() {
        assert!(Error::Reset.is_peer_gone());
        assert!(Error::from(io::Error::from_raw_os_error(nix::libc::EPIPE)).is_peer_gone());
        assert!(!Error::from(io::Error::from_raw_os_error(nix::libc::EPERM)).is_peer_gone());
        assert!(!Error::Closed.is_peer_gone());
    }

    #[test]
    fn an_io_error_keeps_its_number() {
        let error = Error::from(io::Error::from_raw_os_error(nix::libc::EPIPE));
        assert_eq!(io::Error::from(error).raw_os_error(), Some(nix::libc::EPIPE));
    }
}
