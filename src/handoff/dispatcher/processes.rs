use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use tokio::{io::Interest, process::Child};

use super::{
    pidfd::{has_ended, pid_of},
    pool::ProcessId,
    process::{Peer, Process},
    started::Started,
};
use crate::{Socket, sys};

/// The processes of a dispatcher's workers: their numbers, and those that have connected.
#[derive(Debug, Default)]
pub(super) struct Processes {
    last: ProcessId,
    peers: HashMap<u32, Weak<Peer>>,
    /// The pidfds of all processes that have one.
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
    /// one. If the pidfd can't be registered, only the end of the socket shows that of the process.
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
        // The new pidfd's process was alive just now. If the known process with the same number is
        // still alive, the number has belonged to it all the time: both are the same process.
        let known = pid.and_then(|pid| self.peers.get(&pid)?.upgrade());
        if let Some(known) = known.filter(|known| is_alive && !known.has_ended()) {
            return Some(known);
        }
        let pidfd = sys::register(pidfd, Interest::READABLE).ok()?;
        let peer = Arc::new(Peer::new(self.next_id(), pid, pidfd));
        self.note(peer.id(), Some(Arc::<Peer>::clone(&peer)));
        if let Some(pid) = pid.filter(|_| is_alive) {
            self.peers.retain(|_, known| known.strong_count() > 0);
            self.peers.insert(pid, Arc::downgrade(&peer));
        }
        Some(peer)
    }
}
