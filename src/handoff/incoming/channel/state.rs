//! The state that the application shares with the tasks of a worker's links.

use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use tokio::{runtime::Handle, time::Instant};

use super::link::Link;
use crate::handoff::incoming::{headroom::Headroom, prepared::Prepared};

/// Adopted connections on their way to the application.
pub(super) type Adopted = SmallVec<[Prepared; 1]>;

/// All links of a worker, and everything that does not belong to one link.
pub(super) struct State {
    /// The newest link. Offers come from it, and the end of every adopted connection is reported
    /// at it.
    pub(super) current: Link,
    /// The earlier links that have not ended, or whose adopted connections the application has not
    /// yet received.
    pub(super) former: Vec<Link>,
    /// The current link has ended, and an earlier dispatcher may move this worker to a new one.
    pub(super) is_waiting: bool,
    pub(super) headroom: Headroom,
    pub(super) serve_unanswered: bool,
    /// The application has dropped its `Incoming`, so it will not ask for connections again.
    pub(super) is_abandoned: bool,
    /// Wakes the application if it waits for a connection.
    pub(super) application: Option<Waker>,
    pub(super) runtime: Handle,
}

impl State {
    /// Returns true if the application gets nothing more.
    pub(super) fn is_over(&self) -> bool {
        !self.is_waiting
            && self.current.book.is_over()
            && self.former.iter().all(|former| former.book.is_over())
    }

    /// Counts connections as finished whose adoption at an earlier link was never sent. The current
    /// link had counted them as open when it began.
    pub(super) fn on_undone(&mut self, connections: u64) {
        for _ in 0..connections {
            self.current.book.finish(now());
        }
    }

    /// Returns the link of this number. Returns `None` if that link was forgotten.
    pub(super) fn link(&mut self, number: u64) -> Option<&mut Link> {
        self.link_and_headroom(number).map(|(link, _)| link)
    }

    /// Returns the link of this number, as [`link`](Self::link) does, and the headroom.
    pub(super) fn link_and_headroom(&mut self, number: u64) -> Option<(&mut Link, &mut Headroom)> {
        let Self { current, former, headroom, .. } = self;
        let mut links = former.iter_mut().chain([current]);
        links.find(|link| link.number == number).map(|link| (link, headroom))
    }

    /// Forgets the earlier links that have ended and have no connections for the application.
    pub(super) fn forget_ended(&mut self) {
        self.former.retain(|link| !link.has_ended() || link.book.adopting() > 0);
    }

    /// Adopts up to `max` of the offers that wait, sends the answer, and asks for as many others as
    /// there is room for.
    pub(super) fn adopt(&mut self, max: usize) {
        self.current.book.adopt(max);
        self.current.feed();
        let before = self.current.book.next_timeout();
        self.ask();
        self.current.feed();
        let task = self.current.task.clone();
        let flushed = self.current.poll_flush(&mut Context::from_waker(&task));
        // Wake the task if it has something to do: to send the rest, to find out what an error
        // means, or to wait for an earlier timeout.
        let is_sooner = |next| before.is_none_or(|before| next < before);
        if !matches!(flushed, Poll::Ready(Ok(())))
            || self.current.book.next_timeout().is_some_and(is_sooner)
        {
            self.wake_task();
        }
    }

    /// Takes out up to `max` adopted connections whose adoption was sent to the dispatcher.
    pub(super) fn take_adopted(&mut self, max: usize) -> Adopted {
        let mut adopted = Adopted::new();
        for link in self.former.iter_mut().chain([&mut self.current]) {
            adopted.extend(link.book.take_adopted::<Adopted>(max - adopted.len()));
        }
        self.forget_ended();
        adopted
    }

    /// Asks for as many offers as there is room for at the current link.
    pub(super) fn ask(&mut self) {
        self.current.book.ask(now(), || self.headroom.count());
    }

    /// Wakes the task of the current link, and lets any thread of the runtime run it.
    pub(super) fn wake_task(&self) {
        self.current.task.wake_by_ref();
        // Tokio reserves the task that a thread has woken last for that thread, which the
        // application may block. Spawning an empty task afterwards takes that reserved position.
        drop(self.runtime.spawn(async {}));
    }
}

/// Returns the time of the runtime's clock, which tests may have paused.
pub(super) fn now() -> std::time::Instant {
    Instant::now().into_std()
}
