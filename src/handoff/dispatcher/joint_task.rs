//! One task for all futures that a connection passes through.
//!
//! The accept loop and the links of the workers wake each other for each connection. If they were
//! tasks of their own, a multi-thread runtime would spread them over its threads, and an accept
//! loop that is awaited in `main` would run on the thread of `block_on`. Waking another thread
//! takes more CPU than everything else that is done for a connection. So one task polls them all,
//! and a wake-up among them costs no more than a turn of a loop.

use std::{
    future::{Future, poll_fn},
    io,
    panic::{AssertUnwindSafe, resume_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU8,
            Ordering::{AcqRel, Acquire},
        },
    },
    task::{Context, Poll, Wake, Waker, ready},
    thread,
};

use futures::{
    FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered, task::AtomicWaker,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

/// Adds futures to a task of their own. The task ends with its runtime, or when this is dropped and
/// the futures have ended.
#[derive(Debug)]
pub(super) struct JointTask {
    added: mpsc::UnboundedSender<BoxFuture<'static, ()>>,
}

impl JointTask {
    pub(super) fn spawn(runtime: &Handle) -> Self {
        let (task, members) = Self::new();
        runtime.spawn(members);
        task
    }

    fn new() -> (Self, Members) {
        let (added, receiver) = mpsc::unbounded_channel();
        let wakeups = Arc::new(Wakeups::default());
        let waker = Waker::from(Arc::clone(&wakeups));
        (
            Self { added },
            Members { added: receiver, running: FuturesUnordered::new(), wakeups, waker },
        )
    }

    /// Runs a future in the task. If it panics, the others go on. If the runtime is gone, the
    /// future is dropped.
    pub(super) fn add(&self, future: impl Future<Output = ()> + Send + 'static) {
        let _ = self.added.send(AssertUnwindSafe(future).catch_unwind().map(drop).boxed());
    }

    /// Runs a future in the task until the returned `Remote` is dropped.
    pub(super) fn run<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Remote<T> {
        let (mut reply, outcome) = oneshot::channel();
        let future = Arc::new(Mutex::new(Some(future.boxed())));
        let remote = Remote { future: Arc::clone(&future), outcome };
        self.add(async move {
            let running = AssertUnwindSafe(poll_fn(|cx| {
                if reply.poll_closed(cx).is_ready() {
                    return Poll::Ready(None);
                }
                // `None` if the `Remote` is just being dropped.
                lock(&future)
                    .as_mut()
                    .map_or(Poll::Pending, |future| future.poll_unpin(cx).map(Some))
            }));
            let ended = running.catch_unwind().await.transpose();
            let _ = ended.map(|ended| reply.send(ended)); // fails if nobody waits for it
        });
        remote
    }
}

/// A future that runs in a [`JointTask`]. Dropping this drops the future at once, or after its poll
/// if it is being polled.
///
/// It yields an error if the task's runtime is gone, and panics if the future has panicked.
pub(super) struct Remote<T> {
    future: Arc<Mutex<Option<BoxFuture<'static, T>>>>,
    outcome: oneshot::Receiver<thread::Result<T>>,
}

impl<T> Future for Remote<T> {
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        Poll::Ready(match ready!(self.outcome.poll_unpin(cx)) {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => Err(io::Error::other("the runtime of the dispatcher has ended")),
        })
    }
}

impl<T> Drop for Remote<T> {
    fn drop(&mut self) {
        let future = lock(&self.future).take();
        drop(future); // runs foreign code, so nothing is locked
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task.
struct Members {
    added: mpsc::UnboundedReceiver<BoxFuture<'static, ()>>,
    running: FuturesUnordered<BoxFuture<'static, ()>>,
    wakeups: Arc<Wakeups>,
    /// The waker of `wakeups`.
    waker: Waker,
}

/// The turns of the loop before other tasks of the runtime get theirs.
const MOST_TURNS: usize = 8;

impl Future for Members {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { added, running, wakeups, waker } = &mut *self;
        wakeups.task.register(cx.waker());
        let inner = &mut Context::from_waker(waker);
        for _ in 0..MOST_TURNS {
            wakeups.begin_turn();
            let is_closed = loop {
                match added.poll_recv(inner) {
                    Poll::Ready(Some(future)) => running.push(future),
                    Poll::Ready(None) => break true,
                    Poll::Pending => break false,
                }
            };
            while let Poll::Ready(Some(())) = running.poll_next_unpin(inner) {}
            if is_closed && running.is_empty() {
                return Poll::Ready(());
            }
            if wakeups.end_turn() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Wakes the task. If the task runs at the moment, it takes another turn instead: the runtime would
/// queue it and wake a thread for that.
#[derive(Debug, Default)]
struct Wakeups {
    state: AtomicU8,
    task: AtomicWaker,
}

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
/// It is woken, or takes another turn.
const WOKEN: u8 = 2;

impl Wakeups {
    fn begin_turn(&self) {
        self.state.swap(RUNNING, AcqRel);
    }

    /// Returns true if nothing has woken it since the turn began. Otherwise it has to be polled
    /// again.
    fn end_turn(&self) -> bool {
        self.state.compare_exchange(RUNNING, IDLE, AcqRel, Acquire).is_ok()
    }
}

impl Wake for Wakeups {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, AcqRel) == IDLE {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures::{channel::mpsc as channel, future::pending};

    use super::*;

    /// Counts the wake-ups of the task.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, AcqRel);
        }
    }

    /// A task that is polled by hand.
    struct ByHand {
        task: JointTask,
        members: Members,
        woken: Arc<Count>,
    }

    impl ByHand {
        fn new() -> Self {
            let (task, members) = JointTask::new();
            Self { task, members, woken: Arc::default() }
        }

        fn poll(&mut self) -> Poll<()> {
            self.members.poll_unpin(&mut Context::from_waker(&self.woken.clone().into()))
        }

        /// Returns the number of wake-ups since the last call.
        fn wakeups(&self) -> usize {
            self.woken.0.swap(0, AcqRel)
        }
    }

    /// Sends back each number that comes, until there is no sender.
    fn echo()
    -> (channel::UnboundedSender<u32>, impl Future<Output = ()>, channel::UnboundedReceiver<u32>)
    {
        let (to, mut from_test) = channel::unbounded();
        let (to_test, from) = channel::unbounded();
        let echo = async move {
            while let Some(number) = from_test.next().await {
                let _ = to_test.unbounded_send(number);
            }
        };
        (to, echo, from)
    }

    #[test]
    fn futures_that_wake_each_other_wake_the_task_once() {
        let mut by_hand = ByHand::new();
        let (to_second, second, mut from_second) = echo();
        let (to_first, mut from_test) = channel::unbounded::<u32>();
        by_hand.task.add(second);
        by_hand.task.add(async move {
            while let Some(number) = from_test.next().await {
                to_second.unbounded_send(number).unwrap();
            }
        });
        assert!(by_hand.poll().is_pending());
        by_hand.wakeups();

        for number in 0..100 {
            to_first.unbounded_send(number).unwrap();
            assert_eq!(by_hand.wakeups(), 1);
            assert!(by_hand.poll().is_pending());
            assert_eq!(from_second.try_recv(), Ok(number));
            assert_eq!(by_hand.wakeups(), 0);
        }
    }

    #[test]
    fn a_future_that_always_wakes_itself_leaves_other_tasks_their_turn() {
        let mut by_hand = ByHand::new();
        by_hand.task.add(poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::Pending
        }));
        assert!(by_hand.poll().is_pending());
        assert_eq!(by_hand.wakeups(), 1);
    }

    #[test]
    fn a_future_that_panics_ends_alone() {
        let mut by_hand = ByHand::new();
        let (to, echo, mut from) = echo();
        by_hand.task.add(async { panic!("as tested") });
        by_hand.task.add(echo);
        assert!(by_hand.poll().is_pending());
        to.unbounded_send(1).unwrap();
        assert!(by_hand.poll().is_pending());
        assert_eq!(from.try_recv(), Ok(1));
    }

    #[test]
    fn the_task_ends_when_no_future_can_be_added_and_all_have_ended() {
        let ByHand { task, mut members, woken } = ByHand::new();
        let (to, echo, _from) = echo();
        task.add(echo);
        let waker = woken.into();
        let cx = &mut Context::from_waker(&waker);
        assert!(members.poll_unpin(cx).is_pending());
        drop(task);
        assert!(members.poll_unpin(cx).is_pending());
        drop(to);
        assert!(members.poll_unpin(cx).is_ready());
    }

    #[test]
    fn dropping_a_remote_drops_its_future_at_once_and_ends_its_part_in_the_task() {
        let mut by_hand = ByHand::new();
        let inside = Arc::new(());
        let kept = Arc::clone(&inside);
        let remote = by_hand.task.run(async move {
            let () = pending().await;
            drop(kept);
        });
        assert!(by_hand.poll().is_pending());
        drop(remote);
        assert_eq!(Arc::strong_count(&inside), 1);
        assert!(by_hand.poll().is_pending());
        assert!(by_hand.members.running.is_empty());
    }

    #[test]
    fn a_remote_yields_what_its_future_yields_and_panics_as_it_does() {
        let mut by_hand = ByHand::new();
        let remote = by_hand.task.run(async { 7 });
        let panics = by_hand.task.run(async { panic!("as tested") });
        assert!(by_hand.poll().is_pending());
        assert_eq!(remote.now_or_never().unwrap().unwrap(), 7);
        let panics: Remote<()> = panics;
        assert!(std::panic::catch_unwind(AssertUnwindSafe(|| panics.now_or_never())).is_err());
    }

    #[test]
    fn a_remote_yields_an_error_without_its_task() {
        let ByHand { task, members, .. } = ByHand::new();
        drop(members);
        assert!(task.run(async {}).now_or_never().unwrap().is_err());
    }
}
