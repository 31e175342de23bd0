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
    /// Number of descriptors at which `receiver` goes on.
    limit: AtomicUsize,
    receiver: AtomicWaker,
}

impl Account {
    /// Waits until at most `limit` descriptors of the connection wait to be closed. One task waits at a time.
    pub(crate) fn poll_below(&self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        if self.closing.load(Ordering::Acquire) <= limit {
            return Poll::Ready(());
        }
        self.limit.store(limit, Ordering::SeqCst);
        self.receiver.register(cx.waker());
        match self.closing.load(Ordering::SeqCst) <= limit {
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
        // The receiver sets the limit before it reads the number, and here it is the other way
        // round. So in the one order of all of these, one of the two sees what the other has done.
        let closing = self.0.closing.fetch_sub(1, Ordering::SeqCst) - 1;
        // A wake-up for each descriptor would take the runtime longer than the closing takes.
        if closing <= self.0.limit.load(Ordering::SeqCst) {
            self.0.receiver.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_receiver_is_woken_once_and_only_when_it_can_go_on() {
        let account = Arc::new(Account::default());
        let wakes = Arc::new(Wakes::default());
        let waker = Arc::clone(&wakes).into();
        let mut cx = Context::from_waker(&waker);
        account.add(10);
        let charges = (0..10).map(|_| Charge::new(Arc::clone(&account)));
        assert!(account.poll_below(&mut cx, 3).is_pending());
        for (closed, charge) in charges.enumerate() {
            drop(charge);
            let is_below = closed + 1 >= 7;
            assert_eq!(wakes.0.load(Ordering::Relaxed), usize::from(is_below), "{closed} closed");
        }
        assert!(account.poll_below(&mut cx, 3).is_ready());
    }
}
