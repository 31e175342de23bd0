//! A connection that the application dispatches, and the error that returns it.

use std::{
    fmt, io,
    os::{fd::OwnedFd, unix},
};

use bytes::Bytes;

use super::{Group, Transport, key::key_of, protocol::RejectReason};

/// An accepted connection to be [dispatched](super::Dispatcher::dispatch): a stream, and facts
/// about it for the worker.
///
/// It is made from a `TcpStream` or `UnixStream` of tokio or std. A stream of tokio leaves its
/// event loop here. A stream of std becomes non-blocking, for all copies of the connection.
///
/// ```no_run
/// # async fn example(
/// #     dispatcher: fdwire::handoff::Dispatcher, stream: tokio::net::TcpStream, head: Vec<u8>,
/// # ) -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::handoff::Accepted;
///
/// let connection = Accepted::from(stream).with_prefix(head).metadata("tenant 7").key("7");
/// dispatcher.dispatch(connection).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Accepted {
    /// The socket, or the error of taking it out of its event loop.
    pub(super) socket: io::Result<OwnedFd>,
    pub(super) attributes: Attributes,
}

/// The facts about an [`Accepted`] beside its descriptor.
#[derive(Debug)]
pub(super) struct Attributes {
    pub(super) transport: Transport,
    pub(super) prefix: Bytes,
    pub(super) metadata: Bytes,
    pub(super) key: Option<u64>,
    pub(super) group: Option<Group>,
    pub(super) bundle: Vec<OwnedFd>,
}

impl Attributes {
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            prefix: Bytes::new(),
            metadata: Bytes::new(),
            key: None,
            group: None,
            bundle: Vec::new(),
        }
    }
}

impl Accepted {
    fn new(socket: io::Result<OwnedFd>, transport: Transport) -> Self {
        Self { socket, attributes: Attributes::new(transport) }
    }

    /// Adds bytes that were already read from the connection. The worker's application reads them
    /// first.
    /// Together with the metadata it has to fit one message, of
    /// [`MAX_MESSAGE_BYTES`](super::protocol::MAX_MESSAGE_BYTES).
    #[must_use]
    pub fn with_prefix(mut self, bytes: impl Into<Bytes>) -> Self {
        self.attributes.prefix = bytes.into();
        self
    }

    /// Sets the metadata, bytes for the worker's application.
    #[must_use]
    pub fn metadata(mut self, metadata: impl Into<Bytes>) -> Self {
        self.attributes.metadata = metadata.into();
        self
    }

    /// Sets the key by which [`Strategy::ByKey`](super::Strategy::ByKey) chooses a worker. By
    /// default it is the client's address without its port.
    ///
    /// Connections whose keys have the same bytes have the same key. The choice depends only on
    /// these bytes and on the ids of the workers. It stays the same if the dispatcher is built with
    /// another release of Rust.
    #[must_use]
    pub fn key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.attributes.key = Some(key_of(key.as_ref()));
        self
    }

    /// Sets the group whose workers may get the connection. By default it is the group of the
    /// [`Dispatcher`](super::Dispatcher::in_group) that takes it.
    #[must_use]
    pub fn group(mut self, group: impl Into<Group>) -> Self {
        self.attributes.group = Some(group.into());
        self
    }

    /// Adds a descriptor that belongs to the connection, such as the upstream connection of a
    /// proxy's client. A worker adopts them together, and finds them in
    /// [`Connection::bundle_mut`](crate::handoff::Connection::bundle_mut), in this order. Describe
    /// them in the metadata if the worker has to know which is which.
    ///
    /// Only workers that [take that many](crate::handoff::IncomingBuilder::max_fds) get the
    /// connection. The connection and its bundle have at most
    /// [`MAX_OFFER_FDS`](super::protocol::MAX_OFFER_FDS) descriptors.
    #[must_use]
    pub fn with_fd(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.attributes.bundle.push(fd.into());
        self
    }

    /// Returns the connection itself, which converts into a `TcpStream` or `UnixStream` of std.
    ///
    /// # Errors
    /// The error of taking the stream out of its event loop.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        self.socket
    }
}

impl From<std::net::TcpStream> for Accepted {
    fn from(stream: std::net::TcpStream) -> Self {
        Self::new(stream.set_nonblocking(true).map(|()| stream.into()), Transport::Tcp)
    }
}

impl From<unix::net::UnixStream> for Accepted {
    fn from(stream: unix::net::UnixStream) -> Self {
        Self::new(stream.set_nonblocking(true).map(|()| stream.into()), Transport::UnixStream)
    }
}

impl From<tokio::net::TcpStream> for Accepted {
    fn from(stream: tokio::net::TcpStream) -> Self {
        Self::new(stream.into_std().map(OwnedFd::from), Transport::Tcp)
    }
}

impl From<tokio::net::UnixStream> for Accepted {
    fn from(stream: tokio::net::UnixStream) -> Self {
        Self::new(stream.into_std().map(OwnedFd::from), Transport::UnixStream)
    }
}

/// A connection was not handed over. The error returns it, with everything that belongs to it.
#[derive(Debug, thiserror::Error)]
#[error("connection was not handed over")]
pub struct DispatchError {
    /// The reason.
    #[source]
    pub reason: NotDispatched,
    /// The connection. A worker that was cut off may still hold a copy. So if you do not serve the
    /// connection, shut it down instead of only dropping it.
    pub connection: Accepted,
}

/// The reason for which a connection was not handed over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotDispatched {
    /// Every worker that takes connections died, hung or misbehaved while it had this one, or could
    /// not use it.
    #[error("offered {offers} times, most recently {last}")]
    TooManyOffers {
        /// The number of times that it was offered.
        offers: u32,
        /// The outcome of the last offer.
        last: Unadopted,
    },
    /// The dispatcher drains, and takes no more connections.
    #[error("the dispatcher drains")]
    Draining,
    /// The socket is no connection: it listens, or was never connected.
    #[error("the socket is not connected")]
    NotConnected,
    /// The connection cannot be sent: its prefix and metadata are too long, it has too many
    /// descriptors, or it could not leave its event loop.
    #[error(transparent)]
    Unsendable(#[from] crate::Error),
}

/// The outcome of an offer that was not adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unadopted {
    /// The worker rejected it.
    Rejected(RejectReason),
    /// The worker died, hung or misbehaved before it had answered.
    Unanswered,
}

impl fmt::Display for Unadopted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(RejectReason::Full) => f.write_str("rejected: full"),
            Self::Rejected(RejectReason::Draining) => f.write_str("rejected: draining"),
            Self::Rejected(RejectReason::Recalled) => f.write_str("rejected when it was recalled"),
            Self::Rejected(RejectReason::Unusable) => f.write_str("rejected: unusable"),
            Self::Rejected(RejectReason::Other(reason)) => {
                write!(f, "rejected for reason {reason}")
            }
            Self::Unanswered => f.write_str("left unanswered"),
        }
    }
}
