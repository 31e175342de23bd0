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
    link::{Came, Link, now},
    protocol::ToTaker,
    shared::{Baton, Control, Shared, UpCommand},
    taker::TakerStep,
    workers::Workers,
};
use crate::{Fds, socket::PathGuard};

/// Returns the task that watches a predecessor.
pub(super) fn watch(
    shared: Arc<Shared>,
    link: Link,
    path_ids: Vec<Option<(u64, u64)>>,
) -> impl Future<Output = ()> + Send + use<> {
    let (to_task, commands) = unbounded_channel();
    shared.set_predecessor(to_task);
    let predecessor = Predecessor {
        shared,
        link,
        path_ids,
        locks: Vec::new(),
        gift: None,
        lock: None,
        hand_back: None,
    };
    predecessor.run(commands)
}

struct Predecessor {
    shared: Arc<Shared>,
    link: Link,
    path_ids: Vec<Option<(u64, u64)>>,
    /// Locks of paths that have come.
    locks: Vec<OwnedFd>,
    /// The control socket and its lock, from YOURS.
    gift: Option<Fds>,
    /// The lock of the path, if the predecessor has died.
    lock: Option<PathGuard>,
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
            if self.link.taker.is_over() && self.link.is_flushed() {
                break;
            }
            tokio::select! {
                biased;
                came = self.link.turn() => match came {
                    Some(Came::Message(ToTaker::Locks { fds })) => self.locks.extend(fds),
                    Some(Came::Message(ToTaker::Yours { fds, .. })) => self.gift = Some(fds),
                    Some(Came::Error(error)) => {
                        warn!(%error, "the replaced server does not follow the protocol; going on without it");
                    }
                    _ => {}
                },
                Some(command) = commands.recv() => self.on_command(command),
            }
        }
        info!("takeover: the replaced server can't serve again");
        self.shared.set_may_remove(true);
        self.shared.status.send_modify(|status| {
            status.has_predecessor = false;
            if status.baton == Baton::Coming {
                status.baton = Baton::Here(None); // it broke the protocol and has passed nothing on
            }
        });
    }

    /// Returns false if this process does not serve any longer.
    fn take_step(&mut self, step: TakerStep) -> bool {
        match step {
            TakerStep::TryLock => {
                let lock = PathGuard::take(&self.shared.path);
                let is_ours = lock.is_ok();
                self.lock = lock.ok();
                self.link.taker.on_lock(now(), is_ours);
            }
            TakerStep::Confirmed(baton) => {
                let control = match self.gift.take() {
                    Some(fds) => self.received(fds),
                    None => self.inherited(),
                };
                self.confirm(control, baton);
            }
            TakerStep::NotHandedBack(baton) => {
                if let Some(answer) = self.hand_back.take() {
                    let _ = answer.send(Err(baton)); // nobody may wait any longer
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
        let path_id = super::inspect::path_id_of(&self.shared.path)?;
        let guard = PathGuard::received(self.shared.path.clone(), lock, path_id)?;
        Ok(Control { fd, guard })
    }

    /// The predecessor has died, and its lock is here.
    fn inherited(&mut self) -> io::Result<Control> {
        self.shared.inherit_paths(&self.path_ids);
        let guard = self.lock.take().ok_or(io::ErrorKind::NotFound)?;
        Control::bind(guard, self.shared.options.mode)
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
                    let _ = answer.send(Err(baton)); // nobody may wait any longer
                }
            }
        }
    }
}
