//! The parts of a listener that the asynchronous and the blocking `Listener` share: everything
//! except waiting.

use std::{
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::SocketAddr,
    },
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use nix::{
    libc,
    sys::socket::{self, Backlog, UnixAddr, getsockopt, setsockopt, sockopt},
};

use super::{
    Endpoint, PassCredentials, PeerCred, SocketKind, SocketState,
    admission::Admission,
    check::{checked, invalid_descriptor, unix_socket_kind},
    open::{local_addr, new_nonblocking, set_nonblocking, unix_addr},
    path::PathGuard,
    uid_account::UidShare,
};
use crate::{
    closer::{self, Account, BackgroundFd, InBackground},
    sys,
};

/// The number of refused connections that may wait to be closed. Peers may connect faster than the
/// closer's thread runs, and each refused connection holds a descriptor until it is closed.
const MAX_CLOSING: usize = 64;

/// The state of a listener, besides its descriptor, which is non-blocking.
#[derive(Debug)]
pub(crate) struct ListenerState {
    kind: SocketKind,
    pub(crate) admission: Admission,
    /// The count of refused connections that wait to be closed.
    closing: Arc<Account>,
    path: Option<PathGuard>,
    /// The setting for each accepted connection, or `None` to leave the connection's own. The
    /// kernel copies `SO_PASSCRED` from the listener when the client connects. So connections that
    /// were in the backlog before a change have the old value.
    credentials: Mutex<Option<PassCredentials>>,
    /// False after [`set_pass_fds(false)`](Self::set_pass_fds).
    pass_fds: AtomicBool,
}

impl ListenerState {
    /// Listens at a path, which gets exactly this mode.
    pub(crate) fn bind(path: &Path, kind: SocketKind, mode: u32) -> Result<(BackgroundFd, Self)> {
        // The path is locked first, so that no other process removes the new socket as stale.
        let addr = UnixAddr::new(path)?;
        let mut guard = PathGuard::take(path)?;
        let fd = new_nonblocking(kind)?;
        guard.bind(&fd, &addr, mode)?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Ok(Self::new(fd, kind, Some(guard)))
    }

    /// Listens at an address, which may be an abstract name.
    pub(crate) fn bind_addr(addr: &SocketAddr, kind: SocketKind) -> Result<(BackgroundFd, Self)> {
        if let Some(path) = addr.as_pathname() {
            return Self::bind(path, kind, 0o600);
        }
        let addr = unix_addr(addr)?;
        let fd = new_nonblocking(kind)?;
        socket::bind(fd.as_raw_fd(), &addr)?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Ok(Self::new(fd, kind, None))
    }

    /// Takes a listening socket, and makes it non-blocking for every holder.
    ///
    /// # Errors
    /// `InvalidInput` with a reason if the descriptor is anything else. It is closed then.
    pub(crate) fn from_fd(fd: OwnedFd) -> Result<(BackgroundFd, Self)> {
        let (fd, kind) = checked(fd, |fd| {
            let kind = unix_socket_kind(fd)?;
            if !getsockopt(fd, sockopt::AcceptConn)? {
                return Err(invalid_descriptor("it is not a listening socket"));
            }
            set_nonblocking(fd, true)?; // accept has no flag for a single call
            PassCredentials::No.set(fd)?; // for clients that connect from now on
            Ok(kind)
        })?;
        Ok(Self::unguarded(fd, kind))
    }

    /// Takes a listening, non-blocking socket that another holder may have set up. That holder
    /// guards the path.
    pub(crate) fn unguarded(fd: OwnedFd, kind: SocketKind) -> (BackgroundFd, Self) {
        let (fd, state) = Self::new(fd, kind, None);
        (fd, Self { credentials: Mutex::new(Some(PassCredentials::No)), ..state })
    }

    fn new(fd: OwnedFd, kind: SocketKind, path: Option<PathGuard>) -> (BackgroundFd, Self) {
        closer::start();
        let state = Self {
            kind,
            admission: Admission::new(),
            closing: Arc::default(),
            path,
            credentials: Mutex::default(),
            pass_fds: AtomicBool::new(true),
        };
        (BackgroundFd::new(fd, InBackground::default()), state)
    }

    pub(crate) fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Leaves the socket file in place for the next holder of the descriptor.
    pub(crate) fn hand_on(self) {
        if let Some(guard) = self.path {
            guard.hand_on();
        }
    }

    /// Waits while too many refused connections wait to be closed.
    pub(crate) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.closing.poll_at_most(cx, MAX_CLOSING)
    }

    /// Takes the next connection. Returns `None` after one that is not admitted, so that the caller
    /// can give other tasks a turn: peers that are refused must not keep it busy.
    ///
    /// # Errors
    /// `WouldBlock` if there is no connection to accept.
    pub(crate) fn try_accept(
        &self,
        listener: BorrowedFd<'_>,
    ) -> Result<Option<(BackgroundFd, SocketState)>> {
        let fd = match sys::accept(listener) {
            Ok(fd) => fd,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ECONNABORTED) => return Ok(None),
                _ => return Err(error),
            },
        };
        // The peer may already have sent a descriptor that makes `close` block.
        let fd = BackgroundFd::new(fd, InBackground::counted(Arc::clone(&self.closing)));
        self.take_accepted(listener, fd).map_err(not_would_block)
    }

    /// Prepares an accepted connection if its peer is admitted.
    fn take_accepted(
        &self,
        listener: BorrowedFd<'_>,
        fd: BackgroundFd,
    ) -> Result<Option<(BackgroundFd, SocketState)>> {
        // The connection of a peer that is not admitted is closed here.
        let Some(uid_share) = self.admit(listener, &fd)? else { return Ok(None) };
        // A client that was in the backlog may have connected before the listener got the option.
        if !self.pass_fds.load(Ordering::Relaxed) {
            setsockopt(&fd, sys::PassRights, &false)?;
        }
        let state = SocketState::new(self.kind, Some(uid_share));
        let fd = state.guard(fd.into_fd());
        // The same is true of this option.
        let credentials = *self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pass) = credentials {
            Endpoint::new(fd.as_fd(), &state).set_pass_credentials(pass)?;
        }
        Ok(Some((fd, state)))
    }

    /// Returns the share of the peer's uid, or `None` if the peer is not admitted.
    fn admit(&self, listener: BorrowedFd<'_>, peer: &BackgroundFd) -> Result<Option<UidShare>> {
        Ok(self
            .admission
            .admit(PeerCred::of(peer)?, self.path.as_ref(), || listener_addr(listener)))
    }

    pub(crate) fn set_pass_credentials(
        &self,
        listener: BorrowedFd<'_>,
        pass: PassCredentials,
    ) -> Result<()> {
        let mut credentials = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        pass.set(&listener)?;
        *credentials = Some(pass);
        Ok(())
    }

    pub(crate) fn set_pass_fds(&self, listener: BorrowedFd<'_>, pass: bool) -> Result<()> {
        setsockopt(&listener, sys::PassRights, &pass)?;
        self.pass_fds.store(pass, Ordering::Relaxed);
        Ok(())
    }
}

/// Returns the address of a listener.
pub(crate) fn listener_addr(listener: BorrowedFd<'_>) -> Result<SocketAddr> {
    local_addr(&listener)?
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, "the listener has no name"))
}

/// Turns `WouldBlock` into another kind of error.
///
/// If a step after `accept` fails with `WouldBlock`, tokio would take that for a result of
/// `accept`. It would forget that connections are waiting, and the caller would get no error for
/// the connection that was accepted and closed.
pub(super) fn not_would_block(error: Error) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock => {
            Error::other(format!("an accepted connection was closed: {error}"))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_accept_no_error_is_would_block() {
        let mapped = not_would_block(Error::from_raw_os_error(libc::EAGAIN));
        assert_ne!(mapped.kind(), ErrorKind::WouldBlock);
        assert!(mapped.to_string().contains("Resource temporarily unavailable"), "{mapped}");

        let kept = not_would_block(Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(kept.raw_os_error(), Some(libc::EMFILE));
    }
}
