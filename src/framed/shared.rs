//! What [`Sender`](super::Sender)s and their [`Driver`](super::Driver) share.

use std::{
    future::poll_fn,
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use tokio::{
    sync::{self, Notify},
    task::coop,
};

use super::write::{Outbound, WriteHalf};
use crate::{
    Codec, Encoder, Error, SendBuf, SendError,
    closer::close_unsent,
    transport::{Sending, encode},
};

/// Messages wait in the `pending` buffer of the state, where senders append, and in the driver's
/// own, which it sends without the lock. When the driver's is empty it exchanges the two.
///
/// A sender that finds no room gets in line. The first in line waits for room, the others for their
/// `turn`: when there is room, one task wakes and not all.
#[derive(Debug)]
pub(super) struct Shared<E> {
    state: Mutex<State<E>>,
    senders: AtomicUsize,
    /// Held by the first in line.
    turn: sync::Mutex<()>,
    /// How many are in line.
    line: AtomicUsize,
    /// Something was sent, or nothing will be any more.
    progress: Notify,
}

#[derive(Debug)]
pub(super) struct State<E> {
    /// `None` once the driver has gone.
    encoder: Option<E>,
    pending: SendBuf,
    /// Bytes and descriptors in the driver's own buffer.
    under_way: (usize, usize),
    /// Number of bytes sent.
    sent: u64,
    sending: Sending,
    /// Room promised, in messages.
    permits: usize,
    /// The driver, while it waits to be woken.
    idle_driver: Option<Waker>,
    /// Whether nothing waited when the driver looked last, and how many bytes had been accepted by
    /// then.
    idle: bool,
    seen: u64,
    first_in_line: Option<Waker>,
}

/// What the driver is to do.
pub(super) enum Next {
    /// Send what is in its buffer.
    Send,
    /// Let other tasks run, which may append.
    Yield,
    /// Wait to be woken.
    Wait,
    /// Nothing more can be sent, or is to be.
    Finish,
}

impl<E> Shared<E> {
    /// With one sender.
    pub(super) fn new(encoder: E, outbound: &Outbound) -> Self {
        let mut pending = SendBuf::new();
        pending.set_max_packet_bytes(outbound.side.buf.max_packet_bytes());
        Self {
            state: Mutex::new(State {
                encoder: Some(encoder),
                pending,
                under_way: outbound.unsent(),
                sent: 0,
                sending: outbound.side.state().clone(),
                permits: 0,
                idle_driver: None,
                idle: true,
                seen: 0,
                first_in_line: None,
            }),
            senders: AtomicUsize::new(1),
            turn: sync::Mutex::new(()),
            line: AtomicUsize::new(0),
            progress: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        // An encoder may have panicked. It has left nothing in the buffer.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_sender(&self) {
        self.senders.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn remove_sender(&self) {
        if self.senders.fetch_sub(1, Ordering::Relaxed) == 1 {
            let driver = self.lock().idle_driver.take();
            wake(driver);
        }
    }

    /// Gives up a permit, used or not: it may have taken more room than its message does.
    pub(super) fn remove_permit(&self) {
        let mut state = self.lock();
        state.permits -= 1;
        let first = state.first_in_line.take();
        drop(state);
        wake(first);
    }

    /// Waits until everything accepted before has been sent.
    pub(super) async fn flush(&self) -> Result<(), Error> {
        let target = {
            let state = self.lock();
            state.check()?;
            state.accepted()
        };
        loop {
            let progress = self.progress.notified(); // what happens from here on ends its wait
            {
                let state = self.lock();
                if state.sent >= target {
                    return Ok(());
                }
                state.check()?;
            }
            progress.await;
        }
    }

    /// Accepts nothing more, and wakes everyone. Returns the encoder and what was accepted and is
    /// not in the driver's own buffer.
    fn end(&self, sending: Sending) -> (Option<E>, SendBuf) {
        let mut state = self.lock();
        let rest = (state.encoder.take(), mem::take(&mut state.pending));
        state.sending = sending;
        let first = state.first_in_line.take();
        drop(state);
        wake(first);
        self.progress.notify_waiters();
        rest
    }

    /// The driver has done its part.
    pub(super) fn finish(&self, mut outbound: Outbound) -> WriteHalf<E> {
        let sending = match outbound.side.state().clone() {
            Sending::Open => Sending::Closed, // there are no senders to see it
            over => over,
        };
        let (encoder, mut pending) = self.end(sending);
        outbound.side.buf.append(&mut pending);
        WriteHalf { encoder: encoder.expect("only the driver takes it, at its end"), outbound }
    }

    /// The driver was dropped.
    pub(super) fn abandon(&self) {
        close_unsent(self.end(Sending::Closed).1.into_fds());
    }
}

impl<E: Codec> Shared<E> {
    /// Waits until there is room for one message, or nothing is accepted any more.
    pub(super) async fn room(&self) -> Room<'_, E> {
        coop::consume_budget().await;
        if let Some(state) = self.room_without_line() {
            return Room { state, _place: None };
        }
        let place = Place::get_in(&self.line);
        let turn = self.turn.lock().await;
        let state = poll_fn(|cx| self.poll_room(cx)).await;
        Room { state, _place: Some((turn, place)) }
    }

    fn room_without_line(&self) -> Option<MutexGuard<'_, State<E>>> {
        let state = self.lock();
        (self.line.load(Ordering::Relaxed) == 0 && state.decides()).then_some(state)
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<MutexGuard<'_, State<E>>> {
        let mut state = self.lock();
        if state.decides() {
            return Poll::Ready(state);
        }
        let replaced = state.first_in_line.replace(cx.waker().clone());
        drop(state);
        drop(replaced); // may be all that is left of a task, with a permit in it
        Poll::Pending
    }

    /// For the holder of a permit.
    pub(super) fn room_with_permit(&self) -> Room<'_, E> {
        Room { state: self.lock(), _place: None }
    }

    /// Takes note of what the driver has sent, and says what it does next.
    pub(super) fn next(&self, cx: &mut Context<'_>, outbound: &mut Outbound) -> Next {
        let mut state = self.lock();
        let before = mem::replace(&mut state.under_way, outbound.unsent());
        let sent = before.0 - state.under_way.0;
        state.sent += sent as u64;
        let next = match state.next(outbound, self.line.load(Ordering::Relaxed) > 0) {
            // Whoever makes it 0 takes the lock and then wakes the driver.
            Next::Wait if self.senders.load(Ordering::Relaxed) == 0 => Next::Finish,
            next => next,
        };
        let replaced = match next {
            Next::Wait => state.idle_driver.replace(cx.waker().clone()),
            _ => None,
        };
        let first = if sent > 0 { state.first_in_line.take() } else { None };
        drop(state);
        drop(replaced);
        wake(first);
        if sent > 0 {
            self.progress.notify_waiters();
        }
        next
    }
}

impl<E> State<E> {
    fn check(&self) -> Result<(), Error> {
        self.sending.error().map_or(Ok(()), Err)
    }

    /// Number of bytes accepted since the beginning.
    fn accepted(&self) -> u64 {
        self.sent + (self.under_way.0 + self.pending.len()) as u64
    }
}

impl<E: Codec> State<E> {
    /// Whether a sender knows by now: its message is taken, or nothing is any more.
    fn decides(&self) -> bool {
        !self.sending.is_open() || self.has_room()
    }

    /// A permit counts as a byte and a descriptor. What it then brings may stand out above the
    /// limits, as any message may.
    fn has_room(&self) -> bool {
        let bytes = self.under_way.0 + self.pending.len() + self.permits;
        let fds = self.under_way.1 + self.pending.fd_count() + self.permits;
        self.encoder.as_ref().is_some_and(|encoder| encoder.limits().leave_room_beside(bytes, fds))
    }

    fn next(&mut self, outbound: &mut Outbound, senders_in_line: bool) -> Next {
        self.pending.set_max_packet_bytes(outbound.side.buf.max_packet_bytes());
        if !outbound.side.state().is_open() {
            return Next::Finish;
        }
        if !outbound.side.buf.is_empty() {
            return Next::Send;
        }
        if self.pending.is_empty() {
            self.idle = true;
            return Next::Wait;
        }
        // Other tasks that are ready append first, though tokio's workers run whom the last task
        // has woken before them; and those in line as long as it moves. One call then carries all
        // of it.
        let was_idle = mem::take(&mut self.idle);
        let more = self.seen < self.accepted();
        self.seen = self.accepted();
        if more && (was_idle || senders_in_line) && self.has_room() {
            return Next::Yield;
        }
        mem::swap(&mut outbound.side.buf, &mut self.pending);
        self.under_way = outbound.unsent();
        Next::Send
    }
}

/// The state, locked, with room for one message. First the lock is released, then the place in
/// line.
pub(super) struct Room<'a, E> {
    state: MutexGuard<'a, State<E>>,
    _place: Option<(sync::MutexGuard<'a, ()>, Place<'a>)>,
}

impl<E> Room<'_, E> {
    /// Appends an item and wakes the driver.
    pub(super) fn accept<I>(mut self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        let state = &mut *self.state;
        match (&mut state.encoder, state.sending.error()) {
            (Some(encoder), None) => encode(encoder, item, &mut state.pending)?,
            (_, error) => return Err(SendError::refused(item, error.unwrap_or(Error::Closed))),
        }
        let driver = state.idle_driver.take();
        drop(self);
        wake(driver);
        Ok(())
    }

    /// Keeps the room for a permit.
    pub(super) fn keep(mut self) -> Result<(), Error> {
        self.state.check()?;
        self.state.permits += 1;
        Ok(())
    }
}

/// A place in line.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn get_in(line: &'a AtomicUsize) -> Self {
        line.fetch_add(1, Ordering::Relaxed);
        Self(line)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
