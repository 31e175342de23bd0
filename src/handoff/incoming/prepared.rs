//! A connection that was offered and that this process has not adopted.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{SockType, getsockopt, sockopt},
};
use tracing::warn;

use super::stream::ConnectionStream;
use crate::{
    close_in_background,
    handoff::{
        Address, Transport,
        ending::end_connection,
        protocol::{Offer, RejectReason},
        span::{ConnectionId, ConnectionSpan},
    },
    sys,
};

/// An offered connection whose socket is registered with the event loop, so that nothing can fail
/// after its adoption. Before the adoption, this process may only [give up](Self::into_fds) its
/// copy.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) cookie: u64,
    pub(super) stream: ConnectionStream,
    pub(super) peer: Address,
    pub(super) local: Address,
    pub(super) prefix: Bytes,
    pub(super) metadata: Bytes,
    pub(super) bundle: Vec<OwnedFd>,
}

impl Prepared {
    /// Registers the socket of an offer. The connection itself does not change.
    ///
    /// # Errors
    /// The reason for which the offer has to be rejected.
    pub(super) fn new(offer: Offer) -> Result<Self, RejectReason> {
        if !is_usable(&offer) {
            close_in_background(offer.into_fds());
            return Err(RejectReason::Unusable);
        }
        let Offer { cookie, transport, peer, local, prefix, metadata, fd, bundle } = offer;
        match ConnectionStream::new(transport, fd) {
            Ok(stream) => Ok(Self { cookie, stream, peer, local, prefix, metadata, bundle }),
            Err(error) => {
                let connection = ConnectionId(cookie);
                let text = "cannot register a connection; it goes back to the dispatcher";
                warn!(%error, %connection, %peer, "{text}");
                close_in_background(bundle);
                Err(RejectReason::Full)
            }
        }
    }

    /// Takes the socket out of the event loop, and changes no option and no flag of it.
    pub(super) fn into_fds(self) -> impl Iterator<Item = OwnedFd> {
        self.stream.into_fd().ok().into_iter().chain(self.bundle)
    }

    /// Ends a connection that this process has adopted and that its application can no longer
    /// receive, because it has dropped its `Incoming`.
    pub(super) fn end(self) {
        let _span = ConnectionSpan::serve(self.cookie, &self.peer, &self.local);
        end_connection(&self.stream);
        close_in_background(self.bundle);
    }
}

/// Returns true if the descriptor of an offer is a non-blocking connection of its transport.
fn is_usable(offer: &Offer) -> bool {
    let is_stream_of = |domains: &[i32]| {
        getsockopt(&offer.fd, sys::Domain).is_ok_and(|domain| domains.contains(&domain))
            && getsockopt(&offer.fd, sockopt::SockType) == Ok(SockType::Stream)
    };
    let is_of_transport = match offer.transport {
        // Usually the first call is enough. A TCP listener can also accept connections of other
        // protocols, such as MPTCP.
        Transport::Tcp => {
            getsockopt(&offer.fd, sys::Protocol) == Ok(libc::IPPROTO_TCP)
                || is_stream_of(&[libc::AF_INET, libc::AF_INET6])
        }
        Transport::UnixStream => is_stream_of(&[libc::AF_UNIX]),
    };
    is_of_transport && is_non_blocking(&offer.fd)
}

/// Returns true if the flag is set. The worker must not set it, because it belongs to all copies of
/// the connection.
fn is_non_blocking(fd: &OwnedFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
}
