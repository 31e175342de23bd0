//! The state that is shared by the tasks and the handles of a server.

mod paths;
mod status;

use std::{
    collections::BTreeSet,
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc::UnboundedSender, oneshot, watch},
    time::Instant,
};
use tracing::info;

use super::{
    Error, Options, Phase,
    connections::Connections,
    control::{Control, Handover},
    generations::Generations,
    lanes::{AllLanes, Lanes},
    listeners::Listeners,
    protocol::{Identity, Offered, Refusal, ToTaker},
    workers::Workers,
};
use crate::{Frame, SendFd, socket::PathGuard};
pub(super) use status::{Baton, Status};

/// The state of one server.
pub(super) struct Shared {
    pub(super) options: Options,
    /// The absolute path of the control socket.
    pub(super) path: PathBuf,
    /// The number of this process among all that have requested a takeover.
    pub(super) generation: u32,
    state: Mutex<State>,
    /// The part of the state that can be waited for. It may be changed while `state` is locked, but
    /// `state` must not be locked while it is borrowed.
    pub(super) status: watch::Sender<Status>,
    pub(super) connections: Connections,
}

/// The part of the state that is under the lock.
#[derive(Default)]
struct State {
    listeners: Listeners,
    /// `None` until the predecessor has passed it on, and after this process was replaced for good.
    control: Option<Control>,
    /// Numbers of listeners that the new process does not use.
    declined: BTreeSet<u32>,
    /// The holders of registered listeners, which a change of phase reaches.
    gates: Vec<Weak<dyn Gate>>,
    lanes: AllLanes,
    /// The way to the task that gives the listeners to a new process. `Some` while `is_claimed`.
    giver: Option<UnboundedSender<Command>>,
    /// The way to the task of the predecessor.
    predecessor: Option<UnboundedSender<PredecessorCommand>>,
    /// Called for each takeover.
    state_source: Option<StateSource>,
    /// The processes that were replaced before this one and still run.
    generations: Generations,
    workers: Workers,
}

/// The application's function that returns the state to send along.
pub(super) type StateSource = Arc<dyn Fn() -> Vec<Frame> + Send + Sync>;

/// A call of the application for the task that gives the listeners to a new process.
#[derive(Debug)]
pub(super) enum Command {
    /// Pass the baton on.
    PutDown(Bytes),
    /// Make the takeover final: the connections have ended.
    Drained,
    /// Call the takeover off.
    Withdraw,
}

/// A call for the task of the predecessor.
#[derive(Debug)]
pub(super) enum PredecessorCommand {
    /// Make sure that the predecessor can't serve again.
    Release,
    /// Hand the listeners back. The answer is the baton if the predecessor does not take them.
    HandBack { baton: Bytes, answer: oneshot::Sender<Result<(), Bytes>> },
}

/// A holder of a listener that is registered with an event loop.
pub(super) trait Gate: Send + Sync {
    /// Handles a change of phase. Unless this process serves, the listener leaves the event loop.
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
            baton: if has_predecessor { Baton::Awaited } else { Baton::Held(None) },
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

    /// Adds a listener, and returns its index. That is refused while another process is taking
    /// over, because the listener would be missing there.
    pub(super) fn add_listener(&self, name: String, fd: OwnedFd) -> Result<u32, Error> {
        // The lock prevents that a takeover begins between the check and the addition.
        let mut state = self.lock();
        if self.status.borrow().is_claimed || self.phase() != Phase::Serving {
            return Err(Error::Refused(Refusal::Busy));
        }
        state.listeners.add(name, fd)?;
        Ok(state.listeners.entries.last().map_or(0, |entry| entry.identity.index))
    }

    /// Changes the phase. Listeners leave their event loops if this process no longer serves.
    pub(super) fn set_phase(&self, phase: Phase) {
        self.status.send_modify(|status| {
            status.phase = phase;
            match phase {
                // The takeover was undone: the next one starts a new drain.
                Phase::Serving => (status.replaced_at, status.successor) = (None, None),
                // The drain begins with the first of the two other phases.
                _ => status.replaced_at = status.replaced_at.or(Some(Instant::now())),
            }
        });
        // The lock is not held, because closing a listener runs code of its event loop.
        let gates = self.lock().gates.clone();
        gates.iter().filter_map(Weak::upgrade).for_each(|gate| gate.on_phase(phase));
        info!(path = %self.path.display(), %phase, "takeover: this server has a new phase");
    }

    /// Begins a takeover. Returns false if another one is under way, or this process does not serve
    /// or has no control socket yet.
    pub(super) fn claim(&self, giver: UnboundedSender<Command>) -> bool {
        // The lock prevents that a listener is added after the takeover has begun.
        let mut state = self.lock();
        let has_control = state.control.is_some();
        let claimed = self.status.send_if_modified(|status| {
            let may_claim = !status.is_claimed && status.phase == Phase::Serving && has_control;
            status.is_claimed |= may_claim;
            may_claim
        });
        if claimed {
            state.giver = Some(giver);
        }
        claimed
    }

    /// Ends a takeover that has failed or was undone: this process serves.
    pub(super) fn unclaim(&self) {
        self.lock().giver = None;
        self.status.send_modify(|status| status.is_claimed = false);
    }

    /// Passes a call on to the task of the current takeover. Returns false if there is none.
    pub(super) fn command(&self, command: Command) -> bool {
        self.lock().giver.as_ref().is_some_and(|giver| giver.send(command).is_ok())
    }

    pub(super) fn set_predecessor(&self, predecessor: UnboundedSender<PredecessorCommand>) {
        self.lock().predecessor = Some(predecessor);
    }

    /// Passes a call on to the task of the predecessor. Returns false if there is none.
    pub(super) fn command_predecessor(&self, command: PredecessorCommand) -> bool {
        self.lock().predecessor.as_ref().is_some_and(|up| up.send(command).is_ok())
    }

    pub(super) fn set_state_source(&self, source: StateSource) {
        self.lock().state_source = Some(source);
    }

    /// Returns the state that the application sends along.
    pub(super) fn application_state(&self) -> Vec<Frame> {
        // The closure is foreign code, which may call this server. So the lock is not held.
        let source = self.lock().state_source.clone();
        source.map_or_else(Vec::new, |source| source())
    }

    pub(super) fn with_generations<T>(&self, look: impl FnOnce(&mut Generations) -> T) -> T {
        look(&mut self.lock().generations)
    }

    pub(super) fn with_workers<T>(&self, look: impl FnOnce(&mut Workers) -> T) -> T {
        look(&mut self.lock().workers)
    }

    /// Returns the listeners as they are sent. They share this process's descriptors, so this makes
    /// no copies and can't fail.
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

    /// Returns the messages that contain the generation of a new process, and its lanes.
    pub(super) fn offer_lanes(&self) -> io::Result<Vec<ToTaker<SendFd>>> {
        let State { lanes, listeners, .. } = &mut *self.lock();
        lanes.offer(listeners)
    }

    /// Copies everything that a new process gets once it is ready. The copies are made before
    /// READY, because nothing may fail after it.
    pub(super) fn handover(&self) -> io::Result<Handover> {
        let mut state = self.lock();
        let State { listeners, control, .. } = &mut *state;
        let control = control.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let guards = (0..).zip(&mut listeners.entries).filter_map(|(number, entry)| {
            // These are the listeners for which `offered` returns a path id, in the same order.
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

    /// Sets the listeners that the new process does not use.
    pub(super) fn set_declined(&self, numbers: BTreeSet<u32>) {
        self.lock().declined = numbers;
    }

    pub(super) fn declined(&self) -> Vec<Identity> {
        let state = self.lock();
        let entry = |&number: &u32| state.listeners.entries.get(number as usize);
        state.declined.iter().filter_map(entry).map(|entry| entry.identity.clone()).collect()
    }

    /// Closes everything: this process can't serve again. Paths are removed, unless another process
    /// has the right to do so.
    pub(super) fn give_up(&self) {
        self.set_phase(Phase::Replaced);
        let given_up = {
            let mut state = self.lock();
            let generations = std::mem::take(&mut state.generations);
            (std::mem::take(&mut state.listeners), state.control.take(), generations)
        };
        drop(given_up); // after the lock is released, because closing takes system calls
    }

    /// Makes sure that no predecessor can serve again.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if the predecessor does not answer.
    pub(super) async fn release_predecessor(&self) -> Result<(), Error> {
        if self.status.borrow().has_predecessor {
            self.command_predecessor(PredecessorCommand::Release);
            let released = self.wait(|status| !status.has_predecessor);
            tokio::time::timeout(self.options.answer_timeout, released)
                .await
                .map_err(|_| Error::TimedOut)?;
        }
        Ok(())
    }
}
