//! A connection that is being handed over.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{self, getsockopt},
};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Accepted, Address, DispatchError, NotDispatched, Transport, Unadopted, WorkerId,
    accepted::About,
    protocol::{MAX_MESSAGE_BYTES, Offer},
};
use crate::{Error, SendFd, closer::close_sockets, sys};

/// One connection to a worker process. A worker that is started again gets a new one.
pub(super) type LinkId = u64;

/// Tells the application that dispatched a connection what became of it.
pub(super) type Reply = oneshot::Sender<Result<WorkerId, DispatchError>>;

/// Most bytes of an offer beside what was read and the metadata, with some to spare.
const MAX_OTHER_BYTES: usize = 512;

/// A connection that is being handed over, with the dispatcher's own copy of the descriptor: it stays until a worker has
/// adopted the connection.
#[derive(Debug)]
pub(super) struct Job {
    /// Lent to the link that is sending it, so that an offer takes no descriptor: connections that wait for another one to be
    /// opened, and hold all that there are, would wait for ever.
    socket: Held,
    about: About,
    cookie: u64,
    peer: Address,
    local: Address,
    /// Offers made.
    pub(super) offers: u32,
    /// Those of them after which the worker was gone, or could not use the connection.
    pub(super) failures: u32,
    /// What became of the last.
    pub(super) last: Option<(LinkId, Unadopted)>,
    pub(super) offered_at: Option<Instant>,
    /// Retired workers whose processes may still hold a copy.
    pub(super) holders: Vec<LinkId>,
    reply: Option<Reply>,
}

impl Job {
    /// Tells `reply` if it is unfit.
    pub(super) fn new(accepted: Accepted, reply: Reply) -> Option<Self> {
        let Accepted { socket, about } = accepted;
        let prepared = match socket {
            Ok(socket) => Self::prepare(socket, about, None)
                .map_err(|(socket, about, error)| (Accepted { socket: Ok(socket), about }, error)),
            Err(error) => {
                let again = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
                Err((Accepted { socket: Err(again), about }, error.into()))
            }
        };
        match prepared {
            Ok(job) => Some(Self { reply: Some(reply), ..job }),
            Err((connection, error)) => {
                let reason = NotDispatched::Unfit(error);
                let _ = reply.send(Err(DispatchError { reason, connection }));
                None
            }
        }
    }

    /// # Errors
    /// Gives everything back if what comes along is too long, or if it is no socket.
    pub(super) fn prepare(
        socket: OwnedFd,
        about: About,
        local: Option<Address>,
    ) -> Result<Self, (OwnedFd, About, Error)> {
        let bytes = about.read.len() + about.metadata.len() + MAX_OTHER_BYTES;
        if bytes > MAX_MESSAGE_BYTES {
            return Err((socket, about, Error::FrameTooLong { bytes, limit: MAX_MESSAGE_BYTES }));
        }
        let cookie = match getsockopt(&socket, sys::Cookie) {
            Ok(cookie) => cookie,
            Err(error) => return Err((socket, about, io::Error::from(error).into())),
        };
        let (socket, peer, local) = addresses(socket, about.transport, local);
        Ok(Self {
            socket: Held(Some(Arc::new(socket))),
            about,
            cookie,
            peer,
            local,
            offers: 0,
            failures: 0,
            last: None,
            offered_at: None,
            holders: Vec::new(),
            reply: None,
        })
    }

    /// What a worker is told.
    pub(super) fn offer(&self) -> Offer<SendFd> {
        Offer {
            cookie: self.cookie,
            transport: self.about.transport,
            peer: self.peer.clone(),
            local: self.local.clone(),
            read: self.about.read.clone(),
            metadata: self.about.metadata.clone(),
            fd: self.socket.lend(),
        }
    }

    /// Keys that are equal go to the same worker. By default those of one client.
    pub(super) fn key(&self) -> u64 {
        self.about.key.unwrap_or_else(|| {
            let mut hasher = DefaultHasher::new();
            match &self.peer {
                Address::Ip(address) => address.ip().hash(&mut hasher),
                other => other.hash(&mut hasher),
            }
            hasher.finish()
        })
    }

    /// A worker has adopted it. Returns the dispatcher's copy.
    pub(super) fn adopted_by(self, worker: WorkerId) -> OwnedFd {
        if let Some(reply) = self.reply {
            let _ = reply.send(Ok(worker)); // nobody has to wait for it
        }
        self.socket.into_owned()
    }

    /// Whether somebody waits for what becomes of it.
    pub(super) fn is_awaited(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| !reply.is_closed())
    }

    /// No worker adopts it. Gives it back to who waits for it; without anybody, its client sees the end. Returns whether
    /// it was given back.
    pub(super) fn fail(self, reason: NotDispatched) -> bool {
        let connection = Accepted { socket: Ok(self.socket.into_owned()), about: self.about };
        let error = DispatchError { reason, connection };
        let unwanted = match self.reply {
            Some(reply) => match reply.send(Err(error)) {
                Ok(()) => return true,
                Err(unwanted) => unwanted.err(),
            },
            None => Some(error),
        };
        if let Some(Ok(socket)) = unwanted.map(|error| error.connection.socket) {
            shut_down(socket);
        }
        false
    }
}

/// The dispatcher's copy of a connection, until it is taken out. Closing it does not block.
#[derive(Debug)]
struct Held(Option<Arc<OwnedFd>>);

impl Held {
    fn lend(&self) -> SendFd {
        SendFd::socket(Arc::clone(self.0.as_ref().expect("only its owner takes it out")))
    }

    fn into_owned(mut self) -> OwnedFd {
        self.0.take().and_then(Arc::into_inner).expect("a link that was lent it has sent it, or is gone")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.take().and_then(Arc::into_inner).into_iter().for_each(close);
    }
}

/// Closes the dispatcher's copy of a connection that a worker serves.
pub(super) fn close(socket: OwnedFd) {
    // The worker may have been so fast that this is the last copy. Its `close` can block.
    close_sockets([socket]);
}

/// The end of a connection, for its client and for every process that has a copy.
pub(super) fn shut_down(socket: OwnedFd) {
    let _ = socket::shutdown(socket.as_raw_fd(), socket::Shutdown::Both); // an error says that it has ended
    close_sockets([socket]);
}

/// Whether both directions have ended: `shutdown` tells every holder of a copy.
pub(super) fn has_ended(socket: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
}

/// Where it comes from, and what it has connected to unless that is known. A client that has gone already has no address.
fn addresses(socket: OwnedFd, transport: Transport, local: Option<Address>) -> (OwnedFd, Address, Address) {
    match transport {
        Transport::Tcp => {
            let stream = std::net::TcpStream::from(socket);
            let peer = stream.peer_addr().map(Address::from).unwrap_or_default();
            let local = local.unwrap_or_else(|| stream.local_addr().map(Address::from).unwrap_or_default());
            (stream.into(), peer, local)
        }
        Transport::UnixStream => {
            let stream = UnixStream::from(socket);
            let peer = stream.peer_addr().map(Address::from).unwrap_or_default();
            let local = local.unwrap_or_else(|| stream.local_addr().map(Address::from).unwrap_or_default());
            (stream.into(), peer, local)
        }
    }
}
