//! The state that the tasks of a server and its handles share.

use std::{
    collections::BTreeSet,
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc::UnboundedSender, oneshot, watch},
    time::Instant,
};
use tracing::{info, warn};

use super::{
    Error, Options, Phase,
    connections::Connections,
    control::{Control, Handover},
    generations::Generations,
    lanes::{AllLanes, Lanes},
    listeners::Listeners,
    protocol::{Address, Identity, Offered, Refusal, ToTaker},
    workers::Workers,
};
use crate::{Frame, SendFd, socket::PathGuard};

pub(super) struct Shared {
    pub(super) options: Options,
    /// The path of the control socket, absolute.
    pub(super) path: PathBuf,
    /// The number of this process among all that have asked for a takeover.
    pub(super) generation: u32,
    state: Mutex<State>,
    pub(super) status: watch::Sender<Status>,
    pub(super) connections: Connections,
}

/// The state that handles and tasks wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) phase: Phase,
    /// The control socket is here.
    pub(super) has_control: bool,
    /// A predecessor may still have to serve again.
    pub(super) has_predecessor: bool,
    pub(super) baton: Baton,
    /// A takeover from this process is under way.
    pub(super) is_claimed: bool,
    /// Process id of the one that has replaced this one, if it is in this PID namespace.
    pub(super) successor: Option<u32>,
    /// The moment at which this process was replaced.
    pub(super) replaced_at: Option<Instant>,
    /// A successor does not wait for this process's connections any longer.
    pub(super) must_leave: bool,
}

/// The baton that comes with a takeover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Baton {
    /// The predecessor has not put it down.
    Coming,
    /// It is here, or there is none: nobody else holds it.
    Here(Option<Bytes>),
}

#[derive(Default)]
struct State {
    listeners: Listeners,
    control: Option<Control>,
    /// Numbers of listeners that the new process has no use for.
    declined: BTreeSet<u32>,
    gates: Vec<Weak<dyn Gate>>,
    lanes: AllLanes,
    /// To the task of the process that takes over.
    link: Option<UnboundedSender<Command>>,
    /// To the task of the predecessor.
    predecessor: Option<UnboundedSender<UpCommand>>,
    /// Called for each takeover.
    application: Option<Application>,
    /// Processes that were replaced before this one serves, and still run.
    generations: Generations,
    workers: Workers,
}

pub(super) type Application = Arc<dyn Fn() -> Vec<Frame> + Send + Sync>;

/// For the task of a process that takes over.
#[derive(Debug)]
pub(super) enum Command {
    PutDown(Bytes),
    Drained,
    Withdraw,
}

/// For the task of the predecessor.
#[derive(Debug)]
pub(super) enum UpCommand {
    Release,
    HandBack { baton: Bytes, answer: oneshot::Sender<Result<(), Bytes>> },
}

/// Something that has listeners in an event loop.
pub(super) trait Gate: Send + Sync {
    /// Takes them out of it, unless this process serves.
    fn on_phase(&self, phase: Phase);
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &*self.status.borrow();
        f.debug_struct("Shared")
            .field("path", &self.path)
            .field("status", status)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Returns the state of a process that serves. `has_predecessor` is true if the control socket
    /// and the baton are still to come.
    pub(super) fn new(
        options: Options,
        path: PathBuf,
        generation: u32,
        listeners: Listeners,
        control: Option<Control>,
        has_predecessor: bool,
    ) -> Self {
        let status = Status {
            phase: Phase::Serving,
            has_control: control.is_some(),
            has_predecessor,
            baton: if has_predecessor { Baton::Coming } else { Baton::Here(None) },
            is_claimed: false,
            successor: None,
            replaced_at: None,
            must_leave: false,
        };
        let state =
            State { listeners, control, lanes: AllLanes::new(generation), ..State::default() };
        let status = watch::Sender::new(status);
        Self {
            options,
            path,
            generation,
            state: Mutex::new(state),
            status,
            connections: Connections::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn with_listeners<T>(&self, look: impl FnOnce(&Listeners) -> T) -> T {
        look(&self.lock().listeners)
    }

    pub(super) fn phase(&self) -> Phase {
        self.status.borrow().phase
    }

    /// Waits until the status satisfies a condition.
    pub(super) async fn wait(&self, is_it: impl FnMut(&Status) -> bool) -> Status {
        let mut status = self.status.subscribe();
        let found = status.wait_for(is_it).await.expect("this value has the sender");
        found.clone()
    }

    pub(super) fn add_gate(&self, gate: Weak<dyn Gate>) {
        let mut state = self.lock();
        state.gates.retain(|gate| gate.strong_count() > 0);
        state.gates.push(gate);
    }

    /// Adds a listener, unless another process is taking over: it would not get this one. Returns
    /// its index.
    pub(super) fn add_listener(&self, name: String, fd: OwnedFd) -> Result<u32, Error> {
        // Under the lock, so that no takeover begins between the check and the addition.
        let mut state = self.lock();
        if self.status.borrow().is_claimed || self.phase() != Phase::Serving {
            return Err(Error::Refused(Refusal::Busy));
        }
        state.listeners.add(name, fd)?;
        Ok(state.listeners.entries.last().map_or(0, |entry| entry.identity.index))
    }

    /// Changes the phase. Listeners leave their event loops when this process stops to serve.
    pub(super) fn set_phase(&self, phase: Phase) {
        self.status.send_modify(|status| {
            status.phase = phase;
            match phase {
                // Undone: the clock of the drain starts anew at the next takeover.
                Phase::Serving => (status.replaced_at, status.successor) = (None, None),
                _ => status.replaced_at = status.replaced_at.or(Some(Instant::now())),
            }
        });
        // Without the lock: closing a listener runs code of its event loop.
        let gates = self.lock().gates.clone();
        gates.iter().filter_map(Weak::upgrade).for_each(|gate| gate.on_phase(phase));
        info!(path = %self.path.display(), ?phase, "takeover: the server changed its phase");
    }

    /// Begins a takeover, unless there is one. One at a time.
    pub(super) fn claim(&self, link: UnboundedSender<Command>) -> bool {
        // Under the lock, so that no listener is added after the takeover has begun.
        let mut state = self.lock();
        let has_control = state.control.is_some();
        let claimed = self.status.send_if_modified(|status| {
            let may_claim = !status.is_claimed && status.phase == Phase::Serving && has_control;
            status.is_claimed |= may_claim;
            may_claim
        });
        if claimed {
            state.link = Some(link);
        }
        claimed
    }

    /// Notes that the takeover has ended, and this process serves.
    pub(super) fn unclaim(&self) {
        self.lock().link = None;
        self.status.send_modify(|status| status.is_claimed = false);
    }

    pub(super) fn command(&self, command: Command) -> bool {
        self.lock().link.as_ref().is_some_and(|link| link.send(command).is_ok())
    }

    pub(super) fn set_predecessor(&self, predecessor: UnboundedSender<UpCommand>) {
        self.lock().predecessor = Some(predecessor);
    }

    pub(super) fn command_predecessor(&self, command: UpCommand) -> bool {
        self.lock().predecessor.as_ref().is_some_and(|up| up.send(command).is_ok())
    }

    pub(super) fn set_application(&self, application: Application) {
        self.lock().application = Some(application);
    }

    /// Asks the application for its state.
    pub(super) fn application_state(&self) -> Vec<Frame> {
        // The closure is foreign code, which may call back: it runs without the lock.
        let application = self.lock().application.clone();
        application.map_or_else(Vec::new, |application| application())
    }

    pub(super) fn with_generations<T>(&self, look: impl FnOnce(&mut Generations) -> T) -> T {
        look(&mut self.lock().generations)
    }

    pub(super) fn with_workers<T>(&self, look: impl FnOnce(&mut Workers) -> T) -> T {
        look(&mut self.lock().workers)
    }

    /// Returns the listeners as they are sent. No copies are made: they stay this process's.
    pub(super) fn offered(&self) -> Vec<Offered<SendFd>> {
        let state = self.lock();
        let offered = state.listeners.entries.iter().map(|entry| Offered {
            identity: entry.identity.clone(),
            cookie: entry.cookie,
            path_id: entry.guard.as_ref().and_then(PathGuard::path_id),
            fd: SendFd::assume_socket(Arc::clone(&entry.fd)),
        });
        offered.collect()
    }

    /// Returns the lanes of a UDP socket.
    pub(super) fn lanes(&self, name: &str, index: u32) -> Arc<Lanes> {
        self.lock().lanes.of(name, index)
    }

    /// Returns messages that give a new process its generation, and its lanes.
    pub(super) fn offer_lanes(&self) -> io::Result<Vec<ToTaker<SendFd>>> {
        let State { lanes, listeners, .. } = &mut *self.lock();
        lanes.offer(listeners)
    }

    /// Copies everything that a new process gets once it is ready. It is done before, because
    /// nothing may fail after READY.
    pub(super) fn handover(&self) -> io::Result<Handover> {
        let mut state = self.lock();
        let State { listeners, control, .. } = &mut *state;
        let control = control.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let guards = (0..).zip(&mut listeners.entries).filter_map(|(number, entry)| {
            // The same listeners as in `offered`, in the same order.
            let guard = entry.guard.as_mut().filter(|guard| guard.path_id().is_some())?;
            Some(guard.share_lock().map(|lock| (number, lock)))
        });
        Ok(Handover {
            control: control.fd.try_clone()?,
            control_lock: control.guard.share_lock()?,
            locks: guards.collect::<io::Result<_>>()?,
        })
    }

    pub(super) fn control_copy(&self) -> io::Result<OwnedFd> {
        let state = self.lock();
        let control = state.control.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        control.fd.as_fd().try_clone_to_owned()
    }

    pub(super) fn set_control(&self, control: Control) {
        self.lock().control = Some(control);
    }

    /// Gives up the right to remove paths, or takes it back. Paths that the new process has no use
    /// for stay this process's.
    pub(super) fn set_may_remove(&self, may_remove: bool) {
        let mut state = self.lock();
        let State { listeners, control, declined, .. } = &mut *state;
        let entries =
            (0..).zip(&mut listeners.entries).filter(|(number, _)| !declined.contains(number));
        let guards = entries.filter_map(|(_, entry)| entry.guard.as_mut());
        let control = control.iter_mut().map(|control| &mut control.guard);
        guards.chain(control).for_each(|guard| guard.set_may_remove(may_remove));
    }

    /// Guards the paths of listeners whose locks have come. Each lock belongs to the next listener
    /// with a path.
    pub(super) fn receive_locks(&self, locks: Vec<OwnedFd>, path_ids: &[Option<(u64, u64)>]) {
        let mut locks = locks.into_iter();
        self.guard_paths(path_ids, |path, path_id| match locks.next() {
            Some(lock) => PathGuard::received(path.to_owned(), lock, path_id),
            None => Err(io::ErrorKind::NotFound.into()),
        });
    }

    /// Guards the paths of listeners whose last owner has died.
    pub(super) fn inherit_paths(&self, path_ids: &[Option<(u64, u64)>]) {
        self.guard_paths(path_ids, PathGuard::inherited);
    }

    fn guard_paths(
        &self,
        path_ids: &[Option<(u64, u64)>],
        mut guard: impl FnMut(&Path, (u64, u64)) -> io::Result<PathGuard>,
    ) {
        let mut state = self.lock();
        for (entry, path_id) in state.listeners.entries.iter_mut().zip(path_ids) {
            let (Address::Path(path), Some(path_id)) = (&entry.identity.address, *path_id) else {
                continue;
            };
            match guard(path, path_id) {
                Ok(guard) => entry.guard = Some(guard),
                Err(error) => {
                    let path = path.display();
                    warn!(%path, %error, "takeover: the path will not be removed at the end");
                }
            }
        }
    }

    /// Notes the listeners that the new process has no use for.
    pub(super) fn set_declined(&self, numbers: BTreeSet<u32>) {
        self.lock().declined = numbers;
    }

    pub(super) fn declined(&self) -> Vec<Identity> {
        let state = self.lock();
        let entry = |&number: &u32| state.listeners.entries.get(number as usize);
        state.declined.iter().filter_map(entry).map(|entry| entry.identity.clone()).collect()
    }

    /// Closes everything. Paths are removed, unless another process has the right to.
    pub(super) fn give_up(&self) {
        self.set_phase(Phase::Replaced);
        let given_up = {
            let mut state = self.lock();
            let generations = std::mem::take(&mut state.generations);
            (std::mem::take(&mut state.listeners), state.control.take(), generations)
        };
        drop(given_up); // without the lock: closing takes system calls
    }

    /// Makes sure that no predecessor serves again.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if it does not answer.
    pub(super) async fn release_predecessor(&self) -> Result<(), Error> {
        if self.status.borrow().has_predecessor {
            self.command_predecessor(UpCommand::Release);
            let released = self.wait(|status| !status.has_predecessor);
            tokio::time::timeout(self.options.answer_timeout, released)
                .await
                .map_err(|_| Error::TimedOut)?;
        }
        Ok(())
    }
}
