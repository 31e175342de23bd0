//! Accepting connections while this process serves.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, unix};

use super::{
    Error, Phase,
    protocol::{Family, Identity, Kind},
    shared::{Gate, Shared},
};
use crate::{Listener, Socket, SocketKind};

/// A listener of a [`Server`](super::Server) that accepts only while this process serves.
///
/// When another process has taken over, the socket leaves the event loop of this one at once, and
/// [`accept`](Self::accept) waits. If the takeover is undone, `accept` goes on. So an application
/// calls `accept` in a loop, and need not handle takeovers there.
///
/// `L` is [`TcpListener`], [`UnixListener`] or [`Listener`].
#[derive(Debug)]
pub struct Gated<L: Accepts> {
    shared: Arc<Shared>,
    registered: Arc<Registered<L>>,
    identity: Identity,
}

/// A listener that is registered with the event loop. `None` unless this process serves and has
/// called [`Gated::accept`].
#[derive(Debug)]
struct Registered<L>(Mutex<Option<Arc<L>>>);

/// A listener of tokio or of this crate. It can't be implemented elsewhere.
pub trait Accepts: sealed::Sealed + Send + Sync + Sized + 'static {
    /// A connection, with the client's address if it has one.
    type Connection;

    #[doc(hidden)]
    const NAME: &'static str;

    #[doc(hidden)]
    fn fits(identity: &Identity) -> bool;

    #[doc(hidden)]
    fn register(fd: OwnedFd) -> io::Result<Self>;

    #[doc(hidden)]
    fn accept_one(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for tokio::net::TcpListener {}
    impl Sealed for tokio::net::UnixListener {}
    impl Sealed for crate::Listener {}
}

impl<L: Accepts> Gated<L> {
    pub(super) fn new(shared: Arc<Shared>, name: &str, index: u32) -> Result<Self, Error> {
        let identity = shared.with_listeners(|listeners| {
            listeners.find(name, index).map(|entry| entry.identity.clone())
        })?;
        if !L::fits(&identity) {
            return Err(Error::WrongKind { identity: Box::new(identity), expected: L::NAME });
        }
        let registered = Arc::new(Registered::<L>(Mutex::new(None)));
        let gate: Arc<dyn Gate> = Arc::<Registered<L>>::clone(&registered);
        shared.add_gate(Arc::downgrade(&gate));
        Ok(Self { shared, registered, identity })
    }

    /// Returns the identity of the listener.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Waits for the next connection. While another process serves, there is none.
    ///
    /// # Errors
    /// `NotConnected` if another process has taken over for good, and the errors of accept(2).
    /// After `EMFILE` or `ENFILE`, wait a little and call again: they pass when descriptors are
    /// closed.
    ///
    /// # Cancel safety
    /// No connection is lost when dropped.
    pub async fn accept(&self) -> io::Result<L::Connection> {
        loop {
            let status = self.shared.wait(|status| status.phase != Phase::Draining).await;
            if status.phase == Phase::Replaced {
                let reason = format!("listener {} has moved to another process", self.identity);
                return Err(io::Error::new(io::ErrorKind::NotConnected, reason));
            }
            let Some(listener) = self.register()? else { continue };
            // The change of phase comes first, so that nothing is accepted after it.
            tokio::select! {
                biased;
                _ = self.shared.wait(|status| status.phase != Phase::Serving) => {}
                connection = listener.accept_one() => return connection,
            }
        }
    }

    /// Waits until the phase satisfies a condition.
    pub(super) async fn until_phase(&self, is_it: impl Fn(Phase) -> bool) -> Phase {
        self.shared.wait(|status| is_it(status.phase)).await.phase
    }

    /// Returns another listener for a copy of the socket, or `None` if this process does not serve.
    pub(super) fn copy(&self) -> io::Result<Option<L>> {
        if self.shared.phase() != Phase::Serving {
            return Ok(None);
        }
        L::register(self.copy_fd()?).map(Some)
    }

    fn copy_fd(&self) -> io::Result<OwnedFd> {
        let (name, index) = (&self.identity.name, self.identity.index);
        let copy = self.shared.with_listeners(|listeners| -> Result<_, Error> {
            Ok(listeners.find(name, index)?.fd.as_fd().try_clone_to_owned()?)
        });
        Ok(copy?)
    }

    /// Returns the registered listener, and registers it first if necessary. `None` if this process
    /// does not serve.
    fn register(&self) -> io::Result<Option<Arc<L>>> {
        let mut registered = self.registered.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &*registered {
            return Ok(Some(Arc::clone(listener)));
        }
        // The check is under the lock, so that a change of phase finds whatever is registered.
        if self.shared.phase() != Phase::Serving {
            return Ok(None);
        }
        let listener = Arc::new(L::register(self.copy_fd()?)?);
        *registered = Some(Arc::clone(&listener));
        Ok(Some(listener))
    }
}

impl<L: Accepts> Gate for Registered<L> {
    fn on_phase(&self, phase: Phase) {
        if phase != Phase::Serving {
            let listener = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            // Dropped after the lock is released. An `accept` that is running may have a reference.
            drop(listener);
        }
    }
}

fn is_stream(identity: &Identity) -> bool {
    identity.kind == Kind::Stream
}

impl Accepts for TcpListener {
    type Connection = (TcpStream, SocketAddr);
    const NAME: &'static str = "TCP listener";

    fn fits(identity: &Identity) -> bool {
        is_stream(identity) && identity.family != Family::Unix
    }

    fn register(fd: OwnedFd) -> io::Result<Self> {
        Self::from_std(fd.into())
    }

    async fn accept_one(&self) -> io::Result<Self::Connection> {
        self.accept().await
    }
}

impl Accepts for UnixListener {
    type Connection = (UnixStream, unix::SocketAddr);
    const NAME: &'static str = "Unix listener of kind stream";

    fn fits(identity: &Identity) -> bool {
        is_stream(identity) && identity.family == Family::Unix
    }

    fn register(fd: OwnedFd) -> io::Result<Self> {
        Self::from_std(fd.into())
    }

    async fn accept_one(&self) -> io::Result<Self::Connection> {
        self.accept().await
    }
}

/// Connections of the own uid and of root are admitted, as for any [`Listener`].
impl Accepts for Listener {
    type Connection = Socket;
    const NAME: &'static str = "Unix listener of kind seqpacket";

    fn fits(identity: &Identity) -> bool {
        identity.kind == Kind::SeqPacket && identity.family == Family::Unix
    }

    fn register(fd: OwnedFd) -> io::Result<Self> {
        Self::unguarded(fd, SocketKind::SeqPacket)
    }

    async fn accept_one(&self) -> io::Result<Self::Connection> {
        self.accept().await
    }
}
