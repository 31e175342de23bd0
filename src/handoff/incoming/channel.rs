//! The connection to the dispatcher: what the application and the task that serves it share, and
//! that task.
//!
//! The [`Book`] decides. The **application** adopts: whoever polls [`Incoming`](super::Incoming)
//! has the answer sent right then, so nothing is adopted that nobody has asked for. The **task**
//! reads, and sends the other answers. Only the task waits for the socket. The application's sends
//! use the task's waker, so the task sends whatever they leave behind.

mod task;

use std::{
    collections::VecDeque,
    fmt,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use futures_sink::Sink;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use smallvec::SmallVec;
use tokio::{runtime::Handle, sync::watch, time::Instant};

use task::Task;

use super::{End, IncomingStats, Settings, book::Book, headroom::Headroom};
use crate::{
    Error, Framed, Socket, close_in_background,
    framed::WriteHalf,
    handoff::{
        connection::{Connection, Prepared},
        protocol::{FromWorker, Offer, RejectReason, SalvagingCodec, ToWorker, WorkerCodec},
    },
};

/// Connections that the application gets.
pub(super) type Adopted = SmallVec<[Prepared; 1]>;

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
    Unlinked(End),
    /// They have ended too.
    Finished(End),
}

struct State {
    book: Book<Prepared>,
    headroom: Headroom,
    serve_unanswered: bool,
    /// `None` after the end.
    write: Option<WriteHalf<WorkerCodec>>,
    /// Bytes given to `write` in all.
    fed: u64,
    /// Where each message ends among them that was not sent as a whole.
    ends: VecDeque<u64>,
    /// Nobody will ask any more.
    abandoned: bool,
    application: Option<Waker>,
    task: Waker,
    runtime: Handle,
}

impl Channel {
    pub(super) fn open(socket: Socket, settings: Settings) -> Arc<Self> {
        let (read, write) =
            Framed::with_codecs(socket.quiet(), SalvagingCodec::default(), WorkerCodec::default())
                .into_split();
        let state = State {
            book: Book::new(settings.window, settings.max_connections, settings.max_fds),
            headroom: Headroom::default(),
            serve_unanswered: settings.serve_unanswered,
            write: Some(write),
            fed: 0,
            ends: VecDeque::new(),
            abandoned: false,
            application: None,
            task: Waker::noop().clone(),
            runtime: Handle::current(),
        };
        let channel =
            Arc::new(Self { state: Mutex::new(state), phase: watch::Sender::new(Phase::Open) });
        tokio::spawn(Task { channel: Arc::clone(&channel), read, timer: None });
        channel
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    pub(super) fn stats(&self) -> IncomingStats {
        self.lock().book.stats()
    }

    /// Adopts up to `max` connections. None: there will not be any more.
    pub(super) fn poll_adopt(&self, cx: &Context<'_>, max: usize) -> Poll<Adopted> {
        let mut state = self.lock();
        state.adopt(max);
        let adopted = state.book.take_adopted::<Adopted>(max);
        if adopted.is_empty() && !state.book.is_over() {
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
        if state.book.finish(now()) {
            state.wake_task();
        }
        let has_finished = state.book.has_finished();
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
    pub(super) fn drain(&self) {
        self.drain_by(|deadline| deadline);
    }

    /// Takes no more, by a deadline that follows from the one there is.
    fn drain_by(&self, next: impl FnOnce(Option<Instant>) -> Option<Instant>) {
        let mut state = self.lock();
        let unwanted = state.book.drain();
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
        drop(state);
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
            let adopted = state.book.take_adopted::<Adopted>(usize::MAX);
            drop(state);
            adopted.into_iter().for_each(|prepared| drop(Connection::adopted(prepared, self)));
        }
    }

    /// Takes a message. Returns how the link has ended, if it has.
    fn received(&self, message: ToWorker<Option<Offer>>) -> Option<End> {
        let is_fence = matches!(message, ToWorker::Fenced);
        if let ToWorker::Drain { within } = &message {
            self.drain_by(|_| within.map(|within| Instant::now() + within));
        }
        let message = message.map(|offer| self.prepare(offer));
        let outcome = self.lock().book.on_message(message);
        match outcome {
            Ok(unwanted) => close_offers(unwanted),
            Err(error) => return Some(End::Failed(Arc::new(error))),
        }
        is_fence.then_some(End::Fenced)
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

    /// Nothing more is sent or received.
    fn end(self: &Arc<Self>, end: End) {
        let mut state = self.lock();
        let Some(write) = state.write.take() else { return };
        // Standard input stays open beside the socket that was made of it.
        let _ = write.socket().shutdown(Shutdown::Both);
        let serve =
            state.serve_unanswered && matches!(end, End::DispatcherGone) && !state.abandoned;
        let unwanted = state.book.end(serve);
        let application = state.application.take();
        drop((state, write));
        close_offers(unwanted);
        self.end_abandoned();
        self.phase.send_replace(Phase::Unlinked(end));
        if self.lock().book.has_finished() {
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

/// The runtime's time, as the book counts it.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl State {
    fn adopt(&mut self, max: usize) {
        self.book.adopt(max);
        self.feed();
        let before = self.book.next_timeout();
        self.ask();
        self.feed();
        let task = self.task.clone();
        let flushed = self.poll_flush(&mut Context::from_waker(&task));
        // It sends the rest, finds out what an error means, or waits for another time.
        let is_sooner = |next| before.is_none_or(|before| next < before);
        if !matches!(flushed, Poll::Ready(Ok(())))
            || self.book.next_timeout().is_some_and(is_sooner)
        {
            self.wake_task();
        }
    }

    /// Asks for as many offers as there is room for.
    fn ask(&mut self) {
        self.book.ask(now(), || self.headroom.count());
    }

    /// Gives the book's messages to the socket's queue.
    fn feed(&mut self) {
        let Some(write) = &mut self.write else { return };
        while let Some(message) = self.book.next_message() {
            let before = write.unsent().bytes;
            // One that is refused is never sent, and nothing after it: the socket has failed.
            match Pin::new(&mut *write).start_send(message) {
                Ok(()) => {
                    self.fed = self.fed.saturating_add((write.unsent().bytes - before) as u64)
                }
                Err(_) => self.fed = u64::MAX,
            }
            self.ends.push_back(self.fed);
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(write) = &mut self.write else { return Poll::Ready(Ok(())) };
        let flushed = Sink::<FromWorker>::poll_flush(Pin::new(&mut *write), cx);
        if self.fed != u64::MAX {
            let sent = self.fed - write.unsent().bytes as u64;
            let messages = self.ends.partition_point(|end| *end <= sent);
            self.ends.drain(..messages);
            self.book.on_sent(messages as u64);
        }
        flushed.map_err(|error| error.error)
    }

    /// Wakes the task from the application. Another task follows, which does nothing: tokio keeps
    /// what was woken last for the thread that woke it, and the application may block that one.
    fn wake_task(&self) {
        self.task.wake_by_ref();
        drop(self.runtime.spawn(async {}));
    }

    fn unsent_bytes(&self) -> usize {
        self.write.as_ref().map_or(0, |write| write.unsent().bytes)
    }

    /// Returns true if the dispatcher takes no more answers though it is there: asked after a send
    /// has failed. If it has gone instead, the end of the stream, or what it sent before, is there
    /// to be read already.
    fn is_cut_off(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let socket = self.write.as_ref().map(WriteHalf::socket);
        socket.is_some_and(|socket| {
            recv(socket.as_fd().as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
        })
    }
}
