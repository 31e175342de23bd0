//! The accept loop of a listener.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
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
    Address, Dispatcher, Group, Transport,
    accepted::Attributes,
    dispatching::slot_in,
    handover::Handover,
    pauses::{Pause, Pauses},
    preparing::{PreparePermit, Preparing},
    shared::{Shared, Slot, Source},
};
use crate::{
    handoff::reserve::{first_of_reserve, is_of_reserve},
    sys,
};

/// The number of connections that are accepted before other tasks get their turn.
const BATCH: usize = 64;

/// The most connections that are accepted after a drain has begun: the length of a listener's
/// backlog, unless its limit (`net.core.somaxconn`) was raised.
const MOST_AT_END: usize = 4096;

/// The descriptors that are left for starting a worker, and for a few connections. Without this
/// reserve, waiting connections could use up every descriptor, and no worker could be started again
/// to take them.
const RESERVE: u64 = 16;

/// The number of connections that may be on their way when only the reserve is left.
const FEW: u64 = 8;

/// The time to wait for a descriptor, because no event reports that one is free.
pub(super) const BACK_OFF: Duration = Duration::from_millis(20);

/// Returns true if the listener was shut down. All other errors of accept(2) concern one
/// connection, or go away by themselves.
pub(super) fn is_final(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF))
}

/// A shortage of descriptors or memory, as one accept loop sees it.
struct Shortage<'a> {
    pauses: &'a Pauses,
    /// `Some` as long as the shortage lasts.
    pause: Option<Pause>,
    /// The number from which descriptors are of the reserve.
    reserve_from: u64,
    has_warned: bool,
}

impl<'a> Shortage<'a> {
    fn new(pauses: &'a Pauses) -> Self {
        Self { pauses, pause: None, reserve_from: first_of_reserve(RESERVE), has_warned: false }
    }

    /// Notes that nothing could be accepted. Logs the first error of the accept loop.
    fn report(&mut self, error: io::Error) {
        self.pause.get_or_insert_with(|| self.pauses.begin());
        if !std::mem::replace(&mut self.has_warned, true) {
            warn!(%error, "connections cannot be accepted for a while");
        }
    }

    fn end(&mut self) {
        self.pause = None;
    }
}

/// Accepts connections, and hands them over or has them prepared.
pub(super) struct Accepting {
    shared: Arc<Shared>,
    /// The group of connections that name none.
    group: Group,
    listener: AsyncFd<OwnedFd>,
    transport: Transport,
    /// The local address of the connections, if it is the same for all of them.
    local: Option<Address>,
    preparing: Option<Preparing>,
    /// Makes a drain wait until the backlog was accepted.
    _source: Source,
}

impl Accepting {
    pub(super) fn new(
        Dispatcher { shared, group, .. }: &Dispatcher,
        listener: OwnedFd,
        transport: Transport,
        local: Address,
        preparing: Option<Preparing>,
    ) -> io::Result<Self> {
        let _context = shared.runtime.enter();
        // The connections of a listener on all addresses have different local addresses.
        let is_same_for_all =
            local.socket_addr().is_none_or(|address| !address.ip().is_unspecified());
        Ok(Self {
            listener: sys::register(listener, Interest::READABLE)?,
            transport,
            local: is_same_for_all.then_some(local),
            preparing,
            _source: Source::new(shared),
            shared: Arc::clone(shared),
            group: group.clone(),
        })
    }

    /// Accepts until the dispatcher drains, and then the connections in the backlog.
    pub(super) async fn run(self) -> io::Result<()> {
        let drains = self.shared.until(|pool| !pool.is_open());
        if let Either::Left((outcome, _)) = select(pin!(self.accept()), pin!(drains)).await {
            outcome?;
        }
        self.accept_backlog().await;
        Ok(())
    }

    /// Accepts until the dispatcher drains. It holds no connection at any await, so dropping it
    /// loses none.
    async fn accept(&self) -> io::Result<()> {
        let mut shortage = Shortage::new(&self.shared.pauses);
        // The group of a connection is not known before it is prepared.
        let group = self.preparing.is_none().then_some(&self.group);
        'ready: loop {
            // Wait for a client before a slot is reserved, because others may need the slot.
            let mut ready = self.listener.readable().await?;
            for _ in 0..BATCH {
                let prepare_permit = self.prepare_permit().await;
                let Some(slot) = slot_in(&self.shared, group).await else { return Ok(()) };
                match self.accept_one() {
                    Ok((socket, peer)) => {
                        shortage.end();
                        let is_scarce = is_of_reserve(&socket, shortage.reserve_from);
                        self.take_on(socket, peer, slot, prepare_permit);
                        if is_scarce {
                            self.wait_for_descriptors(&mut shortage).await;
                            shortage.end();
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        shortage.end();
                        ready.clear_ready();
                        continue 'ready;
                    }
                    Err(error) if is_final(&error) => return Err(error),
                    Err(error) => {
                        // Other connections can use the slot and the permit during the pause.
                        drop((slot, prepare_permit));
                        // Any other error is that of one connection. Only the next call shows
                        // whether a shortage is over.
                        if sys::is_exhausted(&error) {
                            shortage.report(error);
                            self.wait_for_descriptors(&mut shortage).await;
                        }
                        sleep(BACK_OFF).await;
                    }
                }
            }
            yield_now().await; // workers are sent what was accepted so far
        }
    }

    /// Waits as long as no further connection may be accepted for lack of descriptors.
    async fn wait_for_descriptors(&self, shortage: &mut Shortage<'_>) {
        while !self.may_accept(shortage) {
            shortage.report(io::Error::from_raw_os_error(libc::EMFILE));
            sleep(BACK_OFF).await;
        }
    }

    /// Accepts the connections in the kernel's backlog. Closing the listener would reset them.
    async fn accept_backlog(&self) {
        for count in 1..=MOST_AT_END {
            let prepare_permit = self.prepare_permit().await;
            let Some(slot) = self.shared.admit_until_closed() else { return };
            match self.accept_one() {
                Ok((socket, peer)) => self.take_on(socket, peer, slot, prepare_permit),
                // The backlog is empty.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_final(&error) => return,
                Err(error) if sys::is_exhausted(&error) => {
                    drop((slot, prepare_permit));
                    sleep(BACK_OFF).await;
                }
                Err(_) => {} // it is the error of one connection
            }
            if count % BATCH == 0 {
                yield_now().await;
            }
        }
    }

    /// Waits until a connection may be prepared. `None` if connections are handed over as they are.
    async fn prepare_permit(&self) -> Option<PreparePermit> {
        match &self.preparing {
            Some(preparing) => Some(preparing.prepare_permit().await),
            None => None,
        }
    }

    fn accept_one(&self) -> io::Result<(OwnedFd, Address)> {
        let listener = self.listener.as_fd();
        match self.transport {
            Transport::Tcp => {
                sys::accept_tcp(listener).map(|(stream, peer)| (stream.into(), peer.into()))
            }
            Transport::UnixStream => {
                sys::accept_unix(listener).map(|(stream, peer)| (stream.into(), peer.into()))
            }
        }
    }

    /// Hands over an accepted connection, or begins to prepare it.
    fn take_on(
        &self,
        socket: OwnedFd,
        peer: Address,
        slot: Slot,
        prepare_permit: Option<PreparePermit>,
    ) {
        if let Some(prepare_permit) = prepare_permit {
            drop(slot); // the peer decides how long the preparation takes
            return prepare_permit.prepare(&self.shared, &self.group, socket);
        }
        let attributes = Attributes::new(self.transport);
        match Handover::from_socket(socket, attributes, Some(peer), self.local.clone()) {
            Ok(connection) => slot.dispatch(connection, &self.group),
            Err(unsendable) => self.shared.refuse_unsendable(*unsendable),
        }
    }

    /// Returns true if there is a descriptor outside the reserve, or if few connections use the
    /// reserve. Updates the beginning of the reserve, because the limit of the process may have
    /// changed.
    fn may_accept(&self, shortage: &mut Shortage<'_>) -> bool {
        let listener: BorrowedFd<'_> = self.listener.as_fd();
        shortage.reserve_from = first_of_reserve(RESERVE);
        let is_one_free = listener
            .try_clone_to_owned()
            .is_ok_and(|next| !is_of_reserve(next, shortage.reserve_from));
        let preparing = self.preparing.as_ref().map_or(0, Preparing::count);
        is_one_free || self.shared.with_pool(|pool| pool.on_their_way()) + preparing < FEW
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use crate::handoff::{Accepted, DispatchError, Dispatcher, NotDispatched};

    #[tokio::test]
    async fn an_accepted_connection_that_cannot_be_offered_is_closed_and_counted() {
        let dispatcher = Dispatcher::builder().build();
        let (connection, mut client) = UnixStream::pair().unwrap();
        let unsendable = DispatchError {
            reason: NotDispatched::Draining,
            connection: Accepted::from(connection),
        };
        dispatcher.shared.refuse_unsendable(unsendable);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        let stats = dispatcher.stats();
        assert_eq!((stats.dispatched, stats.lost), (1, 1));
    }
}
