//! Accepting for the workers.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix,
    },
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures::future::{Either, select};
use nix::libc;
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::yield_now,
    time::sleep,
};
use tracing::warn;

use super::{
    Address, DispatchError, Dispatcher, NotDispatched, Shared, Transport,
    accepted::About,
    dispatching::reserve,
    handover::{Handover, shut_down},
};
use crate::{
    Listener,
    handoff::reserve::{first_of_reserve, is_of_reserve},
    sys,
};

/// Accepted before other tasks get their turn.
const BATCH: usize = 64;

/// Descriptors that are left for starting a worker, and for a few connections: if these held all, and waited for a worker that
/// cannot be started again for want of one, they would wait for ever.
const RESERVE: u64 = 16;

/// Connections that may be on their way when only the reserve is left.
const FEW: u64 = 8;

/// How long to wait for what comes free without an event, mostly a descriptor.
const BACK_OFF: Duration = Duration::from_millis(20);

/// What [`Dispatcher::serve`] accepts from: a listener of tokio or std, of TCP or Unix sockets.
pub trait IntoListener: sealed::Sealed {
    /// Takes it out of its event loop.
    #[doc(hidden)]
    fn into_listener(self) -> io::Result<(OwnedFd, Transport, Address)>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! into_listener {
    ($($listener:ty, $transport:ident, $into_std:expr;)*) => {$(
        impl sealed::Sealed for $listener {}
        impl IntoListener for $listener {
            fn into_listener(self) -> io::Result<(OwnedFd, Transport, Address)> {
                let listener = $into_std(self)?;
                listener.set_nonblocking(true)?;
                let local = listener.local_addr()?.into();
                Ok((listener.into(), Transport::$transport, local))
            }
        }
    )*};
}

into_listener! {
    tokio::net::TcpListener, Tcp, tokio::net::TcpListener::into_std;
    tokio::net::UnixListener, UnixStream, tokio::net::UnixListener::into_std;
    std::net::TcpListener, Tcp, io::Result::Ok;
    unix::net::UnixListener, UnixStream, io::Result::Ok;
}

/// The listener was shut down. Everything else that accept(2) says is about one connection, or passes.
fn is_final(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF))
}

impl Dispatcher {
    /// Accepts connections and hands them over, until the dispatcher drains. Takes a listener of tokio or std, of TCP or Unix
    /// sockets.
    ///
    /// It accepts only what a worker has room for: the others wait in the kernel's backlog, where they take no descriptor. When
    /// only 16 descriptors are left (an eighth of `RLIMIT_NOFILE`, if that is less), it accepts only as long as fewer than 8 connections are
    /// on their way: the rest is for starting workers. At `EMFILE` it waits for some to come free.
    ///
    /// A connection that finds no worker [after too many offers](super::NotDispatched::TooManyOffers), or in the time of a drain, is
    /// shut down and [counted](super::Stats::lost).
    ///
    /// # Errors
    /// Those of taking the listener out of its event loop, and `InvalidInput` when somebody has shut it down.
    ///
    /// # Cancel safety
    /// What was accepted is handed over also if this is dropped. The listener is closed, and with its last copy the
    /// connections in the backlog are.
    pub async fn serve(&self, listener: impl IntoListener) -> io::Result<()> {
        let (listener, transport, local) = listener.into_listener()?;
        // Each connection of a listener on all addresses has another one.
        let local = Some(local).filter(|local| local.ip().is_none_or(|address| !address.ip().is_unspecified()));
        let shared = Arc::clone(&self.shared);
        let accepting = {
            let _context = shared.runtime.enter();
            Accepting {
                listener: sys::register(listener, Interest::READABLE)?,
                transport,
                local,
                shared: Arc::clone(&shared),
            }
        };
        shared.tasks.run(accepting.run()).await?
    }

    /// Takes the workers that connect to this listener, until the dispatcher drains: see [`add_worker`](Self::add_worker).
    ///
    /// # Errors
    /// Those of accept(2) that do not pass.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped but the listener.
    pub async fn serve_workers(&self, listener: Listener) -> io::Result<()> {
        loop {
            let accepted = pin!(listener.accept());
            match select(accepted, pin!(self.shared.until(|pool| !pool.is_open()))).await {
                Either::Left((Ok(socket), _)) => drop(self.add_worker(socket)),
                Either::Left((Err(error), _)) if is_final(&error) => return Err(error),
                Either::Left((Err(error), _)) => {
                    warn!(%error, "workers cannot be accepted for a while");
                    sleep(BACK_OFF).await;
                }
                Either::Right(_) => return Ok(()),
            }
        }
    }
}

/// The accept loop of one listener.
struct Accepting {
    shared: Arc<Shared>,
    listener: AsyncFd<OwnedFd>,
    transport: Transport,
    /// The address of each connection's end here, if it is the same for all.
    local: Option<Address>,
}

impl Accepting {
    /// Accepts until the dispatcher drains.
    async fn run(self) -> io::Result<()> {
        match select(pin!(self.accept()), pin!(self.shared.until(|pool| !pool.is_open()))).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(_) => Ok(()),
        }
    }

    /// Dropped at any await, it has no connection in hand.
    async fn accept(&self) -> io::Result<()> {
        let Self { shared, listener, transport, local } = self;
        let mut warned = false;
        let mut warn_once = |error: io::Error| {
            if !std::mem::replace(&mut warned, true) {
                warn!(%error, "connections cannot be accepted for a while");
            }
        };
        let mut ceiling = first_of_reserve(RESERVE);
        'ready: loop {
            // Before a place is reserved, which others may have use for.
            let mut ready = listener.readable().await?;
            for _ in 0..BATCH {
                let Some(permit) = reserve(shared).await else { return Ok(()) };
                let mut is_scarce = true; // mostly, where it fails
                let trouble = match self.accept_one() {
                    Ok((socket, peer)) => {
                        is_scarce = is_of_reserve(&socket, ceiling);
                        match Handover::prepare(socket, About::new(*transport), Some(peer), local.clone())
                            .map_err(|unfit| *unfit)
                        {
                            Ok(connection) => {
                                permit.take(connection);
                                None
                            }
                            Err(DispatchError { reason, connection }) => {
                                drop(permit); // whoever waits for a place may have it meanwhile
                                connection.socket.into_iter().for_each(|socket| turn_away(shared, socket, &reason));
                                Some(io::Error::other(reason))
                            }
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready.clear_ready();
                        continue 'ready;
                    }
                    Err(error) if is_final(&error) => return Err(error),
                    Err(error) => {
                        drop(permit);
                        Some(error).filter(|error| error.kind() != io::ErrorKind::ConnectionAborted)
                    }
                };
                if let Some(error) = trouble {
                    warn_once(error);
                    sleep(BACK_OFF).await;
                }
                while is_scarce && !self.may_accept(listener.as_fd(), &mut ceiling) {
                    warn_once(io::Error::from_raw_os_error(libc::EMFILE));
                    sleep(BACK_OFF).await;
                }
            }
            yield_now().await; // workers are sent what was accepted so far
        }
    }

    fn accept_one(&self) -> io::Result<(OwnedFd, Address)> {
        let listener = self.listener.as_fd();
        match self.transport {
            Transport::Tcp => sys::accept_tcp(listener).map(|(stream, peer)| (stream.into(), peer.into())),
            Transport::UnixStream => sys::accept_unix(listener).map(|(stream, peer)| (stream.into(), peer.into())),
        }
    }

    /// Whether there are descriptors beside the reserve, or it is hardly used. Looks where the reserve begins, which may have changed.
    fn may_accept(&self, listener: BorrowedFd<'_>, ceiling: &mut u64) -> bool {
        *ceiling = first_of_reserve(RESERVE);
        let is_one_free = listener.try_clone_to_owned().is_ok_and(|next| !is_of_reserve(next, *ceiling));
        is_one_free || self.shared.act(|pool| pool.on_their_way()) < FEW
    }
}

/// Closes and counts an accepted connection that cannot be offered to any worker.
fn turn_away(shared: &Arc<Shared>, socket: OwnedFd, error: &NotDispatched) {
    shut_down(socket);
    shared.count_lost();
    warn!(%error, "connection closed: it cannot be offered to a worker");
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    #[tokio::test]
    async fn an_accepted_connection_that_cannot_be_offered_is_closed_and_counted() {
        let dispatcher = Dispatcher::builder().build();
        let (connection, mut client) = UnixStream::pair().unwrap();
        turn_away(&dispatcher.shared, connection.into(), &NotDispatched::Draining);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        let stats = dispatcher.stats();
        assert_eq!((stats.dispatched, stats.lost), (1, 1));
    }
}
