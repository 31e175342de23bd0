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
    handover::{Handover, shut_down},
    pool::ProcessId,
    shared::lock,
    source::Source,
    worker_entry::WorkerEntryGuard,
    worker_task::WorkerTask,
};
use crate::{
    Frame, Socket, SocketKind,
    handoff::{
        Connection, ConnectionParts, ConnectionStream, Group, Incoming, Transport,
        protocol::{MAX_OFFER_FDS, MAX_UNANSWERED},
    },
};

/// For another dispatcher that hands on its connections to leave, once this one drains: its
/// connections have nobody else to go to.
const LAST_CALL: Duration = Duration::from_secs(1);

/// A dispatcher in another process that is going to replace this one, while the workers go on.
/// From [`Dispatcher::prepare_succession`].
///
/// Dropped before it has [begun](Self::begin), it changes nothing: the other dispatcher sees the
/// end of its links. Dropped after that, it can't be undone any longer.
#[derive(Debug)]
pub struct Succession {
    shared: Arc<Shared>,
    /// The new links of workers, with their ends.
    links: Vec<(WorkerId, ProcessId, OwnedFd)>,
    /// For connections that no worker has adopted: to the other dispatcher, and back.
    connections: Option<(Socket, Socket)>,
    /// Connections come back through this.
    back: Option<Socket>,
}

/// The workers that a dispatcher has taken from the one before it, by
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
    /// Its name here.
    pub id: WorkerId,
    /// The program that a dispatcher has started, as
    /// [`WorkerStats::program`](super::WorkerStats::program). `None` if the worker has connected.
    pub program: Option<String>,
    /// The number of its process, if that is in this PID namespace.
    pub pid: Option<u32>,
    /// The group that it belongs to.
    pub group: Group,
}

impl Dispatcher {
    /// Prepares for a dispatcher in another process to go on in the place of this one. Send it the
    /// frames, for [`take_workers`](Self::take_workers), over a socket of this crate. Nothing has
    /// changed until [`begin`](Succession::begin).
    ///
    /// Of all workers those move along that take connections, and know how to: each with
    /// [`Incoming`], and others that say so in their
    /// [HELLO](super::protocol::FromWorker::Hello). The others finish what they have, and leave.
    ///
    /// The two dispatchers have to agree on who dispatches: for example by a
    /// [takeover](crate::takeover), which does all of this.
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
        for worker in self.shared.act(|pool| pool.movable()) {
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

    /// Goes on with the workers of another dispatcher, which has sent these frames: see
    /// [`prepare_succession`](Self::prepare_succession). They say hello when that has
    /// [begun](Succession::begin). Connections that it has and that no worker has adopted come
    /// along.
    ///
    /// The closure returns the command by which a worker is to be [started
    /// again](WorkerCommand::restart) when its process ends, or `None`. It is asked only about
    /// workers that a dispatcher has started. A worker whose process was not to be moved, since it
    /// has ended or is too old, is started right away.
    ///
    /// # Errors
    /// `InvalidData` if a frame is none of `prepare_succession`. Then no worker is taken.
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
        let id = self.shared.act(|pool| pool.add_worker(group.clone(), program.clone()));
        let task = WorkerTask::new(Arc::clone(&self.shared), id, link, process);
        self.shared.act(|pool| pool.take_worker(id));
        let worker = TakenWorker { id, program, pid, group };
        match is_started.then(|| restart(&worker)).flatten() {
            Some(command) => self.supervise(id, command, task),
            None => self.run(id, task),
        }
        id
    }
}

impl Succession {
    /// Begins: from here on the other dispatcher dispatches. Workers go on at their new links;
    /// connections that no worker has adopted go to the other dispatcher, and so does whatever is
    /// dispatched here from now on. Call it once.
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
        // Workers that have ended meanwhile do not come for theirs.
        let coming = shared.act(|pool| {
            Vec::from_iter(links.into_iter().map(|(id, _)| id).filter(|id| pool.needs_link(*id)))
        });
        lock(&shared.new_links).theirs.retain(|id, _| coming.contains(id));
    }

    /// Undoes it: this dispatcher dispatches again. Workers come back, also those whose link to the
    /// other dispatcher has ended with that; connections that it has [given
    /// back](TakenWorkers::give_back) come back. Workers that have left meanwhile are started
    /// again if they [are to be](WorkerCommand::restart).
    pub fn undo(&mut self) {
        let _context = self.shared.runtime.enter();
        let Some(back) = self.back.take() else { return };
        let shared = &self.shared;
        let mut links = Vec::new();
        *lock(&shared.new_links) = Default::default(); // of workers that have not moved yet
        for id in shared.act(|pool| pool.moved()) {
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
        shared.act(|pool| pool.take_back(&links, Instant::now()));
        shared.changed();
        receive(shared, back);
    }
}

impl TakenWorkers {
    /// The workers that were taken.
    pub fn workers(&self) -> &[WorkerId] {
        &self.workers
    }

    /// Gives everything back to the dispatcher before this one, which goes on after all: it takes
    /// its workers back by itself ([`Succession::undo`]). Connections that no worker has adopted
    /// go to it, and workers that were started here finish what they have.
    ///
    /// [Drain](Dispatcher::drain) this dispatcher after that.
    pub fn give_back(&mut self) {
        let _context = self.shared.runtime.enter();
        if let Some(back) = self.back.take() {
            hand_on(&self.shared, back, &[]);
        }
    }
}

/// Hands all connections to another dispatcher, as if it were a worker.
fn hand_on(shared: &Arc<Shared>, socket: Socket, links: &[(WorkerId, ProcessId)]) {
    let successor = shared.act(|pool| pool.add_worker(Group::default(), None));
    let task = WorkerTask::of_successor(Arc::clone(shared), successor, socket);
    let entry = WorkerEntryGuard::new(shared, successor);
    shared.tasks.add(async move {
        let _entry = entry;
        task.run().await;
    });
    shared.act(|pool| pool.succeed(successor, links, Instant::now()));
    shared.changed();
}

/// Takes the connections of another dispatcher, as if this one were its worker, until there are no
/// more. Each counts as being served until a worker here has adopted it: then it is lost to neither
/// dispatcher.
fn receive(shared: &Arc<Shared>, socket: Socket) {
    let most = MAX_UNANSWERED as usize;
    let incoming =
        Incoming::builder().window(most).max_connections(most).max_fds(MAX_OFFER_FDS).build(socket);
    let source = Source::new(shared);
    tokio::spawn(async move { take_connections(source, incoming).await });
}

/// Takes them as long as the dispatcher may bring connections.
async fn take_connections(source: Source, mut incoming: Incoming) {
    let shared = Arc::clone(source.shared());
    let mut closes = pin!(async {
        shared.until(|pool| !pool.is_open()).await;
        sleep(LAST_CALL).await;
    });
    loop {
        select! {
            () = &mut closes => return, // what is left goes back
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
    match Handover::prepare(socket, attributes, Some(peer), Some(local)) {
        Ok(mut connection) => {
            connection.origin = Some(serving);
            match shared.late_slot() {
                Some(slot) => slot.dispatch(connection, &Group::default()),
                None => {
                    connection.shut_down();
                    shared.count_lost();
                }
            }
        }
        Err(unsendable) => {
            unsendable.connection.socket.into_iter().for_each(shut_down);
            shared.count_lost();
        }
    }
}
