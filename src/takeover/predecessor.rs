//! The task of the server that this process has replaced, until that one can't serve again.

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
    shared::{Baton, Shared, UpCommand},
    taker::TakerStep,
    workers::Workers,
};
use crate::{Fds, socket::PathGuard, sys::is_exhausted};

/// Returns the task that watches a predecessor.
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

struct Predecessor {
    shared: Arc<Shared>,
    link: TakerLink,
    path_ids: Vec<Option<(u64, u64)>>,
    /// Locks of paths that have come.
    locks: Vec<OwnedFd>,
    /// The control socket and its lock, from COMMIT.
    handover: Option<Fds>,
    /// The control socket, bound again, or the reason why that failed, if the predecessor has gone
    /// without COMMIT.
    inherited: Option<io::Result<Control>>,
    /// Waits for the answer to a HAND_BACK.
    hand_back: Option<oneshot::Sender<Result<(), Bytes>>>,
}

impl Predecessor {
    async fn run(mut self, mut commands: UnboundedReceiver<UpCommand>) {
        loop {
            while let Some(step) = self.link.next_step() {
                if !self.take_step(step) {
                    return;
                }
            }
            // RELEASE has to be on its way before this end is closed.
            if self.link.taker.is_over() && self.link.is_flushed() {
                break;
            }
            tokio::select! {
                biased;
                event = self.link.next_event() => match event {
                    Some(Event::Message(ToTaker::Locks { fds })) => self.locks.extend(fds),
                    Some(Event::Message(ToTaker::Commit { fds, .. })) => self.handover = Some(fds),
                    Some(Event::Error(error)) => {
                        warn!(%error, "nothing more can be read from the old server; going on");
                    }
                    _ => {}
                },
                Some(command) = commands.recv() => self.on_command(command),
            }
        }
        info!("takeover: the replaced server can't serve again");
        // From here on only this process may serve at these paths.
        self.shared.set_may_remove(true);
        self.shared.status.send_modify(|status| {
            status.has_predecessor = false;
            if status.baton == Baton::Coming {
                status.baton = Baton::Here(None); // it has passed nothing on
            }
        });
    }

    /// Returns false if this process does not serve any longer.
    fn take_step(&mut self, step: TakerStep) -> bool {
        match step {
            TakerStep::TryLock => {
                self.inherited = self.inherit();
                self.link.taker.on_lock(now(), self.inherited.is_some());
            }
            TakerStep::Confirmed(baton) => {
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
                self.shared.give_up(); // before anybody is told
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

    /// The predecessor has passed everything on. It may still serve again, so nothing may be
    /// removed.
    fn received(&mut self, fds: Fds) -> io::Result<Control> {
        self.shared.receive_locks(std::mem::take(&mut self.locks), &self.path_ids);
        let [fd, lock] =
            fds.into_array().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // The same inode as before: the socket that listens there has moved along.
        let path_id = super::inspect::path_id_of(&self.shared.path)?;
        let guard = PathGuard::received(self.shared.path.clone(), lock, path_id)?;
        Ok(Control { fd, guard })
    }

    /// Takes the path of a predecessor that has gone without COMMIT. Returns `None` if that has to
    /// be tried again: its lock is not free yet, or this process has no descriptor left.
    fn inherit(&mut self) -> Option<io::Result<Control>> {
        let guard = PathGuard::take(&self.shared.path).ok()?;
        let control = Control::bind(guard, self.shared.options.mode);
        if control.as_ref().is_err_and(is_exhausted) {
            return None;
        }
        self.locks.clear(); // a copy that was received would keep them taken
        self.shared.inherit_paths(&self.path_ids);
        Some(control)
    }

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
            status.baton = Baton::Here(baton);
        });
    }

    fn on_command(&mut self, command: UpCommand) {
        match command {
            UpCommand::Release => self.link.taker.release(),
            UpCommand::HandBack { baton, answer } => {
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
