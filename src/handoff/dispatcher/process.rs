//! The process at the other end of a link.

use std::{
    collections::HashMap,
    fs,
    future::pending,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
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
    started::Started,
};
use crate::{Socket, sys};

/// The end of a socket says little about a process: a child of its own may hold it open, and it may
/// go on without.
pub(super) enum Process {
    /// Started here, or by a dispatcher that this one has replaced.
    Started { id: ProcessId, process: Started, pid: Option<u32> },
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
    /// The pidfds of those that are known by one.
    pidfds: HashMap<ProcessId, Weak<dyn AsFd + Send + Sync>>,
}

impl Processes {
    fn next_id(&mut self) -> ProcessId {
        self.last += 1;
        self.last
    }

    pub(super) fn child(&mut self, child: Child) -> Process {
        let (id, pid, process) = (self.next_id(), child.id(), Started::child(child));
        self.note(id, process.pidfd());
        Process::Started { id, pid, process }
    }

    fn note(&mut self, id: ProcessId, pidfd: Option<Arc<dyn AsFd + Send + Sync>>) {
        self.pidfds.retain(|_, known| known.strong_count() > 0);
        self.pidfds.extend(pidfd.map(|pidfd| (id, Arc::downgrade(&pidfd))));
    }

    /// Returns a pidfd of a process that has not ended, if there is one.
    pub(super) fn pidfd(&self, id: ProcessId) -> Option<OwnedFd> {
        self.pidfds.get(&id)?.upgrade()?.as_fd().try_clone_to_owned().ok()
    }

    /// Returns the process of a worker that comes from another dispatcher, by a pidfd if there is
    /// one. If that can't be registered, only the socket tells of the process.
    pub(super) fn taken(&mut self, pidfd: Option<OwnedFd>, is_started: bool) -> Process {
        let Some(pidfd) = pidfd else { return Process::Unknown(self.next_id()) };
        let pid = pid_of(&pidfd);
        if !is_started {
            let peer = self.known_peer(pid, pidfd);
            return peer.map_or_else(|| Process::Unknown(self.next_id()), Process::Peer);
        }
        match Started::elsewhere(pidfd) {
            Ok(process) => {
                let id = self.next_id();
                self.note(id, process.pidfd());
                Process::Started { id, process, pid }
            }
            Err(_) => Process::Unknown(self.next_id()),
        }
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
        let pid = pid.filter(|pid| *pid > 0); // 0: in a pid namespace that this process cannot see
        self.known_peer(pid, socket.peer_pidfd().ok()?)
    }

    /// Returns the process with this number and pidfd.
    fn known_peer(&mut self, pid: Option<u32>, pidfd: OwnedFd) -> Option<Arc<Peer>> {
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
        self.note(peer.id, Some(Arc::<Peer>::clone(&peer)));
        if let Some(pid) = pid.filter(|_| is_alive) {
            self.peers.retain(|_, known| known.strong_count() > 0);
            self.peers.insert(pid, Arc::downgrade(&peer));
        }
        Some(peer)
    }
}

/// Returns the number of the process of a pidfd, if this process can see it (proc_pid_fdinfo(5)).
fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Returns true if the process of this pidfd has ended.
pub(super) fn has_ended(pidfd: impl AsFd) -> bool {
    let mut poll = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|events| events > 0)
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
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
            Self::Started { id, pid, .. } => ProcessInfo { id: *id, pid: *pid, is_child: true },
            Self::Peer(peer) => ProcessInfo { id: peer.id, pid: peer.pid, is_child: false },
            Self::Unknown(id) => ProcessInfo { id: *id, pid: None, is_child: false },
        }
    }

    /// Ready when a process that was started has ended. Of other processes the end of the socket
    /// tells: one that has connected may have handed the socket over to the process that stays, as
    /// a program does that daemonizes.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Started { process, .. } => process.poll_ended(cx).map(drop),
            Self::Peer(_) | Self::Unknown(_) => Poll::Pending,
        }
    }

    /// Returns what is known of it when its link ends for this reason. `has_received` is true if
    /// nothing that it was sent is in flight.
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
            // If nothing tells of the process, the end of its socket is taken for the end of the
            // process.
            Self::Unknown(_) if *cause == RetireCause::Ended => ProcessState::Ended(None),
            Self::Peer(_) | Self::Unknown(_) => ProcessState::Lives { has_received },
        }
    }

    /// Kills a process that was started. Other processes are not ours to kill.
    pub(super) fn kill(&mut self) {
        if let Self::Started { process, .. } = self {
            process.kill();
        }
    }

    /// Another dispatcher goes on with it: nothing of this process ends it any longer.
    pub(super) fn release(&mut self) {
        if let Self::Started { process, .. } = self {
            process.release();
        }
    }

    /// It is this dispatcher's again.
    pub(super) fn take_back(&mut self) {
        if let Self::Started { process, .. } = self {
            process.take_back();
        }
    }

    /// Tells the pool when it ends: always of one that was started, and of others if that matters.
    /// One that is this dispatcher's is killed if it is too late.
    pub(super) fn watch(self, shared: &Arc<Shared>, is_ours: bool, matters: bool) {
        match self {
            Self::Started { id, process, .. } if is_ours => {
                drop(tokio::spawn(reap(Arc::clone(shared), id, process)))
            }
            Self::Started { id, process, .. } => {
                drop(tokio::spawn(attend(Arc::clone(shared), id, process)))
            }
            Self::Peer(peer) if matters => peer.watch(shared),
            Self::Peer(_) | Self::Unknown(_) => {}
        }
    }
}

/// Waits for the end of a process that is not this dispatcher's: another one goes on with it, or it
/// has never spoken with this one. If this dispatcher goes on again after all, so does it.
async fn attend(shared: Arc<Shared>, id: ProcessId, mut process: Started) {
    process.release();
    let has_moved = shared.act(|pool| pool.is_succeeded());
    select! {
        status = process.ended() => return shared.process_ended(id, status),
        () = shared.until(|pool| !pool.is_succeeded()), if has_moved => {}
    }
    process.take_back();
    reap(shared, id, process).await;
}

/// Waits until a process that has left ends. It is killed at the end of a drain, or when its time
/// to exit is over.
async fn reap(shared: Arc<Shared>, id: ProcessId, mut process: Started) {
    let mut kill_all = shared.kill.subscribe();
    let is_overdue = async {
        sleep(shared.config.exit_timeout).await;
        if !shared.config.kill_hung {
            pending::<()>().await;
        }
    };
    let pid = process.pid();
    let status = select! {
        status = process.ended() => Some(status),
        _ = kill_all.wait_for(|kill| *kill) => None,
        () = is_overdue => {
            warn!(pid, "killing a process that has not ended in time after its worker has left");
            None
        }
    };
    let status = match status {
        Some(status) => status,
        None => {
            process.kill();
            process.ended().await
        }
    };
    shared.process_ended(id, status);
}
