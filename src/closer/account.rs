//! Counts of descriptors that wait to be closed.

use std::{
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// A count of descriptors that wait to be closed: those of a connection, of all connections of a
/// uid, or of all peers that a listener refuses.
#[derive(Debug, Default)]
pub(crate) struct Account {
    /// The number of descriptors that wait.
    closing: AtomicUsize,
    waiters: Mutex<Vec<Waiter>>,
    /// An account for which the same descriptors count too.
    parent: Option<Arc<Account>>,
}

/// A task that waits until at most `limit` descriptors wait to be closed.
#[derive(Debug)]
struct Waiter {
    limit: usize,
    waker: Waker,
}

impl Account {
    /// Returns an account whose descriptors also count for `parent`.
    pub(crate) fn with_parent(parent: Arc<Account>) -> Self {
        Self { parent: Some(parent), ..Self::default() }
    }

    /// Returns the number of descriptors that wait to be closed.
    pub(crate) fn closing(&self) -> usize {
        self.closing.load(Ordering::Relaxed)
    }

    /// Waits until at most `limit` descriptors wait to be closed. Any number of tasks may wait.
    pub(crate) fn poll_at_most(&self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        if self.closing() <= limit {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone(); // cloning is foreign code, so it runs without the lock
        let mut waiters = self.lock();
        if !waiters.iter().any(|other| other.limit == limit && other.waker.will_wake(&waker)) {
            waiters.push(Waiter { limit, waker });
        }
        // Check the number once more. `remove` first subtracts and then locks. So if it did not
        // find this waiter, its new number is found here.
        if self.closing() <= limit { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Counts descriptors that wait from now on. A [`Charge`] for each of them undoes that.
    pub(super) fn add(&self, fds: usize) {
        self.closing.fetch_add(fds, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.add(fds);
        }
    }

    /// Counts one descriptor less, because it is closed, and wakes the tasks that waited for that.
    fn remove(&self) {
        let left = self.closing.fetch_sub(1, Ordering::Relaxed) - 1;
        let ready: Vec<_> = self.lock().extract_if(.., |waiter| left <= waiter.limit).collect();
        for Waiter { waker, .. } in ready {
            // A waker is foreign code. Its panic must not end the closer's thread.
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
        if let Some(parent) = &self.parent {
            parent.remove();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiter>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A charge for one descriptor. When it is dropped, the descriptor no longer counts.
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
        self.0.remove();
    }
}

/// A descriptor that is going to be closed, with its charge. The fields are dropped in their order,
/// so the charge ends after the descriptor is closed.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) fd: OwnedFd,
    pub(super) charge: Option<Charge>,
}

impl Closing {
    pub(super) fn into_parts(self) -> (OwnedFd, Option<Charge>) {
        (self.fd, self.charge)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Wake};

    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn tasks_wait_until_few_enough_are_left_of_an_account_and_of_its_parent() {
        let parent = Arc::<Account>::default();
        let child = Arc::new(Account::with_parent(Arc::clone(&parent)));
        let wait = |account: &Arc<Account>, limit| {
            let account = Arc::clone(account);
            tokio::spawn(async move { poll_fn(|cx| account.poll_at_most(cx, limit)).await })
        };
        child.add(3);
        parent.add(1);
        let charges = [(); 3].map(|()| Charge::new(Arc::clone(&child)));
        let [early, late, of_parent] = [wait(&child, 2), wait(&child, 0), wait(&parent, 1)];
        yield_now().await;
        assert!(!early.is_finished());

        let [first, second, third] = charges;
        drop(first);
        early.await.unwrap();
        drop(second);
        yield_now().await;
        assert!(!late.is_finished() && !of_parent.is_finished());
        drop(third);
        late.await.unwrap();
        of_parent.await.unwrap();
        assert_eq!((child.closing(), parent.closing()), (0, 1));
    }

    #[test]
    fn a_waker_that_panics_does_not_keep_others_from_being_woken() {
        struct Panics;
        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("a foreign waker");
            }
        }
        struct Woken(AtomicUsize);
        impl Wake for Woken {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let parent = Arc::<Account>::default();
        let account = Arc::new(Account::with_parent(Arc::clone(&parent)));
        account.add(1);
        for waker in [Arc::new(Panics).into(), Arc::clone(&woken).into()] {
            assert!(account.poll_at_most(&mut Context::from_waker(&waker), 0).is_pending());
        }
        drop(Charge::new(account));
        assert_eq!((woken.0.load(Ordering::Relaxed), parent.closing()), (1, 0));
    }

    #[tokio::test]
    async fn a_task_that_is_polled_often_is_remembered_once() {
        let account = Account::default();
        account.add(1);
        poll_fn(|cx| {
            assert!((0..10).all(|_| account.poll_at_most(cx, 0).is_pending()));
            assert_eq!(account.lock().len(), 1);
            Poll::Ready(())
        })
        .await;
    }
}
