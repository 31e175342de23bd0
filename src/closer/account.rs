use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::task::AtomicWaker;

/// The descriptors of one connection that wait to be closed.
#[derive(Debug, Default)]
pub(crate) struct Account {
    closing: AtomicUsize,
    receiver: AtomicWaker,
}

impl Account {
    /// Waits until at most `limit` descriptors of the connection wait to be closed. One task waits at a time.
    pub(crate) fn poll_below(&self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        if self.closing.load(Ordering::Acquire) <= limit {
            return Poll::Ready(());
        }
        self.receiver.register(cx.waker());
        match self.closing.load(Ordering::Acquire) <= limit {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    pub(super) fn add(&self, fds: usize) {
        self.closing.fetch_add(fds, Ordering::AcqRel);
    }
}

/// One descriptor of an account, until it is closed.
#[derive(Debug)]
pub(super) struct Charge(Arc<Account>);

impl Charge {
    /// Takes over one of the descriptors that were [added](Account::add).
    pub(super) fn new(account: Arc<Account>) -> Self {
        Self(account)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.0.closing.fetch_sub(1, Ordering::AcqRel);
        self.0.receiver.wake();
    }
}
