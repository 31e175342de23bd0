//! A connection that is being handed over, with the dispatcher's copies of its descriptors.

use std::{
    io,
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{getsockopt, sockopt},
};
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::{
    Accepted, Address, DispatchError, Group, NotDispatched, Transport, WorkerId,
    accepted::Attributes,
    envelope::Envelope,
    key::key_of_client,
    pool::Needs,
    protocol::{MAX_MESSAGE_BYTES, MAX_OFFER_FDS, Offer},
};
use crate::{
    Error, SendFd, close_in_background,
    closer::close_sockets,
    error::copy_of,
    handoff::{ServingGuard, ending::end_connection, span::ConnectionSpan},
    sys,
};

/// Sends the outcome to the application that dispatched a connection.
type Reply = oneshot::Sender<Result<WorkerId, DispatchError>>;

/// The most bytes of an offer beside its prefix, its metadata and the name of its group, with some
/// to spare.
const MAX_OTHER_BYTES: usize = 512;

/// A connection that no worker has adopted: the contents of its offer, and the reply to the
/// application that waits for it.
#[derive(Debug)]
pub(super) struct Handover {
    /// Lent to the task that sends the offer, so that an offer takes no further descriptor.
    /// Otherwise, connections that hold all descriptors could wait for one more each, forever.
    socket: SharedFd,
    bundle: Vec<SharedFd>,
    attributes: Attributes,
    cookie: u64,
    peer: Address,
    local: Address,
    reply: Option<Reply>,
    /// The span, which lasts until the outcome is known.
    span: ConnectionSpan,
    /// The group in which it waits, or has waited.
    group: Group,
    /// If the connection comes from the dispatcher before this one: dropping it reports the
    /// adoption to that dispatcher.
    pub(super) origin: Option<ServingGuard>,
}

impl Handover {
    /// Returns the connection, or sends an error to `reply` if it cannot be offered.
    pub(super) fn new(accepted: Accepted, reply: Reply) -> Option<Box<Self>> {
        match Self::of(accepted) {
            Ok(mut connection) => {
                connection.reply = Some(reply);
                Some(connection)
            }
            Err(unsendable) => {
                let _ = reply.send(Err(*unsendable));
                None
            }
        }
    }

    /// # Errors
    /// Returns the connection with the error if it cannot be offered.
    pub(super) fn of(accepted: Accepted) -> Result<Box<Self>, Box<DispatchError>> {
        let Accepted { socket, attributes } = accepted;
        match socket {
            Ok(socket) => Self::from_socket(socket, attributes, None, None),
            Err(error) => {
                let connection = Accepted { socket: Err(copy_of(&error)), attributes };
                Err(Box::new(DispatchError {
                    reason: NotDispatched::Unsendable(error.into()),
                    connection,
                }))
            }
        }
    }

    /// # Errors
    /// Returns the connection with the error if its offer would be too long or have too many
    /// descriptors, or if the socket is no connection.
    pub(super) fn from_socket(
        socket: OwnedFd,
        attributes: Attributes,
        peer: Option<Address>,
        local: Option<Address>,
    ) -> Result<Box<Self>, Box<DispatchError>> {
        // Check that the offer fits one message.
        let refuse = |socket, attributes, reason| {
            let connection = Accepted { socket: Ok(socket), attributes };
            Err(Box::new(DispatchError { reason, connection }))
        };
        let group = attributes.group.as_ref().map_or(0, |group| group.as_str().len());
        let bytes = attributes.prefix.len() + attributes.metadata.len() + group + MAX_OTHER_BYTES;
        let fds = 1 + attributes.bundle.len();
        if bytes > MAX_MESSAGE_BYTES {
            return refuse(
                socket,
                attributes,
                Error::FrameTooLong { bytes, limit: MAX_MESSAGE_BYTES }.into(),
            );
        }
        if fds > MAX_OFFER_FDS {
            return refuse(
                socket,
                attributes,
                Error::TooManyFds { fds, limit: MAX_OFFER_FDS }.into(),
            );
        }

        // Look the socket up: its cookie, and the addresses that are not known yet.
        let cookie = match getsockopt(&socket, sys::Cookie) {
            Ok(cookie) => cookie,
            Err(error) => {
                return refuse(socket, attributes, Error::from(io::Error::from(error)).into());
            }
        };
        let (socket, peer, local) = addresses(socket, attributes.transport, peer, local);
        let Some(peer) = peer.or_else(|| had_client(&socket, &local).then(Address::default)) else {
            return refuse(socket, attributes, NotDispatched::NotConnected);
        };

        // From here on nothing fails.
        let mut attributes = attributes;
        let bundle = attributes.bundle.drain(..).map(SharedFd::new).collect();
        Ok(Box::new(Self {
            socket: SharedFd::new(socket),
            bundle,
            attributes,
            cookie,
            span: ConnectionSpan::dispatch(cookie, &peer, &local),
            peer,
            local,
            reply: None,
            group: Group::default(),
            origin: None,
        }))
    }

    /// Returns the group that it is meant for, or `default`.
    pub(super) fn group_or(&self, default: &Group) -> Group {
        self.attributes.group.as_ref().unwrap_or(default).clone()
    }

    /// Sets the group in which it waits.
    pub(super) fn set_group(&mut self, group: Group) {
        self.group = group;
    }

    /// Returns the facts that decide which worker can get the connection. `default` is the group of
    /// a connection that names none.
    pub(super) fn needs(&self, default: &Group) -> Needs {
        Needs { group: self.group_or(default), key: self.key(), fds: 1 + self.bundle.len() }
    }

    /// Returns the offer for a worker.
    pub(super) fn offer(&self) -> Offer<SendFd> {
        Offer {
            cookie: self.cookie,
            transport: self.attributes.transport,
            peer: self.peer.clone(),
            local: self.local.clone(),
            prefix: self.attributes.prefix.clone(),
            metadata: self.attributes.metadata.clone(),
            fd: SendFd::assume_socket(self.socket.lend()),
            bundle: self.bundle.iter().map(|fd| fd.lend().into()).collect(),
        }
    }

    /// Returns the offer for the dispatcher that replaces this one.
    pub(super) fn offer_to_successor(&self) -> Offer<SendFd> {
        let (key, group) = (self.attributes.key, self.group.clone());
        let envelope = Envelope { key, group, metadata: self.attributes.metadata.clone() };
        Offer { metadata: envelope.encode(), ..self.offer() }
    }

    /// Returns the key. By default all connections of one client have the same.
    fn key(&self) -> u64 {
        self.attributes.key.unwrap_or_else(|| key_of_client(&self.peer))
    }

    /// Reports the adoption by a worker.
    pub(super) fn adopted_by(&mut self, worker: WorkerId) {
        self.origin = None;
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(Ok(worker)); // fails if nobody waits for it
        }
        self.span.end("adopted", Some(worker.0));
    }

    /// Returns the dispatcher's copies of the descriptors, to be closed.
    pub(super) fn into_copies(self) -> Copies {
        Copies {
            sockets: [self.socket.into_owned()].into(),
            others: self.bundle.into_iter().map(SharedFd::into_owned).collect(),
        }
    }

    /// Returns true if somebody waits for the outcome.
    pub(super) fn is_awaited(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| !reply.is_closed())
    }

    /// Returns the connection to the application that waits for it. If none waits, ends it, which
    /// its client sees. Returns true if it was given back.
    pub(super) fn fail(mut self, reason: NotDispatched) -> bool {
        self.attributes.bundle.extend(self.bundle.into_iter().map(SharedFd::into_owned));
        let connection =
            Accepted { socket: Ok(self.socket.into_owned()), attributes: self.attributes };
        let error = DispatchError { reason, connection };
        let unwanted = match self.reply {
            Some(reply) => match reply.send(Err(error)) {
                Ok(()) => {
                    self.span.end("given back", None);
                    return true;
                }
                Err(unwanted) => unwanted.err(),
            },
            None => Some(error),
        };
        if let Some(Accepted { socket: Ok(socket), attributes }) =
            unwanted.map(|error| error.connection)
        {
            shut_down(socket);
            close_in_background(attributes.bundle);
        }
        self.span.end("closed", None);
        false
    }

    /// Ends the connection for its client and for every process that has a copy.
    pub(super) fn shut_down(mut self) {
        self.span.end("closed", None);
        shut_down(self.socket.into_owned());
        close_in_background(self.bundle.into_iter().map(SharedFd::into_owned));
    }

    /// Returns true if both directions have ended. A `shutdown` by any process shows in all copies.
    pub(super) fn has_ended(&self) -> bool {
        let mut poll = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
    }
}

/// Copies that are to be closed. If the worker was quick, they are the last ones, whose `close` can
/// block.
#[derive(Debug)]
pub(super) struct Copies {
    sockets: SmallVec<[OwnedFd; 1]>,
    others: Vec<OwnedFd>,
}

impl Copies {
    pub(super) fn new() -> Self {
        Self { sockets: SmallVec::new(), others: Vec::new() }
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.sockets.extend(more.sockets);
        self.others.extend(more.others);
    }

    pub(super) fn close(self) {
        if !self.sockets.is_empty() {
            close_sockets(self.sockets);
        }
        if !self.others.is_empty() {
            close_in_background(self.others);
        }
    }
}

/// The dispatcher's copy of a descriptor, until it is taken out. Dropping it closes it without
/// blocking.
#[derive(Debug)]
struct SharedFd(Option<Arc<OwnedFd>>);

impl SharedFd {
    fn new(fd: OwnedFd) -> Self {
        Self(Some(Arc::new(fd)))
    }

    fn lend(&self) -> Arc<OwnedFd> {
        Arc::clone(self.0.as_ref().expect(PRESENT))
    }

    fn into_owned(mut self) -> OwnedFd {
        self.0
            .take()
            .and_then(Arc::into_inner)
            .expect("a task that was lent it has sent it, or is gone")
    }
}

const PRESENT: &str = "only its owner takes it out";

impl AsFd for SharedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().expect(PRESENT).as_fd()
    }
}

impl Drop for SharedFd {
    fn drop(&mut self) {
        close_in_background(self.0.take().and_then(Arc::into_inner));
    }
}

/// Ends a connection and closes this copy of its socket.
pub(super) fn shut_down(socket: OwnedFd) {
    end_connection(&socket);
    close_sockets([socket]);
}

/// Returns the client's address if the socket has one, and the address that the client has
/// connected to, unless they are known.
fn addresses(
    socket: OwnedFd,
    transport: Transport,
    peer: Option<Address>,
    local: Option<Address>,
) -> (OwnedFd, Option<Address>, Address) {
    macro_rules! addresses {
        ($stream:ty) => {{
            let stream = <$stream>::from(socket);
            let peer = peer.or_else(|| stream.peer_addr().map(Address::from).ok());
            let local =
                local.unwrap_or_else(|| stream.local_addr().map(Address::from).unwrap_or_default());
            (stream.into(), peer, local)
        }};
    }
    match transport {
        Transport::Tcp => addresses!(TcpStream),
        Transport::UnixStream => addresses!(UnixStream),
    }
}

/// Returns true if a socket without a client's address was connected, and its client has gone. Only
/// TCP forgets the address then. A listener has no client, and neither has a socket without a port
/// of its own.
fn had_client(socket: &OwnedFd, local: &Address) -> bool {
    let is_listener = getsockopt(socket, sockopt::AcceptConn).unwrap_or(false);
    !is_listener && local.socket_addr().is_some_and(|local| local.port() != 0)
}
