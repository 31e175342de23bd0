//! A process that a dispatcher has started: this one, or one before it.

use std::{
    future::{Future, poll_fn},
    io,
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    process::ExitStatus,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    process,
};
use tracing::warn;

use super::pidfd::has_ended;
use crate::sys;

/// A process that was started to be a worker.
#[derive(Debug)]
pub(super) enum Started {
    /// A process that this process has started.
    Child(Child),
    /// A process that was started by a dispatcher that this one has replaced. It is no child, so
    /// wait(2) does not work. A pidfd shows its end, but not its exit status.
    Elsewhere(Arc<AsyncFd<OwnedFd>>),
}

/// A child of this process. Dropping it kills it if the command says so, unless it was
/// [released](Started::release).
#[derive(Debug)]
pub(super) struct Child {
    /// `None` only while this is dropped.
    child: Option<Box<process::Child>>,
    /// Passed to a dispatcher that goes on with the process.
    pidfd: Option<Arc<OwnedFd>>,
    is_released: bool,
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.is_released {
            // Dropping the child might kill it. The leaked memory is freed when this process ends,
            // which is about to happen.
            std::mem::forget(self.child.take());
        }
    }
}

const PRESENT: &str = "only dropping takes it out";

impl Started {
    pub(super) fn child(child: process::Child) -> Self {
        let pidfd = child.id().and_then(|pid| sys::pidfd_open(pid).ok()).map(Arc::new);
        Self::Child(Child { child: Some(Box::new(child)), pidfd, is_released: false })
    }

    /// # Errors
    /// The errors of registering with the event loop.
    pub(super) fn elsewhere(pidfd: OwnedFd) -> io::Result<Self> {
        Ok(Self::Elsewhere(Arc::new(sys::register(pidfd, Interest::READABLE)?)))
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Child(Child { child, .. }) => child.as_ref().expect(PRESENT).id(),
            Self::Elsewhere(_) => None,
        }
    }

    /// Returns its pidfd, if there is one.
    pub(super) fn pidfd(&self) -> Option<Arc<dyn AsFd + Send + Sync>> {
        match self {
            Self::Child(Child { pidfd, .. }) => Some(Arc::<OwnedFd>::clone(pidfd.as_ref()?)),
            Self::Elsewhere(pidfd) => Some(Arc::<AsyncFd<_>>::clone(pidfd)),
        }
    }

    /// Is ready when the process has ended, with its exit status if that is known.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Option<ExitStatus>> {
        match self {
            Self::Child(Child { child, .. }) => {
                pin!(child.as_mut().expect(PRESENT).wait()).poll(cx).map(Result::ok)
            }
            Self::Elsewhere(pidfd) => pidfd.poll_read_ready(cx).map(|_| None),
        }
    }

    pub(super) async fn ended(&mut self) -> Option<ExitStatus> {
        poll_fn(|cx| self.poll_ended(cx)).await
    }

    /// Returns true if the process has ended, and its exit status if that is known.
    pub(super) fn has_ended(&mut self) -> (bool, Option<ExitStatus>) {
        match self {
            Self::Child(Child { child, .. }) => {
                let status = child.as_mut().expect(PRESENT).try_wait().ok().flatten();
                (status.is_some(), status)
            }
            Self::Elsewhere(pidfd) => (has_ended(pidfd.get_ref()), None),
        }
    }

    pub(super) fn kill(&mut self) {
        let outcome = match self {
            Self::Child(Child { child, .. }) => child.as_mut().expect(PRESENT).start_kill(),
            Self::Elsewhere(pidfd) => sys::kill(pidfd.get_ref().as_fd()).map_err(io::Error::from),
        };
        if let Err(error) = outcome {
            warn!(pid = self.pid(), %error, "a worker's process cannot be killed; it goes on");
        }
    }

    /// Leaves the process to another dispatcher: nothing in this process ends it from now on.
    pub(super) fn release(&mut self) {
        self.set_released(true);
    }

    /// Makes the process this dispatcher's again.
    pub(super) fn take_back(&mut self) {
        self.set_released(false);
    }

    fn set_released(&mut self, is_released: bool) {
        if let Self::Child(child) = self {
            child.is_released = is_released;
        }
    }
}
