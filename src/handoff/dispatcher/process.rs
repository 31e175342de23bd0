//! The process at the other end of a link.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use tokio::io::unix::AsyncFd;

use super::{
    RetireCause,
    pidfd::has_ended,
    pool::{ProcessId, ProcessInfo, ProcessState},
    started::Started,
};

/// The process of a worker. The end of its socket does not show that the process has ended: it may
/// go on without, and a child process of its own may hold the socket open.
pub(super) enum Process {
    /// A process that was started by this dispatcher, or by one that this dispatcher has replaced.
    Started { id: ProcessId, process: Started, pid: Option<u32> },
    /// A process that has connected. All its links share this, so it takes one descriptor even if
    /// it connects often.
    Peer(Arc<Peer>),
    /// The other end of a pair. The socket names the process that made the pair, which need not be
    /// the one that uses it.
    Unknown(ProcessId),
}

/// A process that has connected.
#[derive(Debug)]
pub(super) struct Peer {
    id: ProcessId,
    pid: Option<u32>,
    pidfd: AsyncFd<OwnedFd>,
    /// True if a task waits for its end.
    is_watched: AtomicBool,
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Peer {
    pub(super) fn new(id: ProcessId, pid: Option<u32>, pidfd: AsyncFd<OwnedFd>) -> Self {
        Self { id, pid, pidfd, is_watched: AtomicBool::new(false) }
    }

    pub(super) fn id(&self) -> ProcessId {
        self.id
    }

    /// Marks it as watched. Returns true if it was before.
    pub(super) fn set_watched(&self) -> bool {
        self.is_watched.swap(true, Relaxed)
    }

    /// Waits until the process ends.
    pub(super) async fn ended(&self) {
        let _ = self.pidfd.readable().await;
    }

    pub(super) fn has_ended(&self) -> bool {
        has_ended(self.pidfd.get_ref())
    }
}

impl Process {
    pub(super) fn info(&self) -> ProcessInfo {
        match self {
            Self::Started { id, pid, .. } => ProcessInfo { id: *id, pid: *pid, is_child: true },
            Self::Peer(peer) => ProcessInfo { id: peer.id, pid: peer.pid, is_child: false },
            Self::Unknown(id) => ProcessInfo { id: *id, pid: None, is_child: false },
        }
    }

    /// Is ready when a process that was started has ended. Is never ready for a process that has
    /// connected: it may have left the socket to another process, as a program that daemonizes
    /// does, so only the end of the socket counts.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Started { process, .. } => process.poll_ended(cx).map(drop),
            Self::Peer(_) | Self::Unknown(_) => Poll::Pending,
        }
    }

    /// Returns the state of the process when its link ends for this reason. `has_received` is true
    /// if none of the messages to it are in flight.
    pub(super) fn state(&mut self, cause: &RetireCause, has_received: bool) -> ProcessState {
        if let Self::Peer(peer) = self
            && peer.has_ended()
        {
            *self = Self::Unknown(peer.id); // if its socket is open, another process has it
        }
        match self {
            Self::Started { process, .. } => match process.has_ended() {
                (true, status) => ProcessState::Ended(status),
                (false, _) => ProcessState::Lives { has_received },
            },
            // Of an unknown process, the end of the socket counts as the end of the process.
            Self::Unknown(_) if *cause == RetireCause::Ended => ProcessState::Ended(None),
            Self::Peer(_) | Self::Unknown(_) => ProcessState::Lives { has_received },
        }
    }

    /// Kills a process that was started. A process that has connected is never killed.
    pub(super) fn kill(&mut self) {
        if let Self::Started { process, .. } = self {
            process.kill();
        }
    }

    /// Leaves the process to another dispatcher: nothing in this process ends it from now on.
    pub(super) fn release(&mut self) {
        if let Self::Started { process, .. } = self {
            process.release();
        }
    }

    /// Makes the process this dispatcher's again.
    pub(super) fn take_back(&mut self) {
        if let Self::Started { process, .. } = self {
            process.take_back();
        }
    }
}
