//! The errors of a takeover.

use std::{io, process::ExitStatus, time::Duration};

use super::{
    protocol::{AbortReason, Address, Family, Identity, Kind, Refusal},
    taker::Failure,
};

/// The reason why a process could not take over, or could not offer its listeners.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),

    /// The connection failed, or something came over it that is no message. If this process has no
    /// descriptor left for the listeners, that is
    /// [`TruncatedControl`](crate::Error::TruncatedControl).
    #[error("takeover connection failed: {0}")]
    Connection(#[source] crate::Error),

    /// The running server refuses.
    #[error("the running server refuses a takeover: {0}")]
    Refused(Refusal),

    /// The running server has called the takeover off, and goes on serving.
    #[error("the takeover was called off: {0}; the running server goes on")]
    Aborted(AbortReason),

    /// The running server has ended before its listeners were here.
    #[error("the running server ended before it had sent its listeners")]
    GiverGone,

    /// The connection to the running server has ended, and another process serves.
    #[error("the takeover ended, and another process serves")]
    AnotherServes,

    /// The running server did not answer in time.
    #[error("the running server did not answer in time")]
    TimedOut,

    /// The running server does not follow the protocol.
    #[error("the process at the path does not follow the takeover protocol")]
    Misbehaved,

    /// A process that was to serve has ended before it did.
    #[error("the new process ended before it served: {status}")]
    Ended {
        /// Its exit status.
        status: ExitStatus,
    },

    /// A process that was to serve did not do so in time, and was killed.
    #[error("the new process did not serve within {limit:?}, and was killed")]
    TooLate {
        /// The limit.
        limit: Duration,
    },

    /// The process at the path runs as a uid that this process does not take listeners from.
    #[error(
        "the process at the path runs as uid {uid}, which is not trusted; to trust it, use \
         `Options::allow_uids`"
    )]
    NotTrusted {
        /// The uid.
        uid: u32,
    },

    /// A socket is not the one that the running server has announced or, if a process manager has
    /// passed it, not the one that was asked for.
    #[error("listener {identity} is not the expected socket: {mismatch}")]
    Mismatch {
        /// The announcement, or the socket that the process manager has passed.
        identity: Box<Identity>,
        /// The difference.
        mismatch: Mismatch,
    },

    /// A listener could not be bound: its address is in use, or not allowed.
    #[error("listener {name:?} can't be bound to {address}: {source}")]
    Bind {
        /// The name of the listener.
        name: String,
        /// The address.
        address: Address,
        /// The error of bind(2), or of the calls around it.
        source: io::Error,
    },

    /// Two listeners have one name and one index.
    #[error("there are two listeners {name:?} {index}")]
    Duplicate {
        /// Their name.
        name: String,
        /// Their index.
        index: u32,
    },

    /// No listener has this name and index.
    #[error("there is no listener {name:?} {index}")]
    NoSuchListener {
        /// The name.
        name: String,
        /// The index.
        index: u32,
    },

    /// A listener was declined, and others with its address were not.
    #[error(
        "listener {identity} was declined, and others with its address were not: some clients \
         would wait without end"
    )]
    SplitGroup {
        /// The listener.
        identity: Box<Identity>,
    },

    /// A listener is of another kind than the one asked for.
    #[error("listener {identity} is not a {expected}")]
    WrongKind {
        /// The listener.
        identity: Box<Identity>,
        /// The kind that was asked for.
        expected: &'static str,
    },
}

/// A difference between the listener that was expected and the socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// The address family.
    #[error("its family is {found:?}, expected was {expected:?}")]
    Family {
        /// The value that was announced, or asked for.
        expected: Family,
        /// The socket's.
        found: Family,
    },
    /// The type of the socket.
    #[error("its type is {found}, expected was {expected}")]
    Kind {
        /// The value that was announced, or asked for.
        expected: Kind,
        /// The socket's.
        found: Kind,
    },
    /// The protocol number.
    #[error("its protocol is {found}, expected was {expected}")]
    Protocol {
        /// The value that was announced, or asked for.
        expected: u16,
        /// The socket's.
        found: u16,
    },
    /// The address or the port.
    #[error("its address is {found}, expected was {expected}")]
    Address {
        /// The value that was announced, or asked for.
        expected: Address,
        /// The socket's.
        found: Address,
    },
    /// The device.
    #[error("its device is {found:?}, expected was {expected:?}")]
    Device {
        /// The value that was announced, or asked for.
        expected: Option<String>,
        /// The socket's.
        found: Option<String>,
    },
    /// `IPV6_V6ONLY`.
    #[error("its IPV6_V6ONLY is {found:?}, expected was {expected:?}")]
    V6Only {
        /// The value that was announced, or asked for.
        expected: Option<bool>,
        /// The socket's.
        found: Option<bool>,
    },
    /// The socket itself: everything else is equal, for example in a `SO_REUSEPORT` group.
    #[error("its cookie is {found}, expected was {expected}")]
    Socket {
        /// The expected cookie (`SO_COOKIE`).
        expected: u64,
        /// The socket's.
        found: u64,
    },
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(reason) => Self::Refused(reason),
            Failure::Aborted(reason) => Self::Aborted(reason),
            Failure::GiverGone => Self::GiverGone,
            Failure::AnotherServes => Self::AnotherServes,
            Failure::TimedOut => Self::TimedOut,
            Failure::Misbehaved => Self::Misbehaved,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io(error) | Error::Bind { source: error, .. } => error.kind(),
            Error::TimedOut | Error::TooLate { .. } => io::ErrorKind::TimedOut,
            Error::NotTrusted { .. } => io::ErrorKind::PermissionDenied,
            Error::NoSuchListener { .. } => io::ErrorKind::NotFound,
            Error::GiverGone => io::ErrorKind::UnexpectedEof,
            Error::Refused(_) | Error::Aborted(_) | Error::AnotherServes => {
                io::ErrorKind::ResourceBusy
            }
            _ => io::ErrorKind::InvalidData,
        };
        match error {
            Error::Io(error) => error,
            error => Self::new(kind, error),
        }
    }
}
