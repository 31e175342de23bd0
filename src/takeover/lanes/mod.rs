//! The lanes of one socket: to each other process that may have connections on it, a pair of Unix
//! sockets over which that process gets its datagrams.

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

/// The size of a lane's buffer in bytes. The kernel cuts it to `net.core.wmem_max`.
const BUFFER_BYTES: usize = 4 << 20;

/// The lanes of one socket, in the order of their age.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    state: Mutex<State>,
    /// The task that receives.
    receiver: AtomicWaker,
    /// Number of datagrams that a lane had no room for.
    lost: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    lanes: Vec<Lane>,
    /// A new process gets a lane to this one.
    is_forwarding: bool,
    /// The lane from which the next datagram is received.
    next_lane: usize,
}

#[derive(Debug)]
struct Lane {
    generation: u32,
    socket: Arc<OwnedFd>,
    /// `None` if the other end is for another process: that of a lane that was passed on.
    receiving: Option<AsyncFd<Arc<OwnedFd>>>,
}

/// The fate of a datagram of another generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forwarded {
    /// It is on its way, or was lost as in a socket's full buffer.
    Gone,
    /// No process of this generation is known.
    NoLane,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start_forwarding(&self) {
        self.lock().is_forwarding = true;
    }

    pub(super) fn missed(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Adds a lane to a generation. `is_ours` is true if the other process sends to this one, too.
    ///
    /// # Panics
    /// If it is ours, outside of a tokio runtime, or if its I/O driver is not enabled.
    pub(super) fn add(
        &self,
        generation: u32,
        socket: Arc<OwnedFd>,
        is_ours: bool,
    ) -> io::Result<()> {
        let receiving = if is_ours {
            Some(sys::register(Arc::clone(&socket), Interest::READABLE)?)
        } else {
            None
        };
        self.lock().lanes.push(Lane { generation, socket, receiving });
        self.receiver.wake();
        Ok(())
    }

    /// Returns lanes for a new process, with the generations at their other ends: one to this
    /// process, whose generation is `own`, and those to older ones that live. The list is empty if
    /// this process forwards nothing and there are no older ones.
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
        // A lane that is ours may still have datagrams that a process forwarded before its end.
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
            // It has ended. If it has forwarded something before, that is received first.
            Err(error) if is_gone(&error) => {
                if state.lanes[index].receiving.is_none() {
                    state.lanes.remove(index);
                }
                Forwarded::NoLane
            }
            Err(_) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                Forwarded::Gone
            }
        }
    }

    /// Closes all lanes, and offers none any longer.
    pub(super) fn close(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }

    /// Notes the task that receives.
    pub(super) fn register(&self, cx: &Context<'_>) {
        self.receiver.register(cx.waker());
    }

    /// Wakes the task that receives.
    pub(super) fn wake(&self) {
        self.receiver.wake();
    }

    /// Receives a datagram that another process has forwarded. Returns its length.
    pub(super) fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<(usize, Header)> {
        let mut state = self.lock();
        let mut left = state.lanes.len();
        while left > 0 {
            // One lane after the other, so that none keeps the others waiting.
            let lane = state.next_lane % state.lanes.len();
            match poll_lane(&state.lanes[lane], cx, buffer) {
                Poll::Ready(Some(received)) => {
                    state.next_lane = lane + 1;
                    return Poll::Ready(received);
                }
                Poll::Ready(None) => drop(state.lanes.remove(lane)),
                Poll::Pending => state.next_lane = lane + 1,
            }
            left -= 1;
        }
        Poll::Pending
    }
}

/// Receives from one lane. `None` is its end.
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
            // This end has closed with something unread, which is reported once, before the rest.
            Err(Errno::ECONNRESET | Errno::EINTR) => {}
            Err(_) => return Poll::Ready(None),
        }
    }
}

/// A packet of a lane.
enum Packet {
    /// A datagram of this length.
    Datagram(usize, Header),
    /// No datagram.
    Foreign,
    End,
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<Packet> {
    let mut header = [0; HEADER_BYTES];
    let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
    // Without room for control data, the kernel installs no descriptor that somebody may have sent.
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT)?;
    let bytes = received.bytes;
    Ok(match (bytes, bytes.checked_sub(HEADER_BYTES), Header::from_bytes(&header)) {
        (0, ..) => Packet::End,
        (_, Some(length), Some(header)) => Packet::Datagram(length, header),
        _ => Packet::Foreign,
    })
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    for end in [&here, &there] {
        setsockopt(end, sockopt::SndBuf, &BUFFER_BYTES)?;
        // Before Linux 6.16 there is no such option, and `receive` has no room for descriptors.
        let _ = setsockopt(end, sys::PassRights, &false);
    }
    Ok((here, there))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn is_closed(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    let polls = poll(&mut polled, PollTimeout::ZERO);
    polls.is_ok() && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
