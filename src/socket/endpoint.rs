//! The parts of a connected socket that the asynchronous and the blocking `Socket` share:
//! everything except waiting.

use std::{
    io::{Error, IoSlice, Result},
    net::Shutdown,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use nix::{
    libc,
    sys::socket::{self, getsockopt, setsockopt, sockopt},
};

use super::{PassCredentials, PeerCred, SocketKind, uid_account::UidShare};
use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    error,
    sys::{self, Received},
};

/// The state of a connected socket, besides its descriptor.
#[derive(Debug)]
pub(crate) struct SocketState {
    kind: SocketKind,
    /// The count of descriptors that came over this socket and wait to be closed.
    account: Arc<Account>,
    /// The share in the account of the peer's uid. `None` if no listener has accepted the
    /// connection.
    uid_share: Option<UidShare>,
    /// True if the kernel has reported `ECONNRESET`.
    reset: AtomicBool,
    /// True if this process has switched credentials on, through any of its handles. Credentials
    /// that another holder of the socket has switched on are ignored.
    wants_credentials: Arc<AtomicBool>,
}

impl SocketState {
    /// Returns the state of a socket that was not used yet. If there is a share, the connection
    /// counts for the uid of its peer.
    pub(crate) fn new(kind: SocketKind, uid_share: Option<UidShare>) -> Self {
        closer::start();
        let account =
            Arc::new(uid_share.as_ref().map(UidShare::closing_account).unwrap_or_default());
        Self {
            kind,
            account,
            uid_share,
            reset: AtomicBool::new(false),
            wants_credentials: Arc::default(),
        }
    }

    /// Returns the state for a copy of the socket that this process has made.
    pub(crate) fn for_copy(&self) -> Self {
        Self {
            kind: self.kind,
            account: Arc::clone(&self.account),
            uid_share: self.uid_share.as_ref().map(UidShare::for_copy),
            reset: AtomicBool::new(self.reset.load(Ordering::Relaxed)),
            wants_credentials: Arc::clone(&self.wants_credentials),
        }
    }

    /// Wraps a descriptor of the socket, so that it is closed in the background when it is dropped.
    pub(crate) fn guard(&self, fd: OwnedFd) -> BackgroundFd {
        BackgroundFd::new(fd, InBackground::counted(Arc::clone(&self.account)))
    }

    pub(crate) fn kind(&self) -> SocketKind {
        self.kind
    }
}

/// A connected socket for a system call that does not wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Endpoint<'a> {
    fd: BorrowedFd<'a>,
    state: &'a SocketState,
}

/// The outcome of an attempt to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// At least one byte was sent.
    Sent,
    /// Nothing was sent. The next attempt is different and can be made at once.
    Again,
    /// The socket is full. Wait until it is writable.
    Full,
    /// The kernel lacks memory, or too many descriptors are in flight. The kernel does not report
    /// when that changes, so try again after a while.
    Scarce,
}

/// The meaning of an error of a send, after which nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SendFailure {
    /// The socket is full until it is writable (`EAGAIN`).
    Full,
    /// Too many descriptors of this uid are in flight (`ETOOMANYREFS`), or the kernel has no memory
    /// (`ENOMEM`). The kernel does not report when that changes: poll(2) reports the socket as
    /// writable all the time.
    Scarce,
    /// The packet is larger than the send buffer can ever hold (`EMSGSIZE`).
    PacketTooLarge,
    /// The kernel has no contiguous memory for a packet of this size at the moment (`ENOBUFS`).
    NoMemoryForPacket,
    /// Any other error.
    Final,
}

impl SendFailure {
    pub(crate) fn of(error: &Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::Full,
            Some(libc::ETOOMANYREFS | libc::ENOMEM) => Self::Scarce,
            Some(libc::EMSGSIZE) => Self::PacketTooLarge,
            Some(libc::ENOBUFS) => Self::NoMemoryForPacket,
            _ => Self::Final,
        }
    }
}

impl<'a> Endpoint<'a> {
    pub(crate) fn new(fd: BorrowedFd<'a>, state: &'a SocketState) -> Self {
        Self { fd, state }
    }

    pub(crate) fn kind(self) -> SocketKind {
        self.state.kind
    }

    pub(crate) fn account(self) -> &'a Arc<Account> {
        &self.state.account
    }

    /// Calls `receive`, which makes one [`recvmsg`](sys::recvmsg). Returns `None` if there is
    /// nothing to receive. `ECONNRESET` is not returned as an error. Instead,
    /// [`was_reset`](Self::was_reset) returns true from then on.
    ///
    /// # Errors
    /// The errors of recvmsg(2).
    pub(crate) fn receive(
        self,
        mut receive: impl FnMut(BorrowedFd<'_>) -> Result<Received>,
    ) -> Result<Option<Received>> {
        loop {
            match receive(self.fd) {
                Ok(received) => return Ok(Some(received)),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(None),
                    Some(libc::ECONNRESET) => self.state.reset.store(true, Ordering::Relaxed),
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Sends bytes, and descriptors with their first byte. Returns the number of bytes sent, which
    /// may be less than all. The descriptors are always sent together.
    ///
    /// # Errors
    /// The errors of sendmsg(2). Nothing was sent then.
    pub(crate) fn send<'fd>(
        self,
        bytes: &[IoSlice<'_>],
        fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>> + Clone,
    ) -> Result<usize> {
        loop {
            let sent = sys::sendmsg(self.fd, bytes, fds.clone());
            match sent.as_ref().err().and_then(Error::raw_os_error) {
                Some(libc::EINTR) => continue,
                Some(libc::ECONNRESET) => self.state.reset.store(true, Ordering::Relaxed),
                _ => {}
            }
            return sent;
        }
    }

    /// Returns true if the peer has closed the connection with unread data. The kernel reports that
    /// once, as `ECONNRESET` of a receive or of a send. On STREAM the report comes after the data
    /// that is left to read, on SEQPACKET before it.
    pub(crate) fn was_reset(self) -> bool {
        self.state.reset.load(Ordering::Relaxed)
    }

    /// Waits while too many descriptors wait to be closed: more than `limit` of this connection, or
    /// more than its uid may have.
    pub(crate) fn poll_closed(self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        ready!(self.state.account.poll_at_most(cx, limit));
        match &self.state.uid_share {
            Some(share) => share.poll_closed(cx),
            None => Poll::Ready(()),
        }
    }

    /// Charges the peer's uid for the bytes and descriptors of messages that are not complete.
    ///
    /// # Errors
    /// [`OverUidLimit`](crate::Error::OverUidLimit) if the uid has more than it may have.
    #[inline]
    pub(crate) fn hold(self, bytes: usize, fds: usize) -> std::result::Result<(), error::Error> {
        match &self.state.uid_share {
            Some(share) => share.hold(bytes, fds),
            None => Ok(()),
        }
    }

    pub(crate) fn peer_cred(self) -> Result<PeerCred> {
        PeerCred::of(&self.fd)
    }

    pub(crate) fn peer_pidfd(self) -> Result<OwnedFd> {
        Ok(getsockopt(&self.fd, sockopt::PeerPidfd)?)
    }

    pub(crate) fn send_buffer_size(self) -> Result<usize> {
        Ok(getsockopt(&self.fd, sockopt::SndBuf)?)
    }

    pub(crate) fn set_send_buffer_size(self, bytes: usize) -> Result<()> {
        Ok(setsockopt(&self.fd, sockopt::SndBuf, &bytes)?)
    }

    pub(crate) fn set_pass_fds(self, pass: bool) -> Result<()> {
        Ok(setsockopt(&self.fd, sys::PassRights, &pass)?)
    }

    pub(crate) fn set_pass_credentials(self, pass: PassCredentials) -> Result<()> {
        pass.set(&self.fd)?;
        self.state.wants_credentials.store(pass != PassCredentials::No, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn wants_credentials(self) -> bool {
        self.state.wants_credentials.load(Ordering::Relaxed)
    }

    pub(crate) fn shutdown(self, how: Shutdown) -> Result<()> {
        let how = match how {
            Shutdown::Read => socket::Shutdown::Read,
            Shutdown::Write => socket::Shutdown::Write,
            Shutdown::Both => socket::Shutdown::Both,
        };
        Ok(socket::shutdown(self.fd.as_raw_fd(), how)?)
    }
}

impl AsFd for Endpoint<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd
    }
}
