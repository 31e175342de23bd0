//! The state that all [`Sender`](super::Sender)s and the [`SendDriver`](super::SendDriver) of a
//! connection share.

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

use super::outbound::Outbound;
use crate::{
    closer::close_unsent,
    codec::{Codec, Encoder, SendBuf},
    error::{Error, SendError},
    transport::{Sending, Unsent, encode},
};

/// The queue between the senders and the driver of a connection, and the turnstile in front of it.
///
/// Messages wait in two buffers: senders append to `pending`, and the driver sends its own buffer
/// without the lock. When the driver's buffer is empty, the driver exchanges the two.
///
/// A sender that finds no room waits. Waiting senders pass the turnstile one after another: the
/// first one waits for room, and the others wait for the turnstile. So new room wakes one task and
/// not all.
#[derive(Debug)]
pub(super) struct Shared<E> {
    state: Mutex<State<E>>,
    /// The number of senders. The driver ends when it is 0.
    senders: AtomicUsize,
    /// The lock that the first of the waiting senders holds.
    turnstile: sync::Mutex<()>,
    /// The number of waiting senders, the first one included.
    waiters: AtomicUsize,
    /// Notified when something was sent, and when sending has ended.
    progress: Notify,
}

/// The part that is under the lock.
#[derive(Debug)]
pub(super) struct State<E> {
    /// `None` once the driver is gone.
    encoder: Option<E>,
    /// The messages that the driver has not taken yet.
    pending: SendBuf,
    /// The amount in the driver's own buffer.
    under_way: Unsent,
    /// The number of bytes sent since the beginning. The sum of `sent`, `under_way` and `pending`
    /// is the number of bytes accepted since the beginning, which never decreases.
    sent: u64,
    sending: Sending,
    /// The number of permits: messages for which room is reserved.
    permits: usize,
    /// The waker of the driver, while it waits for messages.
    idle_driver: Option<Waker>,
    /// True if the last call of [`next`](Self::next) found nothing to send.
    was_idle: bool,
    /// The number of bytes accepted before the last call of [`next`](Self::next).
    seen: u64,
    /// The waker of the first waiting sender.
    first_waiter: Option<Waker>,
}

/// The next thing that the driver has to do.
pub(super) enum Next {
    /// Send what is in its buffer.
    Send,
    /// Let other tasks run, which may append.
    Yield,
    /// Wait to be woken.
    Wait,
    /// End: everything is sent and no sender is left, or sending has failed.
    Finish,
}

impl<E> Shared<E> {
    /// Returns the state for one sender.
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
                was_idle: true,
                seen: 0,
                first_waiter: None,
            }),
            senders: AtomicUsize::new(1),
            turnstile: sync::Mutex::new(()),
            waiters: AtomicUsize::new(0),
            progress: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        // If an encoder has panicked under the lock, it has left nothing in the buffer.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_sender(&self) {
        self.senders.fetch_add(1, Ordering::Relaxed);
    }

    /// Wakes the driver if this was the last sender.
    pub(super) fn remove_sender(&self) {
        if self.senders.fetch_sub(1, Ordering::Relaxed) == 1 {
            let driver = self.lock().idle_driver.take();
            wake(driver);
        }
    }

    /// Gives up a permit, used or unused, and wakes the first waiter. A permit counts as one byte
    /// and one descriptor, and its message may have taken less.
    pub(super) fn remove_permit(&self) {
        let mut state = self.lock();
        state.permits -= 1;
        let first = state.first_waiter.take();
        drop(state);
        wake(first);
    }

    /// Returns true if nothing more is accepted.
    pub(super) fn is_closed(&self) -> bool {
        !self.lock().sending.is_open()
    }

    /// Waits until everything accepted before this call has been sent.
    pub(super) async fn flush(&self) -> Result<(), Error> {
        let target = {
            let state = self.lock();
            state.check()?;
            state.accepted()
        };
        loop {
            let progress = self.progress.notified(); // before the check, so that nothing is missed
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

    /// Ends sending, because the driver resolves or was dropped. Returns the encoder and the
    /// messages that the driver has not taken.
    pub(super) fn end(&self, sending: Sending) -> (Option<E>, SendBuf) {
        let mut state = self.lock();
        let rest = (state.encoder.take(), mem::take(&mut state.pending));
        state.sending = sending;
        let first = state.first_waiter.take();
        drop(state);
        wake(first);
        self.progress.notify_waiters();
        rest
    }

    /// Ends sending because the driver was dropped.
    pub(super) fn abandon(&self) {
        close_unsent(self.end(Sending::Closed).1.into_fds());
    }

    /// Returns a slot for the holder of a permit.
    pub(super) fn slot_of_permit(&self) -> Slot<'_, E> {
        Slot { state: self.lock(), _turn: None }
    }
}

impl<E: Codec> Shared<E> {
    /// Waits until there is room for one message, or sending has ended.
    pub(super) async fn slot(&self) -> Slot<'_, E> {
        coop::consume_budget().await;
        if let Some(slot) = self.try_slot() {
            return slot;
        }
        let ticket = Ticket::take(&self.waiters);
        let turn = self.turnstile.lock().await;
        let state = poll_fn(|cx| self.poll_decided(cx)).await;
        Slot { state, _turn: Some((turn, ticket)) }
    }

    /// Returns a slot without waiting. `None` if there is no room, or if other senders wait for it.
    pub(super) fn try_slot(&self) -> Option<Slot<'_, E>> {
        let state = self.lock();
        let nobody_waits = self.waiters.load(Ordering::Relaxed) == 0;
        (nobody_waits && state.is_decided()).then_some(Slot { state, _turn: None })
    }

    /// Waits, as the first waiter, until there is room or sending has ended.
    fn poll_decided(&self, cx: &mut Context<'_>) -> Poll<MutexGuard<'_, State<E>>> {
        let mut state = self.lock();
        if state.is_decided() {
            return Poll::Ready(state);
        }
        let replaced = state.first_waiter.replace(cx.waker().clone());
        drop(state);
        // This waker may be the last reference to a task, and the task may hold a permit, whose
        // drop takes the lock. So the waker is dropped after the lock is released.
        drop(replaced);
        Poll::Pending
    }

    /// Counts what the driver has sent, and returns what it has to do next.
    pub(super) fn next(&self, cx: &mut Context<'_>, outbound: &mut Outbound) -> Next {
        let mut state = self.lock();
        // Count what was sent since the last call.
        let before = mem::replace(&mut state.under_way, outbound.unsent());
        let sent = before.bytes - state.under_way.bytes;
        state.sent += sent as u64;

        let next = match state.next(outbound, self.waiters.load(Ordering::Relaxed) > 0) {
            // If the last sender is dropped after this check, it then takes the lock and wakes the
            // driver.
            Next::Wait if self.senders.load(Ordering::Relaxed) == 0 => Next::Finish,
            next => next,
        };
        let replaced = match next {
            Next::Wait => state.idle_driver.replace(cx.waker().clone()),
            _ => None,
        };
        let first = if sent > 0 { state.first_waiter.take() } else { None };

        // Wakers are foreign code, so they are dropped and called after the lock is released.
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
    /// Returns the error with which sending has ended, if it has.
    fn check(&self) -> Result<(), Error> {
        self.sending.error().map_or(Ok(()), Err)
    }

    /// Returns the number of bytes accepted since the beginning.
    fn accepted(&self) -> u64 {
        self.sent + (self.under_way.bytes + self.pending.len()) as u64
    }
}

impl<E: Codec> State<E> {
    /// Returns true once the outcome for the next message is decided: there is room, or sending has
    /// ended.
    fn is_decided(&self) -> bool {
        !self.sending.is_open() || self.has_room()
    }

    /// Returns true if there is room for one more message. A permit counts as one byte and one
    /// descriptor. Its message may then exceed the limits, as the last message before a limit may.
    fn has_room(&self) -> bool {
        let bytes = self.under_way.bytes + self.pending.len() + self.permits;
        let fds = self.under_way.fds + self.pending.fd_count() + self.permits;
        self.encoder.as_ref().is_some_and(|encoder| encoder.limits().leave_room_beside(bytes, fds))
    }

    /// Decides what the driver does next. If it has to send, this fills its buffer.
    fn next(&mut self, outbound: &mut Outbound, senders_wait: bool) -> Next {
        self.pending.set_max_packet_bytes(outbound.side.buf.max_packet_bytes());
        if !outbound.side.state().is_open() {
            return Next::Finish;
        }
        if !outbound.side.buf.is_empty() {
            return Next::Send;
        }
        if self.pending.is_empty() {
            self.was_idle = true;
            return Next::Wait;
        }
        // Let other tasks append before the driver sends, so that one call carries all of their
        // messages. tokio runs the task first that was woken last, which is the driver here. So the
        // driver yields once after it was idle, and again as long as senders wait and each round
        // brings more messages.
        let was_idle = mem::take(&mut self.was_idle);
        let more = self.seen < self.accepted();
        self.seen = self.accepted();
        if more && (was_idle || senders_wait) && self.has_room() {
            return Next::Yield;
        }
        mem::swap(&mut outbound.side.buf, &mut self.pending);
        self.under_way = outbound.unsent();
        Next::Send
    }
}

/// The locked state, for one message. The fields are dropped in their order: the lock is released
/// first, and then the turnstile.
pub(super) struct Slot<'a, E> {
    state: MutexGuard<'a, State<E>>,
    _turn: Option<(sync::MutexGuard<'a, ()>, Ticket<'a>)>,
}

impl<E> Slot<'_, E> {
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

    /// Reserves the room for a permit.
    pub(super) fn keep(mut self) -> Result<(), Error> {
        self.state.check()?;
        self.state.permits += 1;
        Ok(())
    }
}

/// The right to wait at the turnstile. While it exists, its holder counts as a waiter.
struct Ticket<'a>(&'a AtomicUsize);

impl<'a> Ticket<'a> {
    fn take(waiters: &'a AtomicUsize) -> Self {
        waiters.fetch_add(1, Ordering::Relaxed);
        Self(waiters)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
