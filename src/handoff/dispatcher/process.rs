//! The process at the other end of a link.

use std::{
    collections::HashMap,
    future::{Future, pending},
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Child,
    select,
    time::sleep,
};
use tracing::warn;

use super::{
    RetireCause, Shared,
    pool::{ProcessId, ProcessInfo, ProcessState},
};
use crate::{Socket, sys};

/// The end of a socket says little about a process: a child of its own may hold it open, and it may
/// go on without.
pub(super) enum Process {
    /// Started here.
    Child { id: ProcessId, child: Box<Child>, pid: Option<u32> },
    /// Has connected. All links of a process share this, so that it takes one descriptor however
    /// often it connects.
    Peer(Arc<Peer>),
    /// The other end of a pair: the socket knows who made the pair, not who uses it.
    Unknown(ProcessId),
}

/// A process that has connected.
#[derive(Debug)]
pub(super) struct Peer {
    id: ProcessId,
    pid: Option<u32>,
    pidfd: AsyncFd<OwnedFd>,
    /// A task waits for its end.
    is_watched: AtomicBool,
}

/// Numbers the processes, and knows those that have connected.
#[derive(Debug, Default)]
pub(super) struct Processes {
    last: ProcessId,
    peers: HashMap<u32, Weak<Peer>>,
}

impl Processes {
    fn next_id(&mut self) -> ProcessId {
        self.last += 1;
        self.last
    }

    pub(super) fn child(&mut self, child: Child) -> Process {
        Process::Child { id: self.next_id(), pid: child.id(), child: Box::new(child) }
    }

    /// Returns the process that has connected with this socket.
    pub(super) fn peer_of(&mut self, socket: &Socket) -> Process {
        self.peer(socket).map_or_else(|| Process::Unknown(self.next_id()), Process::Peer)
    }

    fn peer(&mut self, socket: &Socket) -> Option<Arc<Peer>> {
        let pid = socket.peer_cred().ok()?.pid.and_then(|pid| u32::try_from(pid).ok());
        if pid == Some(std::process::id()) {
            return None;
        }
        let pidfd = socket.peer_pidfd().ok()?;
        let pid = pid.filter(|pid| *pid > 0); // 0: in a pid namespace that this process cannot see
        let is_alive = !has_ended(&pidfd);
        // This one was alive just now. If the known one with the same number is still alive, the
        // number has belonged to it all the time, and both are the same process.
        let known = pid.and_then(|pid| self.peers.get(&pid)?.upgrade());
        if let Some(known) = known.filter(|known| is_alive && !known.has_ended()) {
            return Some(known);
        }
        let pidfd = sys::register(pidfd, Interest::READABLE).ok()?;
        let peer =
            Arc::new(Peer { id: self.next_id(), pid, pidfd, is_watched: AtomicBool::new(false) });
        if let Some(pid) = pid.filter(|_| is_alive) {
            self.peers.retain(|_, known| known.strong_count() > 0);
            self.peers.insert(pid, Arc::downgrade(&peer));
        }
        Some(peer)
    }
}

/// Returns true if the process of this pidfd has ended.
fn has_ended(pidfd: impl AsFd) -> bool {
    let mut poll = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
}

impl Peer {
    fn has_ended(&self) -> bool {
        has_ended(self.pidfd.get_ref())
    }

    /// Tells the pool when it ends.
    fn watch(self: Arc<Self>, shared: &Arc<Shared>) {
        let (id, was_watched) = (self.id, self.is_watched.swap(true, Relaxed));
        if !was_watched {
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                let _ = self.pidfd.readable().await;
                shared.process_ended(id, None);
            });
        } else if self.has_ended() {
            // The task that has watched it may have told so before this link was retired.
            shared.process_ended(id, None);
        }
    }
}

impl Process {
    pub(super) fn info(&self) -> ProcessInfo {
        match self {
            Self::Child { id, pid, .. } => ProcessInfo { id: *id, pid: *pid, is_child: true },
            Self::Peer(peer) => ProcessInfo { id: peer.id, pid: peer.pid, is_child: false },
            Self::Unknown(id) => ProcessInfo { id: *id, pid: None, is_child: false },
        }
    }

    /// Ready when a child has ended. Of other processes the end of the socket tells: one that has
    /// connected may have handed the socket over to the process that stays, as a program does that
    /// daemonizes.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Child { child, .. } => pin!(child.wait()).poll(cx).map(drop),
            Self::Peer(_) | Self::Unknown(_) => Poll::Pending,
        }
    }

    /// What is known of it when its link ends for this reason. `has_received` is true if nothing
    /// that it was sent is in flight.
    pub(super) fn state(&mut self, cause: &RetireCause, has_received: bool) -> ProcessState {
        if let Self::Peer(peer) = self
            && peer.has_ended()
        {
            *self = Self::Unknown(peer.id); // if its socket is open, another process has it
        }
        match self {
            Self::Child { child, .. } => match child.try_wait() {
                Ok(Some(status)) => ProcessState::Ended(Some(status)),
                _ => ProcessState::Lives { has_received },
            },
            // If nothing tells of the process, the end of its socket is taken for the end of the
            // process.
            Self::Unknown(_) if *cause == RetireCause::Ended => ProcessState::Ended(None),
            Self::Peer(_) | Self::Unknown(_) => ProcessState::Lives { has_received },
        }
    }

    /// Kills a child. Other processes are not ours to kill.
    pub(super) fn kill(&mut self) {
        if let Self::Child { child, .. } = self {
            kill(child);
        }
    }

    /// Tells the pool when it ends: always of a child, which is reaped, and of others if that
    /// matters.
    pub(super) fn watch(self, shared: &Arc<Shared>, matters: bool) {
        match self {
            Self::Child { id, child, .. } => {
                drop(tokio::spawn(reap(Arc::clone(shared), id, child)))
            }
            Self::Peer(peer) if matters => peer.watch(shared),
            Self::Peer(_) | Self::Unknown(_) => {}
        }
    }
}

fn kill(child: &mut Child) {
    if let Err(error) = child.start_kill() {
        warn!(pid = child.id(), %error, "worker cannot be killed");
    }
}

/// Waits until a child that has left ends. It is killed at the end of a drain, or when its time to
/// exit is over.
async fn reap(shared: Arc<Shared>, id: ProcessId, mut child: Box<Child>) {
    let mut kill_all = shared.kill.subscribe();
    let is_overdue = async {
        sleep(shared.config.exit_timeout).await;
        if !shared.config.kill_hung {
            pending::<()>().await;
        }
    };
    let pid = child.id();
    let status = select! {
        status = child.wait() => Some(status),
        _ = kill_all.wait_for(|kill| *kill) => None,
        () = is_overdue => {
            warn!(pid, "killing a process that has not ended in time after its worker has left");
            None
        }
    };
    let status = match status {
        Some(status) => status,
        None => {
            kill(&mut child);
            child.wait().await
        }
    };
    shared.process_ended(id, status.ok());
}
