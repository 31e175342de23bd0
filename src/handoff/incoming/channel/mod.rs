//! A worker's links to its dispatchers, shared by the application and one task for each link.
//!
//! The [`Book`] of a link makes every decision. The **application** adopts: a poll of
//! [`Incoming`](super::Incoming) sends the adoption at once, so a connection is adopted only if the
//! application asks for it. The **task** reads, and sends all other messages. Only the task waits
//! for the socket. The application's sends use the task's waker, so the task sends whatever they
//! leave behind.
//!
//! A dispatcher that is replaced moves the worker to a new [`Link`], which has its own task. The
//! earlier links stay until their dispatchers end them, because an earlier dispatcher may serve
//! again if the newer one fails.
//!
//! | the worker | [`WorkerPhase`] | current link | earlier links |
//! |---|---|---|---|
//! | serves | `Open` | open | open or ended |
//! | waits for an earlier dispatcher to serve again | `Open` | ended | at least one is open |
//! | drains | `Draining` | open | open or ended |
//! | has no dispatcher | `Unlinked` | ended | ended |
//! | is done: its connections have ended, too | `Finished` | ended | ended |

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

/// The most earlier links that a worker keeps beside the current one. Usually there is at most one.
const MAX_FORMER_LINKS: usize = 16;

/// A worker's links, and how far the worker is on its way to its end.
pub(in crate::handoff) struct Channel {
    state: Mutex<State>,
    /// Only moves forward, in the order of the variants.
    phase: watch::Sender<WorkerPhase>,
}

/// The phases of a worker, in their order.
#[derive(Debug, Clone)]
pub(super) enum WorkerPhase {
    /// The worker takes offers.
    Open,
    /// The worker takes no more offers. Adopted connections are to end by the deadline.
    Draining { deadline: Option<Instant> },
    /// No link is left. Adopted connections go on.
    Unlinked(IncomingEnd),
    /// No link is left, and all adopted connections have ended.
    Finished(IncomingEnd),
}

impl Channel {
    /// Opens a channel at a socket, and spawns the task that serves this first link.
    pub(super) fn open(socket: Socket, settings: Settings) -> Arc<Self> {
        let book = Book::new(settings.window, settings.max_connections, settings.max_fds);
        let (current, read) = Link::new(0, book, socket);
        let state = State {
            current,
            former: Vec::new(),
            is_waiting: false,
            headroom: Headroom::default(),
            serve_unanswered: settings.serve_unanswered,
            is_abandoned: false,
            application: None,
            runtime: Handle::current(),
        };
        let channel = Arc::new(Self {
            state: Mutex::new(state),
            phase: watch::Sender::new(WorkerPhase::Open),
        });
        tokio::spawn(Task { channel: Arc::clone(&channel), link: 0, read, timer: None });
        channel
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> watch::Receiver<WorkerPhase> {
        self.phase.subscribe()
    }

    pub(super) fn stats(&self) -> IncomingStats {
        self.lock().current.book.stats()
    }

    /// Adopts up to `max` connections. Waits for the first one. An empty result means that no
    /// connection will ever follow.
    pub(super) fn poll_adopt(&self, cx: &Context<'_>, max: usize) -> Poll<Adopted> {
        let mut state = self.lock();
        state.adopt(max);
        let adopted = state.take_adopted(max);
        if adopted.is_empty() && !state.is_over() {
            let known = state.application.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            let replaced = if known { None } else { state.application.replace(cx.waker().clone()) };
            drop(state);
            // Dropping the last waker of a task drops the task. That may drop connections, which
            // lock this state.
            drop(replaced);
            return Poll::Pending;
        }
        Poll::Ready(adopted)
    }

    /// Counts an adopted connection as ended, so that the task reports it.
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

    /// Moves on from `Unlinked` to `Finished`. Called when no adopted connection is left.
    fn note_finished(&self) {
        self.phase.send_if_modified(|phase| {
            let WorkerPhase::Unlinked(end) = phase else { return false };
            *phase = WorkerPhase::Finished(end.clone());
            true
        });
    }

    /// Rejects the offers that wait, and takes no others.
    pub(super) fn drain(self: &Arc<Self>) {
        self.drain_by(|deadline| deadline);
    }

    /// Drains as [`drain`](Self::drain) does. `next` maps the present deadline to the new one.
    fn drain_by(self: &Arc<Self>, next: impl FnOnce(Option<Instant>) -> Option<Instant>) {
        // Stop taking offers, and show that in the phase.
        let mut state = self.lock();
        let unwanted = state.current.book.drain();
        self.phase.send_if_modified(|phase| {
            let deadline = match *phase {
                WorkerPhase::Open => next(None),
                WorkerPhase::Draining { deadline } => next(deadline),
                WorkerPhase::Unlinked(_) | WorkerPhase::Finished(_) => return false,
            };
            *phase = WorkerPhase::Draining { deadline };
            true
        });
        // The task sends the rejections, and the application finds the end of its stream.
        let application = state.application.take();
        state.wake_task();
        if state.is_waiting {
            // A worker that drains needs no new link, so nothing is left to wait for.
            self.end_all_links(state, IncomingEnd::DispatcherGone);
        } else {
            drop(state);
        }
        close_offers(unwanted);
        application.into_iter().for_each(Waker::wake);
    }

    /// Drains because the application has dropped its `Incoming`. Connections that were adopted and
    /// that the application has not received are ended.
    pub(super) fn abandon(self: &Arc<Self>) {
        self.lock().is_abandoned = true;
        self.end_abandoned();
        self.drain();
    }

    /// Ends the adopted connections that the application can no longer receive, if it has dropped
    /// its `Incoming`.
    fn end_abandoned(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.is_abandoned {
            let adopted = state.take_adopted(usize::MAX);
            drop(state);
            for prepared in adopted {
                prepared.end();
                self.finish();
            }
        }
    }

    /// Processes a message of a link. Returns the end of the link if the message causes it.
    fn on_message(
        self: &Arc<Self>,
        link: u64,
        message: ToWorker<Option<Offer>, Option<NewLink>>,
    ) -> Option<IncomingEnd> {
        // Do what concerns the whole worker, and register the socket of an offer.
        let is_fence = matches!(message, ToWorker::Fenced);
        let message = match message {
            ToWorker::Move(link) => return self.move_to(link),
            ToWorker::Drain { within } => {
                if self.lock().current.number == link {
                    self.drain_by(|_| within.map(|within| Instant::now() + within));
                }
                ToWorker::Drain { within }
            }
            other => {
                other.map_both(|offer| self.register(offer), |_| unreachable!("handled above"))
            }
        };
        // The book of the link decides about the message.
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

    /// Registers the socket of an offer with the event loop. `None` stands for an offer whose
    /// descriptors were lost because this process had no room for them.
    ///
    /// # Errors
    /// The reason for which the offer has to be rejected.
    fn register(&self, offer: Option<Offer>) -> Result<Prepared, RejectReason> {
        let offer = offer.ok_or(RejectReason::Full)?;
        let headroom = self.lock().headroom;
        if offer.fds().any(|fd| headroom.is_reserve(fd)) {
            close_in_background(offer.into_fds());
            return Err(RejectReason::Full);
        }
        Prepared::new(offer)
    }

    /// Goes on at a new link. If the descriptor of that link is lost or is not a socket, this
    /// worker drains instead.
    fn move_to(self: &Arc<Self>, link: Option<NewLink>) -> Option<IncomingEnd> {
        let Some(socket) = link.and_then(|link| Socket::try_from(link.socket).ok()) else {
            self.drain();
            return None;
        };
        let mut state = self.lock();
        if matches!(*self.phase.borrow(), WorkerPhase::Unlinked(_) | WorkerPhase::Finished(_)) {
            return None;
        }
        if state.former.len() >= MAX_FORMER_LINKS {
            let error = Error::invalid("a dispatcher moves its worker and does not end old links");
            return Some(IncomingEnd::Failed(Arc::new(error)));
        }
        // The new link becomes the current one.
        let (book, unwanted) = state.current.book.move_on();
        let number = state.current.number + 1;
        let (current, read) = Link::new(number, book, socket);
        let before = std::mem::replace(&mut state.current, current);
        state.is_waiting = false;
        // The task of the earlier link sends the rejections of what it was offered.
        before.task.wake_by_ref();
        state.former.push(before);
        state.forget_ended();
        drop(state);
        close_offers(unwanted);
        tokio::spawn(Task { channel: Arc::clone(self), link: number, read, timer: None });
        None
    }

    /// Ends a link. The worker may wait for another link, or goes on at the current one, or has no
    /// link from now on.
    fn end_link(self: &Arc<Self>, link: u64, end: IncomingEnd) {
        let mut state = self.lock();
        let is_current = link == state.current.number;
        let Some(ended) = state.link(link) else { return };
        if !ended.shut_down() {
            return;
        }
        // An earlier link: the worker goes on at the current one, if that has not ended either.
        if !is_current {
            let unowned = ended.book.end(false);
            state.on_undone(unowned.undone);
            state.forget_ended();
            let is_last = state.is_waiting && state.former.iter().all(Link::has_ended);
            state.wake_task();
            // The application may have adopted connections at this link that it waits for.
            let application = state.application.take();
            if is_last {
                self.end_all_links(state, end);
            } else {
                drop(state);
            }
            close_offers(unowned.offers);
            return application.into_iter().for_each(Waker::wake);
        }
        // The current link: a dispatcher that was replaced may serve again, and then moves this
        // worker to a new link. So the worker waits as long as an earlier link is left.
        let waits = matches!(end, IncomingEnd::DispatcherGone)
            && matches!(*self.phase.borrow(), WorkerPhase::Open)
            && state.former.iter().any(|former| !former.has_ended());
        if waits {
            state.is_waiting = true;
            let unowned = state.current.book.end(false);
            let application = state.application.take();
            drop(state);
            close_offers(unowned.offers);
            application.into_iter().for_each(Waker::wake);
        } else {
            self.end_all_links(state, end);
        }
    }

    /// Ends all links for good. `end` is how the last one has ended.
    fn end_all_links(self: &Arc<Self>, mut state: MutexGuard<'_, State>, end: IncomingEnd) {
        // End the earlier links.
        state.is_waiting = false;
        let mut unwanted = Vec::new();
        let mut undone = 0;
        for former in state.former.iter_mut().filter(|former| !former.has_ended()) {
            former.shut_down();
            former.task.wake_by_ref();
            let former = former.book.end(false);
            unwanted.extend(former.offers);
            undone += former.undone;
        }
        state.on_undone(undone);
        state.forget_ended();
        // End the current link, whose unanswered offers the application may get.
        let serve = state.serve_unanswered
            && matches!(end, IncomingEnd::DispatcherGone)
            && !state.is_abandoned;
        unwanted.extend(state.current.book.end(serve).offers);
        // Everything that runs foreign code or locks again comes after the unlock.
        let application = state.application.take();
        drop(state);
        close_offers(unwanted);
        self.end_abandoned();
        self.phase.send_replace(WorkerPhase::Unlinked(end));
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

/// Closes this process's copies of connections that are not its own, without changing an option or
/// a flag of them.
fn close_offers(offers: impl IntoIterator<Item = Prepared>) {
    close_in_background(offers.into_iter().flat_map(Prepared::into_fds));
}
