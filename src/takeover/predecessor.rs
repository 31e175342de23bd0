//! The task for the server that this process has replaced. It runs until that server can't serve
//! again.

use std::{future::Future, io, os::fd::OwnedFd, sync::Arc};

use bytes::Bytes;
use tokio::sync::{
    mpsc::{UnboundedReceiver, unbounded_channel},
    oneshot,
};
use tracing::{info, warn};

use super::{
    Phase,
    control::Control,
    link::{Event, TakerLink, now},
    protocol::ToTaker,
    shared::{Baton, PredecessorCommand, Shared},
    steps::TakerStep,
    workers::Workers,
};
use crate::{Fds, socket::PathGuard, sys::is_exhausted};

/// Returns the future of the task. `path_ids` are those of [`Predecessor`].
pub(super) fn watch(
    shared: Arc<Shared>,
    link: TakerLink,
    path_ids: Vec<Option<(u64, u64)>>,
) -> impl Future<Output = ()> + Send + use<> {
    let (to_task, commands) = unbounded_channel();
    shared.set_predecessor(to_task);
    let predecessor = Predecessor {
        shared,
        link,
        path_ids,
        locks: Vec::new(),
        handover: None,
        inherited: None,
        hand_back: None,
    };
    predecessor.run(commands)
}

/// The connection to the predecessor, and what it has passed on so far.
struct Predecessor {
    shared: Arc<Shared>,
    link: TakerLink,
    /// For each listener, device and inode of the path that may be removed at its end.
    path_ids: Vec<Option<(u64, u64)>>,
    /// Locks of paths that were received, until COMMIT.
    locks: Vec<OwnedFd>,
    /// The control socket and its lock, from COMMIT.
    handover: Option<Fds>,
    /// Set if the predecessor has ended without COMMIT: the control socket that this process has
    /// bound in its place, or the reason why it could not.
    inherited: Option<io::Result<Control>>,
    /// The caller who waits for the answer to a HAND_BACK.
    hand_back: Option<oneshot::Sender<Result<(), Bytes>>>,
}

impl Predecessor {
    /// Runs until the predecessor can't serve again, or this process has handed everything back.
    async fn run(mut self, mut commands: UnboundedReceiver<PredecessorCommand>) {
        loop {
            while let Some(step) = self.link.next_step() {
                if !self.take_step(step) {
                    return;
                }
            }
            // RELEASE has to be written before this end is closed.
            if self.link.taker.is_over() && self.link.is_flushed() {
                break;
            }
            tokio::select! {
                biased;
                event = self.link.next_event() => match event {
                    Some(Event::Message(ToTaker::Locks { fds })) => self.locks.extend(fds),
                    Some(Event::Message(ToTaker::Commit { fds, .. })) => self.handover = Some(fds),
                    Some(Event::Error(error)) => {
                        warn!(%error, "takeover: the old server can't be understood; going on");
                    }
                    _ => {}
                },
                Some(command) = commands.recv() => self.on_command(command),
            }
        }
        info!("takeover: the replaced server can't serve again");
        // From here on, no other process can serve at these paths.
        self.shared.set_may_remove(true);
        self.shared.status.send_modify(|status| {
            status.has_predecessor = false;
            if status.baton == Baton::Awaited {
                status.baton = Baton::Held(None); // it ended before it could pass one on
            }
        });
    }

    /// Returns false if this process no longer serves.
    fn take_step(&mut self, step: TakerStep) -> bool {
        match step {
            TakerStep::TryLock => {
                self.inherited = self.inherit();
                self.link.taker.on_lock(now(), self.inherited.is_some());
            }
            TakerStep::Confirmed(baton) => {
                // With COMMIT, the control socket was received. Without it, this process has bound
                // the path again.
                let control = match self.handover.take() {
                    Some(fds) => self.received(fds),
                    None => self.inherited.take().unwrap_or(Err(io::ErrorKind::NotFound.into())),
                };
                self.confirm(control, baton);
            }
            TakerStep::NotHandedBack(baton) => {
                if let Some(answer) = self.hand_back.take() {
                    let _ = answer.send(Err(baton)); // the caller may have given up
                }
            }
            TakerStep::Stop => {
                // This process stops before anybody can observe that the predecessor serves.
                self.shared.give_up();
                self.shared.with_workers(Workers::give_back);
                if let Some(answer) = self.hand_back.take() {
                    let _ = answer.send(Ok(()));
                }
                return false;
            }
            TakerStep::Send(_) | TakerStep::Offered | TakerStep::Serve | TakerStep::Fail(_) => {}
        }
        true
    }

    /// Takes what came with COMMIT: the locks of paths, and the control socket. The predecessor may
    /// still serve again, so this process may not remove any path yet.
    fn received(&mut self, fds: Fds) -> io::Result<Control> {
        self.shared.receive_locks(std::mem::take(&mut self.locks), &self.path_ids);
        let [fd, lock] =
            fds.into_array().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // The inode of the path stays the same, because the listening socket itself has moved.
        let path_id = super::inspect::path_id_of(&self.shared.path)?;
        let guard = PathGuard::received(self.shared.path.clone(), lock, path_id)?;
        Ok(Control { fd, guard })
    }

    /// Takes the path of a predecessor that has ended without COMMIT. Returns `None` if the caller
    /// has to try again: the lock is not free yet, or this process has no descriptor left.
    fn inherit(&mut self) -> Option<io::Result<Control>> {
        let guard = PathGuard::take(&self.shared.path).ok()?;
        let control = Control::bind(guard, self.shared.options.mode);
        if control.as_ref().is_err_and(is_exhausted) {
            return None;
        }
        // A lock is taken as long as any copy of its descriptor is open, so close those that came.
        self.locks.clear();
        self.shared.inherit_paths(&self.path_ids);
        Some(control)
    }

    /// Makes everything of the predecessor this process's own.
    fn confirm(&self, control: io::Result<Control>, baton: Option<Bytes>) {
        let has_control = control.is_ok();
        match control {
            Ok(control) => self.shared.set_control(control),
            Err(error) => {
                let path = self.shared.path.display();
                warn!(%path, %error, "takeover: no other process can take over from this one");
            }
        }
        self.shared.set_may_remove(false);
        self.shared.status.send_modify(|status| {
            status.has_control = has_control;
            status.baton = Baton::Held(baton);
        });
    }

    fn on_command(&mut self, command: PredecessorCommand) {
        match command {
            PredecessorCommand::Release => self.link.taker.release(),
            PredecessorCommand::HandBack { baton, answer } => {
                if self.shared.phase() == Phase::Serving && self.link.taker.hand_back(baton.clone())
                {
                    self.hand_back = Some(answer);
                } else {
                    let _ = answer.send(Err(baton)); // the caller may have given up
                }
            }
        }
    }
}
