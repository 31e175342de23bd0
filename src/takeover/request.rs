//! The new process's request to a running server for its listeners.

use std::{
    collections::BTreeSet,
    future::Ready,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::time::timeout;
use tracing::warn;

use super::{
    Error, Options, Server,
    control::Control,
    generations::Generations,
    inspect::{compare, is_lane},
    link::{Event, TakerLink, now},
    listeners::{Entry, Listeners},
    passed, predecessor,
    protocol::{Identity, Lane, Offered, ToTaker},
    server::FIRST_GENERATION,
    shared::Shared,
    steps::{Failure, TakerStep},
};
use crate::{Frame, Socket, SocketKind, close_in_background, socket::PathGuard};

/// Requests the listeners of the server at a path, and receives them.
///
/// The server goes on serving until [`Pending::ready`] is called. If this process ends, or drops
/// the [`Pending`], or takes longer than the server's [`ready_timeout`](Options::ready_timeout),
/// nothing changes for the server.
///
/// # Errors
/// [`Error::Io`] with `NotFound` or `ConnectionRefused` if no server is there;
/// [`Error::NotTrusted`], [`Error::Refused`], [`Error::Aborted`], [`Error::GiverGone`],
/// [`Error::TimedOut`], [`Error::Misbehaved`], and [`Error::Mismatch`] for a listener that is not
/// the one that the server has announced. In each of these cases nothing changes for the server.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
///
/// # Cancel safety
/// Nothing is left behind when dropped: the server goes on.
pub async fn request(path: impl AsRef<Path>, options: Options) -> Result<Pending, Error> {
    let path = std::path::absolute(path)?;
    let socket = connect(&path, &options).await?;
    let mut link = TakerLink::new(socket, options.taker_settings());
    let mut pending = Pending::new(options, path);
    pending.receive(&mut link).await?;
    pending.link = Some(link);
    Ok(pending)
}

/// Connects to the server at a path, if it can be trusted.
pub(super) async fn connect(path: &Path, options: &Options) -> Result<Socket, Error> {
    let connecting = Socket::connect(path, SocketKind::SeqPacket);
    let socket =
        timeout(options.answer_timeout, connecting).await.map_err(|_| Error::TimedOut)??;
    let uid = socket.peer_cred()?.uid;
    if options.trusts(uid) { Ok(socket) } else { Err(Error::NotTrusted { uid }) }
}

/// The listeners of a server, in a process that does not serve yet.
///
/// The application sets itself up now, and then calls [`ready`](Self::ready). Until then it can
/// look at the listeners, but it can't accept from them.
#[derive(Debug)]
pub struct Pending {
    /// The connection to the running server. `None` if no server runs.
    link: Option<TakerLink>,
    options: Options,
    path: PathBuf,
    listeners: Listeners,
    /// For each listener, device and inode of the path that may be removed at its end.
    path_ids: Vec<Option<(u64, u64)>>,
    /// Numbers of listeners that this process does not use.
    declined: BTreeSet<u32>,
    /// The state that the server's application has sent along.
    state: Vec<Frame>,
    /// The workers that the server's dispatcher passes on.
    workers: Vec<Frame>,
    /// The generation of this process.
    generation: u32,
    /// The generation of the running server.
    giver: u32,
    lanes: Vec<Lane>,
    /// The processes that were replaced. The last one is the running server.
    generations: Generations,
    /// The lock of the path, if no server runs or the running server has died.
    lock: Option<PathGuard>,
}

impl Pending {
    /// Returns the identities of the listeners, in the order of the server.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        self.listeners.identities()
    }

    /// Takes the state that the server's application has [sent along](Server::send_state).
    pub fn take_state(&mut self) -> Vec<Frame> {
        std::mem::take(&mut self.state)
    }

    /// Declines a listener that this process does not use. [`Server::declined`] lists it for the
    /// server's application. The listener stays open there until that server can't serve again, and
    /// nobody accepts from it.
    ///
    /// Several listeners with one address are a `SO_REUSEPORT` group. The kernel assigns each
    /// client to one of these sockets, no matter which process accepts from it. So decline all of
    /// them or none. A process with fewer workers than before lets each worker accept from several
    /// sockets.
    ///
    /// # Errors
    /// [`Error::NoSuchListener`].
    pub fn decline(&mut self, name: &str, index: u32) -> Result<(), Error> {
        let number = self.listeners.position(name, index);
        let number =
            number.ok_or_else(|| Error::NoSuchListener { name: name.to_owned(), index })?;
        if self.declined.insert(number)
            && let Some(link) = &mut self.link
        {
            link.taker.decline(number);
        }
        Ok(())
    }

    /// Takes over: this process serves from the moment at which READY was written in full, and the
    /// running server stops accepting.
    ///
    /// If the server has died meanwhile, this process serves unless another process does.
    ///
    /// # Errors
    /// - [`Error::SplitGroup`] if a `SO_REUSEPORT` group was declined in part.
    /// - [`Error::Aborted`] if the server has called the takeover off.
    /// - [`Error::AnotherServes`] if the server has ended and another process serves.
    ///
    /// Then this process does not serve, and its copies of the listeners are closed.
    ///
    /// # Cancel safety
    /// Not cancel safe. When dropped, this process does not serve, and the server goes on or
    /// accepts again.
    pub async fn ready(mut self) -> Result<Server, Error> {
        self.check_groups()?;
        let Some(mut link) = self.link.take() else { return self.serve_first() };
        // Run the protocol until READY is written in full, or the lock has decided.
        link.taker.ready(now());
        let mut is_confirmed = false;
        let mut lock_error = None;
        while !link.taker.is_serving() || link.taker.has_steps() {
            match link.next_step() {
                Some(TakerStep::TryLock) => {
                    match PathGuard::take(&self.path) {
                        Ok(lock) => self.lock = Some(lock),
                        Err(error) => lock_error = Some(error),
                    }
                    link.taker.on_lock(now(), self.lock.is_some());
                }
                Some(TakerStep::Fail(failure)) => return Err(failed(failure, lock_error)),
                Some(TakerStep::Confirmed(_)) => is_confirmed = true, // this process got the lock
                Some(_) => {}
                None => drop(link.next_event().await),
            }
        }
        // With the lock, the server has died: there is no predecessor to watch.
        self.serve(Some(link).filter(|_| !is_confirmed))
    }

    /// Checks that no group was declined in part. Otherwise the clients of a declined listener
    /// would wait without end.
    fn check_groups(&self) -> Result<(), Error> {
        let numbered = || (0..).zip(self.identities());
        let (declined, kept): (Vec<_>, Vec<_>) =
            numbered().partition(|(number, _)| self.declined.contains(number));
        let is_in_group =
            |identity: &Identity| kept.iter().any(|(_, other)| identity.shares_address_with(other));
        match declined.into_iter().find(|(_, identity)| is_in_group(identity)) {
            Some((_, identity)) => Err(Error::SplitGroup { identity: Box::new(identity.clone()) }),
            None => Ok(()),
        }
    }

    /// Serves as the first process at a path.
    fn serve_first(self) -> Result<Server, Error> {
        let Self { options, path, mut listeners, declined, generation, lock, .. } = self;
        listeners.retain(|number| !declined.contains(&number));
        let guard = lock.expect("the first process has the lock");
        // No other process serves. This one does from the moment at which it listens here.
        let control = Control::bind(guard, options.mode)?;
        let shared = Shared::new(options, path, generation, listeners, Some(control), false);
        Ok(Server::start(Arc::new(shared), None::<Ready<()>>))
    }

    /// Serves as the successor of another process. If there is no link, that process has died.
    fn serve(self, link: Option<TakerLink>) -> Result<Server, Error> {
        let Self {
            options,
            path,
            mut listeners,
            mut path_ids,
            declined,
            mut generations,
            lock,
            ..
        } = self;
        let Self { generation, giver, lanes, workers, .. } = self;
        // Remove the declined listeners. Lanes refer to the numbers that the listeners had before.
        let names: Vec<_> = listeners
            .identities()
            .map(|identity| (identity.name.clone(), identity.index))
            .collect();
        listeners.retain(|number| !declined.contains(&number));
        let mut numbers = 0..;
        path_ids.retain(|_| numbers.next().is_some_and(|number| !declined.contains(&number)));
        // If this process got the lock, nobody passes on a control socket: bind a new one.
        let control = match lock.map(|guard| Control::bind(guard, options.mode)).transpose() {
            Ok(control) => control,
            Err(error) => {
                // This process serves all the same, because no other does.
                warn!(path = %path.display(), %error, "takeover: no process can replace this one");
                None
            }
        };
        let shared =
            Arc::new(Shared::new(options, path, generation, listeners, control, link.is_some()));
        // This process receives only from the lanes to its giver.
        for Lane { listener, generation, fd } in lanes {
            let (name, index) = &names[listener as usize];
            let added =
                shared.lanes(name, *index).add(generation, Arc::new(fd), generation == giver);
            if let Err(error) = added {
                // The lane is dropped, as if that process had ended: a bad lane of an old process
                // must not stop the new one.
                warn!(%error, generation, "datagrams of an older process are not forwarded");
            }
        }
        // The giver is one of the old generations now.
        shared.with_workers(|of_shared| of_shared.set_received(workers));
        generations.last_was_replaced();
        generations.limit(shared.options.max_old_generations);
        shared.with_generations(|of_shared| *of_shared = generations);
        // The paths of a dead server are inherited at once. A live server sends their locks later.
        let Some(link) = link else {
            shared.inherit_paths(&path_ids);
            return Ok(Server::start(shared, None::<Ready<()>>));
        };
        let predecessor = predecessor::watch(Arc::clone(&shared), link, path_ids);
        Ok(Server::start(shared, Some(predecessor)))
    }

    /// Returns a value without anything received.
    fn new(options: Options, path: PathBuf) -> Self {
        Self {
            link: None,
            options,
            path,
            listeners: Listeners::new(),
            path_ids: Vec::new(),
            declined: BTreeSet::new(),
            state: Vec::new(),
            workers: Vec::new(),
            generation: FIRST_GENERATION,
            giver: FIRST_GENERATION,
            lanes: Vec::new(),
            generations: Generations::default(),
            lock: None,
        }
    }

    /// Closes the inherited copies of listeners that a process manager has passed.
    pub(super) fn close_passed_copies(&self) {
        passed::close_copies(&self.listeners.cookies());
    }

    /// Returns the listeners of the first process at a path.
    pub(super) fn first(options: Options, guard: PathGuard, listeners: Listeners) -> Self {
        let path = guard.path().to_owned();
        Self { listeners, lock: Some(guard), ..Self::new(options, path) }
    }

    /// Receives until the offer is complete.
    async fn receive(&mut self, link: &mut TakerLink) -> Result<(), Error> {
        loop {
            match link.next_step() {
                Some(TakerStep::Offered) => return Ok(()),
                Some(TakerStep::Fail(failure)) => return Err(failure.into()),
                Some(_) => {}
                None => match link.next_event().await {
                    Some(Event::Message(message)) => self.on_message(message)?,
                    Some(Event::Error(error)) => return Err(Error::Connection(error)),
                    None => {}
                },
            }
        }
    }

    fn on_message(&mut self, message: ToTaker) -> Result<(), Error> {
        match message {
            ToTaker::Listeners(offered) => {
                let mut offered = offered.into_iter();
                for listener in offered.by_ref() {
                    if let Err(error) = self.add(listener) {
                        // The takeover fails, so the rest of the message is closed too.
                        close_in_background(offered.map(|listener| listener.fd));
                        return Err(error);
                    }
                }
            }
            ToTaker::Lanes { generation, giver, lanes } => {
                (self.generation, self.giver) = (generation, giver);
                // A lane has to belong to a listener that was announced before.
                let is_known = |lane: &Lane| (lane.listener as usize) < self.listeners.len();
                if !lanes.iter().all(|lane| is_known(lane) && is_lane(&lane.fd)) {
                    close_in_background(lanes.into_iter().map(|lane| lane.fd));
                    return Err(Error::Misbehaved);
                }
                self.lanes.extend(lanes);
            }
            ToTaker::Generations { replaced_for, fds } => {
                for (milliseconds, leash) in replaced_for.into_iter().zip(fds) {
                    self.generations.add(milliseconds, leash)?;
                }
            }
            ToTaker::State { bytes, fds } => self.state.push(Frame { payload: bytes, fds }),
            ToTaker::Workers { bytes, fds } => self.workers.push(Frame { payload: bytes, fds }),
            _ => {}
        }
        Ok(())
    }

    /// Adds a listener, if its socket is the one that was announced.
    fn add(&mut self, listener: Offered) -> Result<(), Error> {
        let checked = compare(&listener);
        let Offered { identity, cookie, path_id, fd } = listener;
        match checked {
            Ok(Ok(())) => {
                self.path_ids.push(path_id);
                self.listeners.insert(Entry { identity, cookie, fd: Arc::new(fd), guard: None })
            }
            Ok(Err(mismatch)) => {
                close_in_background([fd]);
                Err(Error::Mismatch { identity: Box::new(identity), mismatch })
            }
            Err(error) => {
                close_in_background([fd]);
                Err(error.into())
            }
        }
    }
}

/// Returns the error of a takeover that has failed. `lock_error` is the error of the last attempt
/// to get the lock. If it is not that another process holds the lock, it is the cause of the
/// failure.
fn failed(failure: Failure, lock_error: Option<io::Error>) -> Error {
    match lock_error {
        Some(error)
            if failure == Failure::AnotherServes && error.kind() != io::ErrorKind::AddrInUse =>
        {
            error.into()
        }
        _ => failure.into(),
    }
}
