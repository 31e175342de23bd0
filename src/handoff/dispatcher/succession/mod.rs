//! A dispatcher is replaced by one in another process, while its workers go on.

mod frames;

use std::{
    io,
    os::fd::OwnedFd,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use frames::{Part, Traveller};
use tokio::{select, time::sleep};
use tracing::warn;

use super::{
    Accepted, Dispatcher, Shared, WorkerCommand, WorkerId,
    accepted::Attributes,
    envelope::Envelope,
    handover::Handover,
    pool::ProcessId,
    shared::{Source, WorkerEntryGuard, lock},
    worker_task::WorkerTask,
};
use crate::{
    Frame, Socket, SocketKind,
    handoff::{
        Connection, ConnectionParts, ConnectionStream, Group, Incoming, Transport,
        protocol::{MAX_OFFER_FDS, MAX_UNANSWERED},
    },
};

/// The time for which a draining dispatcher still takes connections from the dispatcher before it.
/// They have nowhere else to go.
const LAST_CALL: Duration = Duration::from_secs(1);

/// The replacement of this dispatcher by one in another process, while the workers go on. From
/// [`Dispatcher::prepare_succession`].
///
/// If it is dropped before it has [begun](Self::begin), nothing changes, and the other dispatcher
/// sees the end of its links. If it is dropped after that, it cannot be undone.
#[derive(Debug)]
pub struct Succession {
    shared: Arc<Shared>,
    /// The new links of the workers.
    links: Vec<(WorkerId, ProcessId, OwnedFd)>,
    /// The sockets for connections that no worker has adopted: to the other dispatcher, and back.
    connections: Option<(Socket, Socket)>,
    /// The socket by which connections come back.
    back: Option<Socket>,
}

/// The workers that a dispatcher has taken from the one before it, from
/// [`Dispatcher::take_workers`].
#[derive(Debug)]
pub struct TakenWorkers {
    shared: Arc<Shared>,
    workers: Vec<WorkerId>,
    back: Option<Socket>,
}

/// A worker that comes from another dispatcher.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TakenWorker {
    /// Its id in this dispatcher.
    pub id: WorkerId,
    /// The program that a dispatcher has started, as
    /// [`WorkerStats::program`](super::WorkerStats::program). `None` if the worker has connected.
    pub program: Option<String>,
    /// The pid of its process, if the process is in this PID namespace.
    pub pid: Option<u32>,
    /// The group that it belongs to.
    pub group: Group,
}

impl Dispatcher {
    /// Prepares the replacement of this dispatcher by one in another process. Send it the frames
    /// over a socket of this crate, for its [`take_workers`](Self::take_workers). Nothing changes
    /// until [`begin`](Succession::begin).
    ///
    /// The workers that take connections and can move go on with the other dispatcher. Every
    /// [`Incoming`] can move, and so can other workers that declare it in their
    /// [HELLO](super::protocol::FromWorker::Hello). The others finish their connections, and leave.
    ///
    /// The two dispatchers have to agree on which one dispatches. A [takeover](crate::takeover)
    /// does that, and all the rest of this.
    ///
    /// # Errors
    /// The errors of making pairs of sockets, usually that there are too few descriptors: three for
    /// each worker.
    pub fn prepare_succession(&self) -> io::Result<(Succession, Vec<Frame>)> {
        let _context = self.shared.runtime.enter();
        let mut parts = Vec::new();
        let (forward, theirs) = Socket::pair(SocketKind::SeqPacket)?;
        let (back, their_back) = Socket::pair(SocketKind::SeqPacket)?;
        parts.push(Part::Connections { forward: theirs, back: their_back });
        let mut links = Vec::new();
        for worker in self.shared.with_pool(|pool| pool.movable()) {
            let (theirs, workers) = Socket::pair(SocketKind::SeqPacket)?;
            let process = worker.process;
            links.push((worker.id, process.id, workers.into()));
            parts.push(Part::Worker(Traveller {
                link: theirs,
                pidfd: self.shared.processes().pidfd(process.id),
                is_started: process.is_child,
                program: worker.program,
                group: worker.group,
            }));
        }
        let frames = parts.into_iter().map(Part::into_frame).collect::<Result<_, _>>()?;
        let shared = Arc::clone(&self.shared);
        let connections = Some((forward, back));
        Ok((Succession { shared, links, connections, back: None }, frames))
    }

    /// Takes the workers of another dispatcher, which has sent these frames: see
    /// [`prepare_succession`](Self::prepare_succession). The workers move when the other dispatcher
    /// has [begun](Succession::begin). Its connections that no worker has adopted move, too.
    ///
    /// The closure returns the command by which a worker is to be [started
    /// again](WorkerCommand::restart) when its process ends, or `None`. It is called only for
    /// workers that a dispatcher has started. If the process of such a worker cannot move, because
    /// it has ended or its version is too old, the worker is started at once.
    ///
    /// # Errors
    /// `InvalidData` if a frame does not come from `prepare_succession`. Then no worker is taken.
    pub fn take_workers(
        &self,
        frames: impl IntoIterator<Item = Frame>,
        mut restart: impl FnMut(&TakenWorker) -> Option<WorkerCommand>,
    ) -> io::Result<TakenWorkers> {
        let _context = self.shared.runtime.enter();
        let parts = frames.into_iter().map(Part::from_frame).collect::<io::Result<Vec<_>>>()?;
        let shared = Arc::clone(&self.shared);
        let mut taken = TakenWorkers { shared, workers: Vec::new(), back: None };
        for part in parts {
            match part {
                Part::Connections { forward, back } => {
                    receive(&self.shared, forward);
                    taken.back = Some(back);
                }
                Part::Worker(traveller) => {
                    taken.workers.push(self.take_worker(traveller, &mut restart));
                }
            }
        }
        Ok(taken)
    }

    fn take_worker(
        &self,
        traveller: Traveller,
        restart: &mut impl FnMut(&TakenWorker) -> Option<WorkerCommand>,
    ) -> WorkerId {
        let Traveller { link, pidfd, is_started, program, group } = traveller;
        let process = self.shared.processes().taken(pidfd, is_started);
        let pid = process.info().pid;
        let id = self.shared.with_pool(|pool| pool.add_worker(group.clone(), program.clone()));
        let task = WorkerTask::new(Arc::clone(&self.shared), id, link, process);
        self.shared.with_pool(|pool| pool.take_worker(id));
        let worker = TakenWorker { id, program, pid, group };
        match is_started.then(|| restart(&worker)).flatten() {
            Some(command) => self.supervise(id, command, task),
            None => self.run(id, task),
        }
        id
    }
}

impl Succession {
    /// Begins the replacement: from now on the other dispatcher dispatches. Workers move to their
    /// new links. Connections that no worker has adopted go to the other dispatcher, and so does
    /// every connection that is dispatched here from now on. Call it once.
    ///
    /// When this dispatcher is not needed any longer, [drain](Dispatcher::drain) it: that waits
    /// until the other one has all connections.
    pub fn begin(&mut self) {
        let _context = self.shared.runtime.enter();
        let Some((forward, back)) = self.connections.take() else { return };
        self.back = Some(back);
        let shared = &self.shared;
        let mut links = Vec::new();
        {
            let mut new_links = lock(&shared.new_links);
            *new_links = Default::default();
            for (worker, process, theirs) in self.links.drain(..) {
                links.push((worker, process));
                new_links.theirs.insert(worker, theirs);
            }
        }
        hand_on(shared, forward, &links);
        // Workers that have ended meanwhile do not take their new links.
        let coming = shared.with_pool(|pool| {
            Vec::from_iter(links.into_iter().map(|(id, _)| id).filter(|id| pool.needs_link(*id)))
        });
        lock(&shared.new_links).theirs.retain(|id, _| coming.contains(id));
    }

    /// Undoes the replacement: this dispatcher dispatches again. Its workers come back, even if the
    /// other dispatcher has died and their links to it have ended. Connections that the other
    /// dispatcher has [given back](TakenWorkers::give_back) come back, too. Workers that have left
    /// meanwhile are started again if their command [allows it](WorkerCommand::restart).
    pub fn undo(&mut self) {
        let _context = self.shared.runtime.enter();
        let Some(back) = self.back.take() else { return };
        let shared = &self.shared;
        let mut links = Vec::new();
        // Workers that have not moved yet stay.
        *lock(&shared.new_links) = Default::default();
        for id in shared.with_pool(|pool| pool.moved()) {
            match Socket::pair(SocketKind::SeqPacket) {
                Ok((ours, theirs)) => {
                    let mut new_links = lock(&shared.new_links);
                    new_links.theirs.insert(id, theirs.into());
                    new_links.ours.insert(id, ours);
                    links.push(id);
                }
                Err(error) => warn!(worker = %id, %error, "worker can't be taken back"),
            }
        }
        shared.with_pool(|pool| pool.take_back(&links, Instant::now()));
        shared.changed();
        receive(shared, back);
    }
}

impl TakenWorkers {
    /// Returns the workers that were taken.
    pub fn workers(&self) -> &[WorkerId] {
        &self.workers
    }

    /// Gives all connections that no worker has adopted back to the dispatcher before this one,
    /// which dispatches again. That dispatcher takes its workers back by itself
    /// ([`Succession::undo`]). Workers that were started here finish their connections.
    ///
    /// [Drain](Dispatcher::drain) this dispatcher after that.
    pub fn give_back(&mut self) {
        let _context = self.shared.runtime.enter();
        if let Some(back) = self.back.take() {
            hand_on(&self.shared, back, &[]);
        }
    }
}

/// Hands all connections over to another dispatcher, as if it were a worker.
fn hand_on(shared: &Arc<Shared>, socket: Socket, links: &[(WorkerId, ProcessId)]) {
    let successor = shared.with_pool(|pool| pool.add_worker(Group::default(), None));
    let task = WorkerTask::of_successor(Arc::clone(shared), successor, socket);
    let entry = WorkerEntryGuard::new(shared, successor);
    shared.tasks.add(async move {
        let _entry = entry;
        task.run().await;
    });
    shared.with_pool(|pool| pool.succeed(successor, links, Instant::now()));
    shared.changed();
}

/// Takes the connections of another dispatcher, as if this one were its worker, until there are no
/// more. Each counts as active at the other dispatcher until a worker of this one has adopted it.
/// So the other dispatcher does not leave before.
fn receive(shared: &Arc<Shared>, socket: Socket) {
    let most = MAX_UNANSWERED as usize;
    let incoming =
        Incoming::builder().window(most).max_connections(most).max_fds(MAX_OFFER_FDS).build(socket);
    let source = Source::new(shared);
    tokio::spawn(async move { take_connections(source, incoming).await });
}

/// Takes connections until this dispatcher drains, and for a moment longer.
async fn take_connections(source: Source, mut incoming: Incoming) {
    let shared = Arc::clone(source.shared());
    let mut closes = pin!(async {
        shared.until(|pool| !pool.is_open()).await;
        sleep(LAST_CALL).await;
    });
    loop {
        select! {
            () = &mut closes => return, // offers that are left go back
            connection = incoming.next() => match connection {
                Some(connection) => take_connection(&shared, connection),
                None => return,
            }
        }
    }
}

fn take_connection(shared: &Arc<Shared>, connection: Connection) {
    let ConnectionParts { stream, prefix, peer, local, metadata, bundle, serving } =
        connection.into_parts();
    let (accepted, transport) = match stream {
        ConnectionStream::Tcp(stream) => (Accepted::from(stream), Transport::Tcp),
        ConnectionStream::Unix(stream) => (Accepted::from(stream), Transport::UnixStream),
    };
    let envelope = Envelope::decode(&metadata);
    let (Ok(socket), Some(Envelope { key, group, metadata })) = (accepted.socket, envelope) else {
        warn!("connection closed: it can't be taken from another dispatcher");
        return shared.count_lost();
    };
    let attributes = Attributes { transport, prefix, metadata, key, group: Some(group), bundle };
    match Handover::from_socket(socket, attributes, Some(peer), Some(local)) {
        Ok(mut connection) => {
            connection.origin = Some(serving);
            match shared.admit_until_closed() {
                Some(slot) => slot.dispatch(connection, &Group::default()),
                None => {
                    connection.shut_down();
                    shared.count_lost();
                }
            }
        }
        Err(unsendable) => shared.refuse_unsendable(*unsendable),
    }
}
