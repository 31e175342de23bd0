//! The right to remove the paths of Unix listeners and of the control socket. One process has it.

use std::{io, os::fd::OwnedFd, path::Path};

use tracing::warn;

use super::{Shared, State};
use crate::{socket::PathGuard, takeover::protocol::Address};

impl Shared {
    /// Gives up the right to remove paths, or takes it back. The paths of declined listeners are
    /// left out, because this process remains their owner.
    pub(in crate::takeover) fn set_may_remove(&self, may_remove: bool) {
        let mut state = self.lock();
        let State { listeners, control, declined, .. } = &mut *state;
        let entries =
            (0..).zip(&mut listeners.entries).filter(|(number, _)| !declined.contains(number));
        let guards = entries.filter_map(|(_, entry)| entry.guard.as_mut());
        let control = control.iter_mut().map(|control| &mut control.guard);
        guards.chain(control).for_each(|guard| guard.set_may_remove(may_remove));
    }

    /// Takes the paths of listeners, with the locks that the predecessor has sent: one for each
    /// listener with a path id, in their order.
    pub(in crate::takeover) fn receive_locks(
        &self,
        locks: Vec<OwnedFd>,
        path_ids: &[Option<(u64, u64)>],
    ) {
        let mut locks = locks.into_iter();
        self.guard_paths(path_ids, |path, path_id| match locks.next() {
            Some(lock) => PathGuard::received(path.to_owned(), lock, path_id),
            None => Err(io::ErrorKind::NotFound.into()),
        });
    }

    /// Takes the paths of listeners from a predecessor that has died.
    pub(in crate::takeover) fn inherit_paths(&self, path_ids: &[Option<(u64, u64)>]) {
        self.guard_paths(path_ids, PathGuard::inherited);
    }

    /// Takes the path of each listener with a path id, by a call of `guard`.
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
}
