//! What the application and the tasks of a worker's links share: all links, and what they have in
//! common.

use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use tokio::{runtime::Handle, time::Instant};

use super::link::Link;
use crate::handoff::incoming::{headroom::Headroom, prepared::Prepared};

/// Connections that the application gets.
pub(super) type Adopted = SmallVec<[Prepared; 1]>;

pub(super) struct State {
    /// The link at which offers come, and at which adopted connections end.
    pub(super) current: Link,
    /// The links before it that have not ended, or have connections that the application has not
    /// got.
    pub(super) former: Vec<Link>,
    /// The current link has ended, and a dispatcher before it may serve again.
    pub(super) is_waiting: bool,
    pub(super) headroom: Headroom,
    pub(super) serve_unanswered: bool,
    /// Nobody will ask again.
    pub(super) abandoned: bool,
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

    /// Adoptions at a link before this one were not told of. When this one began, they were counted
    /// as open.
    pub(super) fn on_lost(&mut self, connections: u64) {
        for _ in 0..connections {
            self.current.book.finish(now());
        }
    }

    /// Returns the link of this number, unless it has ended before another one followed.
    pub(super) fn link(&mut self, number: u64) -> Option<&mut Link> {
        self.link_and_headroom(number).map(|(link, _)| link)
    }

    pub(super) fn link_and_headroom(&mut self, number: u64) -> Option<(&mut Link, &mut Headroom)> {
        let Self { current, former, headroom, .. } = self;
        let mut links = former.iter_mut().chain([current]);
        links.find(|link| link.number == number).map(|link| (link, headroom))
    }

    pub(super) fn forget_ended(&mut self) {
        self.former.retain(|link| !link.has_ended() || link.book.adopting() > 0);
    }

    pub(super) fn adopt(&mut self, max: usize) {
        self.current.book.adopt(max);
        self.current.feed();
        let before = self.current.book.next_timeout();
        self.ask();
        self.current.feed();
        let task = self.current.task.clone();
        let flushed = self.current.poll_flush(&mut Context::from_waker(&task));
        // It sends the rest, finds out what an error means, or waits for another time.
        let is_sooner = |next| before.is_none_or(|before| next < before);
        if !matches!(flushed, Poll::Ready(Ok(())))
            || self.current.book.next_timeout().is_some_and(is_sooner)
        {
            self.wake_task();
        }
    }

    /// Takes out up to `max` connections that were adopted and that the dispatcher has been told
    /// of.
    pub(super) fn take_adopted(&mut self, max: usize) -> Adopted {
        let mut adopted = Adopted::new();
        for link in self.former.iter_mut().chain([&mut self.current]) {
            adopted.extend(link.book.take_adopted::<Adopted>(max - adopted.len()));
        }
        self.forget_ended();
        adopted
    }

    /// Asks for as many offers as there is room for.
    pub(super) fn ask(&mut self) {
        self.current.book.ask(now(), || self.headroom.count());
    }

    /// Wakes the task from the application. Another task follows, which does nothing: tokio keeps
    /// what was woken last for the thread that woke it, and the application may block that one.
    pub(super) fn wake_task(&self) {
        self.current.task.wake_by_ref();
        drop(self.runtime.spawn(async {}));
    }
}

/// The runtime's time, as the book counts it.
pub(super) fn now() -> std::time::Instant {
    Instant::now().into_std()
}
