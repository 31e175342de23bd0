//! The errors of a takeover.

use std::{io, process::ExitStatus, time::Duration};

use super::{
    protocol::{AbortReason, Address, Family, Identity, Kind, Refusal},
    steps::Failure,
};

/// The reason why a process could not take over, or could not offer its listeners.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),

    /// The connection failed, or something was received that is not a message. The source is
    /// [`TruncatedControl`](crate::Error::TruncatedControl) if this process had no descriptor left
    /// for the listeners.
    #[error("takeover connection failed: {0}")]
    Connection(#[source] crate::Error),

    /// The running server refuses the takeover.
    #[error("the running server refuses a takeover: {0}")]
    Refused(Refusal),

    /// The running server has called the takeover off, and goes on serving.
    #[error("the takeover was called off: {0}; the running server goes on")]
    Aborted(AbortReason),

    /// The running server has ended before all of its listeners were received.
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

    /// The process that [`launch`](super::launch) has started ended before it served.
    #[error("the new process ended before it served: {status}")]
    Ended {
        /// Its exit status.
        status: ExitStatus,
    },

    /// The process that [`launch`](super::launch) has started did not serve in time, and was
    /// killed.
    #[error("the new process did not serve within {limit:?}, and was killed")]
    TooLate {
        /// The limit.
        limit: Duration,
    },

    /// The process at the path runs as a uid that is not [trusted](super::Options::allow_uids).
    #[error(
        "the process at the path runs as uid {uid}, which is not trusted; to trust it, use \
         `Options::allow_uids`"
    )]
    NotTrusted {
        /// The uid.
        uid: u32,
    },

    /// A received socket differs from the announcement of the running server, or a socket that a
    /// process manager has passed is not of the requested type at the requested address.
    #[error("listener {identity} is not the expected socket: {mismatch}")]
    Mismatch {
        /// The announcement, or the socket that the process manager has passed.
        identity: Box<Identity>,
        /// The difference.
        mismatch: Mismatch,
    },

    /// A listener could not be bound, for example because its address is in use.
    #[error("listener {name:?} can't be bound to {address}: {source}")]
    Bind {
        /// The name of the listener.
        name: String,
        /// The address.
        address: Address,
        /// The error of bind(2), or of the calls around it.
        source: io::Error,
    },

    /// Two listeners have the same name and index.
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

    /// A listener was declined, but another one with the same address was not.
    #[error(
        "listener {identity} was declined, but another one with the same address was not: clients \
         of the declined one would wait without end; decline all of them or none"
    )]
    SplitGroup {
        /// The listener.
        identity: Box<Identity>,
    },

    /// A listener is not of the requested kind.
    #[error("listener {identity} is not a {expected}")]
    WrongKind {
        /// The listener.
        identity: Box<Identity>,
        /// The requested kind.
        expected: &'static str,
    },
}

/// The difference between an expected listener and the socket that was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// The address family.
    #[error("its family is {found:?}, expected was {expected:?}")]
    Family {
        /// The expected value.
        expected: Family,
        /// The value of the socket.
        found: Family,
    },
    /// The type of the socket.
    #[error("its type is {found}, expected was {expected}")]
    Kind {
        /// The expected value.
        expected: Kind,
        /// The value of the socket.
        found: Kind,
    },
    /// The protocol number.
    #[error("its protocol is {found}, expected was {expected}")]
    Protocol {
        /// The expected value.
        expected: u16,
        /// The value of the socket.
        found: u16,
    },
    /// The address or the port.
    #[error("its address is {found}, expected was {expected}")]
    Address {
        /// The expected value.
        expected: Address,
        /// The value of the socket.
        found: Address,
    },
    /// The device.
    #[error("its device is {found:?}, expected was {expected:?}")]
    Device {
        /// The expected value.
        expected: Option<String>,
        /// The value of the socket.
        found: Option<String>,
    },
    /// `IPV6_V6ONLY`.
    #[error("its IPV6_V6ONLY is {found:?}, expected was {expected:?}")]
    V6Only {
        /// The expected value.
        expected: Option<bool>,
        /// The value of the socket.
        found: Option<bool>,
    },
    /// It is another socket, although everything else is equal, as in a `SO_REUSEPORT` group.
    #[error("its cookie is {found}, expected was {expected}")]
    Socket {
        /// The expected cookie (`SO_COOKIE`).
        expected: u64,
        /// The value of the socket.
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
