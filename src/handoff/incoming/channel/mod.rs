//! The connection to the dispatcher: what the application and the task that serves it share, and
//! that task.
//!
//! The [`Book`] decides. The **application** adopts: whoever polls [`Incoming`](super::Incoming)
//! has the answer sent right then, so nothing is adopted that nobody has asked for. The **task**
//! reads, and sends the other answers. Only the task waits for the socket. The application's sends
//! use the task's waker, so the task sends whatever they leave behind.
//!
//! A dispatcher that is replaced moves the worker to a new [`Link`], with a task of its own. The
//! links before it stay until their dispatchers end them, since one of these may serve again.

mod link;
mod state;
mod task;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::{runtime::Handle, sync::watch, time::Instant};

use link::Link;
use state::{Adopted, State, now};
use task::Task;

use super::{
    book::Book, end::IncomingEnd, headroom::Headroom, prepared::Prepared, settings::Settings,
    stats::IncomingStats,
};
use crate::{
    Error, Socket, close_in_background,
    handoff::protocol::{NewLink, Offer, RejectReason, ToWorker},
};

/// The most links that a worker has beside the current one. Usually it has one.
const MOST_FORMER: usize = 16;

pub(in crate::handoff) struct Channel {
    state: Mutex<State>,
    phase: watch::Sender<Phase>,
}

#[derive(Debug, Clone)]
pub(super) enum Phase {
    Open,
    Draining {
        deadline: Option<Instant>,
    },
    /// The link has ended. Adopted connections go on.
    Unlinked(IncomingEnd),
    /// They have ended too.
    Finished(IncomingEnd),
}

impl Channel {
    pub(super) fn open(socket: Socket, settings: Settings) -> Arc<Self> {
        let book = Book::new(settings.window, settings.max_connections, settings.max_fds);
        let (current, read) = Link::new(0, book, socket);
        let state = State {
            current,
            former: Vec::new(),
            is_waiting: false,
            headroom: Headroom::default(),
            serve_unanswered: settings.serve_unanswered,
            abandoned: false,
            application: None,
            runtime: Handle::current(),
        };
        let channel =
            Arc::new(Self { state: Mutex::new(state), phase: watch::Sender::new(Phase::Open) });
        tokio::spawn(Task { channel: Arc::clone(&channel), link: 0, read, timer: None });
        channel
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    pub(super) fn stats(&self) -> IncomingStats {
        self.lock().current.book.stats()
    }

    /// Adopts up to `max` connections. None: there will be no others.
    pub(super) fn poll_adopt(&self, cx: &Context<'_>, max: usize) -> Poll<Adopted> {
        let mut state = self.lock();
        state.adopt(max);
        let adopted = state.take_adopted(max);
        if adopted.is_empty() && !state.is_over() {
            let known = state.application.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            let replaced = if known { None } else { state.application.replace(cx.waker().clone()) };
            drop(state);
            drop(replaced); // may be all that is left of a task, with connections in it
            return Poll::Pending;
        }
        Poll::Ready(adopted)
    }

    /// An adopted connection has ended.
    pub(in crate::handoff) fn finish(&self) {
        let mut state = self.lock();
        if state.current.book.finish(now()) {
            state.wake_task();
        }
        let has_finished = state.current.book.has_finished();
        drop(state);
        if has_finished {
            self.note_finished();
        }
    }

    /// The link has ended, and the last adopted connection has.
    fn note_finished(&self) {
        self.phase.send_if_modified(|phase| {
            let Phase::Unlinked(end) = phase else { return false };
            *phase = Phase::Finished(end.clone());
            true
        });
    }

    /// Takes no more.
    pub(super) fn drain(self: &Arc<Self>) {
        self.drain_by(|deadline| deadline);
    }

    /// Takes no more, by a deadline that follows from the one there is.
    fn drain_by(self: &Arc<Self>, next: impl FnOnce(Option<Instant>) -> Option<Instant>) {
        let mut state = self.lock();
        let unwanted = state.current.book.drain();
        self.phase.send_if_modified(|phase| {
            let deadline = match *phase {
                Phase::Open => next(None),
                Phase::Draining { deadline } => next(deadline),
                Phase::Unlinked(_) | Phase::Finished(_) => return false,
            };
            *phase = Phase::Draining { deadline };
            true
        });
        let application = state.application.take();
        state.wake_task();
        if state.is_waiting {
            self.unlink(state, IncomingEnd::DispatcherGone);
        } else {
            drop(state);
        }
        close_offers(unwanted);
        application.into_iter().for_each(Waker::wake);
    }

    /// Takes no more, and nobody asks for what was adopted last.
    pub(super) fn abandon(self: &Arc<Self>) {
        self.lock().abandoned = true;
        self.end_abandoned();
        self.drain();
    }

    fn end_abandoned(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.abandoned {
            let adopted = state.take_adopted(usize::MAX);
            drop(state);
            for prepared in adopted {
                prepared.end();
                self.finish();
            }
        }
    }

    /// Takes a message of a link. Returns how the link has ended, if it has.
    fn received(
        self: &Arc<Self>,
        link: u64,
        message: ToWorker<Option<Offer>, Option<NewLink>>,
    ) -> Option<IncomingEnd> {
        let is_fence = matches!(message, ToWorker::Fenced);
        let message = match message {
            ToWorker::Move(link) => return self.move_to(link),
            ToWorker::Drain { within } => {
                if self.lock().current.number == link {
                    self.drain_by(|_| within.map(|within| Instant::now() + within));
                }
                ToWorker::Drain { within }
            }
            other => other.map_both(|offer| self.prepare(offer), |_| unreachable!("handled above")),
        };
        let mut state = self.lock();
        let link = state.link(link)?;
        let outcome = link.book.on_message(message);
        drop(state);
        match outcome {
            Ok(unwanted) => close_offers(unwanted),
            Err(error) => return Some(IncomingEnd::Failed(Arc::new(error))),
        }
        is_fence.then_some(IncomingEnd::Fenced)
    }

    /// # Errors
    /// Why the offer has to be rejected.
    fn prepare(&self, offer: Option<Offer>) -> Result<Prepared, RejectReason> {
        let offer = offer.ok_or(RejectReason::Full)?; // there was no room for its descriptors
        let headroom = self.lock().headroom;
        if offer.fds().any(|fd| headroom.is_reserve(fd)) {
            close_in_background(offer.into_fds());
            return Err(RejectReason::Full);
        }
        Prepared::new(offer)
    }

    /// Goes on at another link. Without one, since its descriptor is lost or is no socket, this
    /// worker drains: nobody waits for it there.
    fn move_to(self: &Arc<Self>, link: Option<NewLink>) -> Option<IncomingEnd> {
        let Some(socket) = link.and_then(|link| Socket::try_from(link.socket).ok()) else {
            self.drain();
            return None;
        };
        let mut state = self.lock();
        if matches!(*self.phase.borrow(), Phase::Unlinked(_) | Phase::Finished(_)) {
            return None;
        }
        if state.former.len() >= MOST_FORMER {
            let error = Error::invalid("a dispatcher that moves its worker and ends no old link");
            return Some(IncomingEnd::Failed(Arc::new(error)));
        }
        let (book, unwanted) = state.current.book.move_on();
        let number = state.current.number + 1;
        let (current, read) = Link::new(number, book, socket);
        let before = std::mem::replace(&mut state.current, current);
        state.is_waiting = false;
        before.task.wake_by_ref();
        state.former.push(before);
        state.forget_ended();
        drop(state);
        close_offers(unwanted);
        tokio::spawn(Task { channel: Arc::clone(self), link: number, read, timer: None });
        None
    }

    /// Nothing more is sent or received at a link.
    fn end(self: &Arc<Self>, link: u64, end: IncomingEnd) {
        let mut state = self.lock();
        let is_current = link == state.current.number;
        let Some(ended) = state.link(link) else { return };
        if !ended.shut_down() {
            return;
        }
        if !is_current {
            let unwanted = ended.book.end(false);
            state.on_lost(unwanted.lost);
            state.forget_ended();
            let is_last = state.is_waiting && state.former.iter().all(Link::has_ended);
            state.wake_task();
            let application = state.application.take(); // it may have adopted some at this link
            if is_last {
                self.unlink(state, end);
            } else {
                drop(state);
            }
            close_offers(unwanted.offers);
            return application.into_iter().for_each(Waker::wake);
        }
        // A dispatcher that was replaced may serve again, and this worker goes on then.
        let waits = matches!(end, IncomingEnd::DispatcherGone)
            && matches!(*self.phase.borrow(), Phase::Open)
            && state.former.iter().any(|former| !former.has_ended());
        if waits {
            state.is_waiting = true;
            let unwanted = state.current.book.end(false);
            let application = state.application.take();
            drop(state);
            close_offers(unwanted.offers);
            application.into_iter().for_each(Waker::wake);
        } else {
            self.unlink(state, end);
        }
    }

    /// No link is left, and none will come.
    fn unlink(self: &Arc<Self>, mut state: MutexGuard<'_, State>, end: IncomingEnd) {
        state.is_waiting = false;
        let mut unwanted = Vec::new();
        let mut lost = 0;
        for former in state.former.iter_mut().filter(|former| !former.has_ended()) {
            former.shut_down();
            former.task.wake_by_ref();
            let former = former.book.end(false);
            unwanted.extend(former.offers);
            lost += former.lost;
        }
        state.on_lost(lost);
        state.forget_ended();
        let serve = state.serve_unanswered
            && matches!(end, IncomingEnd::DispatcherGone)
            && !state.abandoned;
        unwanted.extend(state.current.book.end(serve).offers);
        let application = state.application.take();
        drop(state);
        close_offers(unwanted);
        self.end_abandoned();
        self.phase.send_replace(Phase::Unlinked(end));
        if self.lock().current.book.has_finished() {
            self.note_finished();
        }
        application.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("phase", &*self.phase.borrow()).finish_non_exhaustive()
    }
}

/// Closes copies of connections that are not ours: no option and no flag of them is touched.
fn close_offers(offers: impl IntoIterator<Item = Prepared>) {
    close_in_background(offers.into_iter().flat_map(Prepared::into_fds));
}
