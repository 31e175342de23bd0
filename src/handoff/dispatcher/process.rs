//! The process at the other end of a link.

use std::{
    future::{Future, poll_fn},
    io,
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Child,
};
use tracing::warn;

use super::{LinkId, Shared};
use crate::{Socket, sys};

/// The end of a socket says little about a process: a child of its own may hold it open, and it may go on without.
pub(super) enum Process {
    /// Started here.
    Child { child: Box<Child>, pid: Option<u32> },
    /// Has connected.
    Peer { pidfd: AsyncFd<OwnedFd>, pid: Option<u32> },
    /// The other end of a pair: the socket knows who made the pair, not who uses it.
    Unknown,
}

impl Process {
    pub(super) fn child(child: Child) -> Self {
        Self::Child { pid: child.id(), child: Box::new(child) }
    }

    pub(super) fn of_peer(socket: &Socket) -> Self {
        let known = || -> io::Result<Self> {
            let pid = socket.peer_cred()?.pid.and_then(|pid| u32::try_from(pid).ok());
            if pid == Some(std::process::id()) {
                return Ok(Self::Unknown);
            }
            Ok(Self::Peer { pidfd: sys::register(socket.peer_pidfd()?, Interest::READABLE)?, pid })
        };
        known().unwrap_or(Self::Unknown)
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Child { pid, .. } | Self::Peer { pid, .. } => *pid,
            Self::Unknown => None,
        }
    }

    pub(super) fn is_known(&self) -> bool {
        !matches!(self, Self::Unknown)
    }

    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Child { child, .. } => pin!(child.wait()).poll(cx).map(drop),
            Self::Peer { pidfd, .. } => pidfd.poll_read_ready(cx).map(drop),
            Self::Unknown => Poll::Pending,
        }
    }

    pub(super) fn has_ended(&mut self) -> bool {
        match self {
            Self::Child { child, .. } => matches!(child.try_wait(), Ok(Some(_))),
            Self::Peer { pidfd, .. } => {
                let mut poll = [PollFd::new(pidfd.get_ref().as_fd(), PollFlags::POLLIN)];
                nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
            }
            Self::Unknown => false,
        }
    }

    /// Kills a child. Other processes are not ours to kill.
    pub(super) fn kill(&mut self) {
        if let Self::Child { child, pid } = self
            && let Err(error) = child.start_kill()
        {
            warn!(pid, %error, "worker cannot be killed");
        }
    }

    /// Has the pool know when it ends, if that matters. A child is reaped, and killed at the end of a drain.
    pub(super) fn watch(mut self, shared: &Arc<Shared>, link: LinkId, matters: bool) {
        let child = match self {
            Self::Child { .. } => true,
            Self::Peer { .. } if matters => false,
            Self::Peer { .. } | Self::Unknown => return,
        };
        shared.leftover.fetch_add(usize::from(child), Relaxed);
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let mut kill = shared.kill.subscribe();
            let mut killed = pin!(async move { kill.wait_for(|kill| *kill).await.is_ok() });
            let mut asked = false;
            poll_fn(|cx| {
                if !asked && killed.as_mut().poll(cx).is_ready() {
                    asked = true;
                    self.kill();
                }
                self.poll_ended(cx)
            })
            .await;
            shared.leftover.fetch_sub(usize::from(child), Relaxed);
            shared.act(|pool| pool.on_process_end(link));
            shared.changed();
        });
    }
}
