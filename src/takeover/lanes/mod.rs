//! The lanes of one UDP socket. For each other process that may have connections on it, there is a
//! pair of Unix sockets over which that process gets its datagrams.

mod all;
mod packet;

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::task::AtomicWaker;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, recvmsg, setsockopt, socketpair, sockopt,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use self::packet::HEADER_BYTES;
use crate::sys;

pub(super) use self::{all::AllLanes, packet::Header};

/// The size of a lane's buffer in bytes. The kernel lowers it to `net.core.wmem_max`.
const BUFFER_BYTES: usize = 4 << 20;

/// The lanes of one socket, in the order of their age.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    state: Mutex<State>,
    /// The waker of the task that receives.
    receiver: AtomicWaker,
    /// Number of datagrams that were lost because their lane was full.
    missed: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    lanes: Vec<Lane>,
    /// True if a new process gets a lane to this one.
    is_forwarding: bool,
    /// The index of the lane that is tried first, modulo the number of lanes.
    next_lane: usize,
}

/// One lane.
#[derive(Debug)]
struct Lane {
    /// The generation of the process at the other end.
    generation: u32,
    socket: Arc<OwnedFd>,
    /// `None` if this process only sends over the lane, because an older process has passed it on.
    receiving: Option<AsyncFd<Arc<OwnedFd>>>,
}

/// The outcome of forwarding a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forwarded {
    /// The datagram was sent, or was lost because the lane was full.
    Gone,
    /// There is no lane to a process of this generation.
    NoLane,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers lanes to this process from now on.
    pub(super) fn start_forwarding(&self) {
        self.lock().is_forwarding = true;
    }

    /// Returns the number of datagrams that were lost because their lane was full.
    pub(super) fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// Adds a lane to a generation. `receives` is true if the other process also sends to this one.
    ///
    /// # Panics
    /// If it receives, outside of a tokio runtime, or if its I/O driver is not enabled.
    pub(super) fn add(
        &self,
        generation: u32,
        socket: Arc<OwnedFd>,
        receives: bool,
    ) -> io::Result<()> {
        let receiving = if receives {
            Some(sys::register(Arc::clone(&socket), Interest::READABLE)?)
        } else {
            None
        };
        self.lock().lanes.push(Lane { generation, socket, receiving });
        self.receiver.wake();
        Ok(())
    }

    /// Returns the lanes that a new process gets, with the generations at their other ends: a new
    /// one to this process, whose generation is `own`, and those to older processes that still
    /// live. The list is empty if this process forwards nothing and there are no older ones.
    pub(super) fn offer(&self, own: u32, new: u32) -> io::Result<Vec<(u32, Arc<OwnedFd>)>> {
        let mut offered = self.living();
        if self.lock().is_forwarding {
            let (here, there) = pair()?;
            self.add(new, Arc::new(here), true)?;
            offered.push((own, Arc::new(there)));
        }
        Ok(offered)
    }

    /// Removes the lanes whose other end is closed, and returns the others.
    fn living(&self) -> Vec<(u32, Arc<OwnedFd>)> {
        let mut state = self.lock();
        // A closed lane from which this process receives may still contain datagrams.
        state.lanes.retain(|lane| lane.receiving.is_some() || !is_closed(&lane.socket));
        let living = state.lanes.iter().filter(|lane| !is_closed(&lane.socket));
        living.map(|lane| (lane.generation, Arc::clone(&lane.socket))).collect()
    }

    /// Sends a datagram to the process of a generation, without waiting.
    pub(super) fn forward(&self, generation: u32, header: Header, payload: &[u8]) -> Forwarded {
        let mut state = self.lock();
        let Some(index) = state.lanes.iter().position(|lane| lane.generation == generation) else {
            return Forwarded::NoLane;
        };
        let header = header.to_bytes();
        let bytes = [IoSlice::new(&header), IoSlice::new(payload)];
        match sys::sendmsg(state.lanes[index].socket.as_fd(), &bytes, [].into_iter()) {
            Ok(_) => Forwarded::Gone,
            // That process has ended. If it has forwarded datagrams, they are received first: then
            // `poll_receive` removes the lane.
            Err(error) if is_gone(&error) => {
                if state.lanes[index].receiving.is_none() {
                    state.lanes.remove(index);
                }
                Forwarded::NoLane
            }
            // The lane is full. The sender must not wait, so the datagram is lost.
            Err(_) => {
                self.missed.fetch_add(1, Ordering::Relaxed);
                Forwarded::Gone
            }
        }
    }

    /// Closes all lanes. No lanes to this process are offered from now on.
    pub(super) fn close(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }

    /// Registers the task that receives.
    pub(super) fn register(&self, cx: &Context<'_>) {
        self.receiver.register(cx.waker());
    }

    /// Wakes the task that receives.
    pub(super) fn wake(&self) {
        self.receiver.wake();
    }

    /// Receives a datagram that another process has forwarded. Returns its length and its header.
    pub(super) fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<(usize, Header)> {
        let mut state = self.lock();
        let mut untried = state.lanes.len();
        while untried > 0 {
            // Lanes take turns, so that a busy one does not keep the others waiting.
            let lane = state.next_lane % state.lanes.len();
            match poll_lane(&state.lanes[lane], cx, buffer) {
                Poll::Ready(Some(received)) => {
                    state.next_lane = lane + 1;
                    return Poll::Ready(received);
                }
                Poll::Ready(None) => drop(state.lanes.remove(lane)),
                Poll::Pending => state.next_lane = lane + 1,
            }
            untried -= 1;
        }
        Poll::Pending
    }
}

/// Receives from one lane. Returns `None` at its end.
fn poll_lane(
    lane: &Lane,
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<Option<(usize, Header)>> {
    let Some(receiving) = &lane.receiving else { return Poll::Pending };
    loop {
        let Ok(mut ready) = ready!(receiving.poll_read_ready(cx)) else { return Poll::Ready(None) };
        match receive(receiving.get_ref(), buffer) {
            Ok(Packet::Datagram(length, header)) => return Poll::Ready(Some((length, header))),
            Ok(Packet::Foreign) => {}
            Ok(Packet::End) => return Poll::Ready(None),
            Err(Errno::EAGAIN) => ready.clear_ready(),
            // The other end was closed while it had unread packets. The kernel reports that once,
            // and what this end has not read follows.
            Err(Errno::ECONNRESET | Errno::EINTR) => {}
            Err(_) => return Poll::Ready(None),
        }
    }
}

/// A packet of a lane.
enum Packet {
    /// A datagram of this length.
    Datagram(usize, Header),
    /// Something that is not a datagram of this protocol.
    Foreign,
    /// The end: the other process has closed the lane.
    End,
}

/// Receives one packet without waiting.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<Packet> {
    let mut header = [0; HEADER_BYTES];
    let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
    // A peer might send descriptors. Without room for control data, the kernel installs none.
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT)?;
    let bytes = received.bytes;
    Ok(match (bytes, bytes.checked_sub(HEADER_BYTES), Header::from_bytes(&header)) {
        (0, ..) => Packet::End,
        (_, Some(length), Some(header)) => Packet::Datagram(length, header),
        _ => Packet::Foreign,
    })
}

/// Makes a lane: returns the end of this process, and the end for a new one.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    for end in [&here, &there] {
        setsockopt(end, sockopt::SndBuf, &BUFFER_BYTES)?;
        // Linux before 6.16 does not have this option. Then `receive` still accepts no descriptors.
        let _ = setsockopt(end, sys::PassRights, &false);
    }
    Ok((here, there))
}

/// Returns true if sending has failed because the other end is closed.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Returns true if the other end of a lane is closed: the kernel reports `POLLHUP`.
fn is_closed(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    let polls = poll(&mut polled, PollTimeout::ZERO);
    polls.is_ok() && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
