use std::{
    sync::atomic::{AtomicBool, Ordering},
    task::Context,
};

use futures::task::AtomicWaker;

/// Wakes a worker's task. A signal that is sent before the task waits for it is not lost.
#[derive(Debug, Default)]
pub(super) struct TaskSignal {
    is_set: AtomicBool,
    waker: AtomicWaker,
}

impl TaskSignal {
    pub(super) fn set(&self) {
        self.is_set.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Returns true if the signal was set since the last call. The next `set` wakes the task.
    pub(super) fn take(&self, cx: &mut Context<'_>) -> bool {
        self.waker.register(cx.waker());
        self.is_set.swap(false, Ordering::AcqRel)
    }
}
