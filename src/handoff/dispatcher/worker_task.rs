//! The task of one worker: it owns the socket and the process, and moves messages between them and
//! the pool, which decides.

use std::{
    future::{Future, poll_fn},
    io,
    net::Shutdown,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{FutureExt, StreamExt};
use nix::sys::socket::getsockopt;
use tokio::time::{Sleep, sleep_until};
use tracing::{debug, info, warn};

use super::{
    RetireCause, Shared, WorkerId, after,
    handover::Copies,
    last_messages::LastMessages,
    pool::ProcessState,
    process::Process,
    protocol::{DispatcherCodec, FromWorker, NewLink, Offer, ToWorker},
    sending::Sending,
    shared::lock,
    task_signal::TaskSignal,
    watch::watch,
};
use crate::{
    Error, SendFd, Socket,
    framed::{Outbound, ReadHalf, halves},
    handoff::{protocol::TolerantCodec, span::ConnectionId},
    sys,
};

/// The number of unsent bytes up to which messages are taken from the pool.
const ENOUGH_UNSENT: usize = 128 << 10;

/// The number of messages that are taken from the pool at a time.
const BATCH: usize = 64;

/// The time of a timer that is not needed.
const LATER: Duration = Duration::from_secs(3600);

pub(super) struct WorkerTask {
    shared: Arc<Shared>,
    id: WorkerId,
    signal: Arc<TaskSignal>,
    process: Process,
    read: ReadHalf<TolerantCodec>,
    outbound: Outbound,
    /// Messages that were received and that the pool has not got. An error stands for a message
    /// that could not be decoded.
    received: Vec<Result<FromWorker, Error>>,
    sending: Sending,
    /// WELCOME was queued.
    has_welcomed: bool,
    /// True if the worker is the dispatcher that replaces this one.
    is_successor: bool,
    /// The socket at whose other end the worker was asked to go on.
    next_link: Option<Socket>,
    /// The kernel has too few descriptors or too little memory to send.
    is_short: bool,
    has_warned: bool,
    /// True if the pool may have further messages for this worker.
    pool_has_more: bool,
    timer: Pin<Box<Sleep>>,
}

/// The end of a link.
enum End {
    /// The worker is retired.
    Retire(RetireCause),
    /// The worker goes on at another link to this dispatcher.
    Relink(Socket),
}

impl From<RetireCause> for End {
    fn from(cause: RetireCause) -> Self {
        Self::Retire(cause)
    }
}

/// Returns the cause for which a worker is retired when its link has failed.
fn cause_of(error: Error) -> RetireCause {
    // `PermissionDenied` usually means that the worker's socket takes no descriptors
    // (`SO_PASSRIGHTS`).
    let takes_no_fds = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match &error {
        Error::Io(io_error) if !takes_no_fds(io_error) => RetireCause::Ended,
        error if error.is_peer_gone() => RetireCause::Ended,
        error => RetireCause::Misbehaved(error.to_string()),
    }
}

impl WorkerTask {
    pub(super) fn new(shared: Arc<Shared>, id: WorkerId, socket: Socket, process: Process) -> Self {
        let hello_by = after(shared.config.hello_timeout);
        shared.with_pool(|pool| pool.connect(id, process.info(), hello_by, Instant::now()));
        Self::of_link(shared, id, socket, process)
    }

    /// Returns the task of the link to the dispatcher that replaces this one.
    pub(super) fn of_successor(shared: Arc<Shared>, id: WorkerId, socket: Socket) -> Self {
        let process = shared.processes().peer_of(&socket);
        Self { is_successor: true, ..Self::new(shared, id, socket, process) }
    }

    /// Returns the task of a link whose worker is in the pool.
    fn of_link(shared: Arc<Shared>, id: WorkerId, socket: Socket, process: Process) -> Self {
        let signal = Arc::new(TaskSignal::default());
        shared.add_signal(id, Arc::clone(&signal));
        let (read, outbound) = halves(socket.quiet(), TolerantCodec::default());
        Self {
            id,
            signal,
            process,
            read,
            outbound,
            received: Vec::new(),
            sending: Sending::default(),
            has_welcomed: false,
            is_successor: false,
            next_link: None,
            is_short: false,
            has_warned: false,
            pool_has_more: true,
            timer: Box::pin(sleep_until((Instant::now() + LATER).into())),
            shared,
        }
    }

    /// Serves the worker until it is gone.
    pub(super) async fn run(mut self) {
        loop {
            // A subscriber of `tracing` may panic. Messages that the worker has sent by then count
            // all the same.
            let end = AssertUnwindSafe(poll_fn(|cx| self.poll(cx))).catch_unwind().await;
            let panicked = |_| RetireCause::Misbehaved("its task has panicked".into()).into();
            match end.unwrap_or_else(panicked) {
                End::Retire(cause) => return self.retire(cause).await,
                End::Relink(socket) => self = self.relink(socket).await,
            }
        }
    }

    /// Receives, decides and sends, as long as there is anything to do. Ready when the link ends.
    ///
    /// It receives messages before it looks at the time. If this process was stopped for a while,
    /// the worker's answers wait in the socket.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let mut is_due = false;
        loop {
            // Receive the worker's messages, and notice the end of its link or its process. In that
            // case everything that it has written is in the socket by now. `retire` reads it.
            let mut end = self.receive(cx);
            if end.is_none() && self.process.poll_ended(cx).is_ready() {
                end = Some(RetireCause::Ended);
            }

            // Let the pool decide, if there is anything to decide.
            let is_news = self.signal.take(cx) || end.is_some() || !self.received.is_empty();
            if (is_news || is_due || self.pool_has_more)
                && let Err(cause) = self.exchange(end)
            {
                return Poll::Ready(cause.into());
            }

            // Send what the pool has decided.
            match self.outbound.poll_flush(cx) {
                Poll::Ready(Err(error)) => return Poll::Ready(cause_of(error).into()),
                Poll::Ready(Ok(())) => {
                    if let Some(socket) = self.next_link.take() {
                        return Poll::Ready(End::Relink(socket));
                    }
                }
                Poll::Pending => {}
            }
            if self.outbound.is_short() != self.is_short {
                self.is_short = !self.is_short;
                self.on_shortage();
            }

            // Go on if a timeout is due, or if there is more to send and room for it.
            is_due = self.timer.as_mut().poll(cx).is_ready();
            let has_room = self.outbound.unsent().bytes < ENOUGH_UNSENT;
            if !(is_due || self.pool_has_more && has_room) {
                return Poll::Pending;
            }
        }
    }

    /// Records whether sending has to wait for descriptors or memory of the kernel.
    fn on_shortage(&mut self) {
        if self.is_short {
            self.shared.with_pool(|pool| pool.totals.send_shortages += 1);
            if !std::mem::replace(&mut self.has_warned, true) {
                warn!(
                    worker = %self.id,
                    "offers wait: too many descriptors of this uid are in flight (ETOOMANYREFS)"
                );
            }
        }
    }

    /// Receives all messages that there are. Returns the cause if the link has ended.
    fn receive(&mut self, cx: &mut Context<'_>) -> Option<RetireCause> {
        loop {
            match self.read.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(message))) => self.received.push(message),
                Poll::Ready(Some(Err(error))) => return Some(cause_of(error)),
                Poll::Ready(None) => return Some(RetireCause::Ended),
                Poll::Pending => return None,
            }
        }
    }

    /// Gives received messages to the pool, and takes messages to send and the time of the next
    /// timeout.
    fn exchange(&mut self, end: Option<RetireCause>) -> Result<(), RetireCause> {
        let Self { shared, id, outbound, received, sending, timer, .. } = self;
        let is_successor = self.is_successor;
        let (id, now) = (*id, Instant::now());
        // A missing answer is not the worker's fault if the kernel has too little memory to send,
        // or if this process or its machine was stopped: then the timer goes off a whole ping
        // interval too late.
        let was_stopped = now > Instant::from(timer.deadline()) + shared.config.ping_interval;
        let was_able = !was_stopped && !outbound.waits_for_the_kernel();
        let unsent = sending.unsent(outbound.unsent().fds);
        let room = if outbound.unsent().bytes < ENOUGH_UNSENT { BATCH } else { 0 };
        let mut messages = Vec::new();
        let mut due = None;
        let outcome: Result<(), RetireCause> = shared.with_pool(|pool| {
            let mut outcome = Ok(());
            for message in received.drain(..) {
                match (&outcome, message) {
                    (Ok(()), Ok(message)) => outcome = pool.on_message(id, message, unsent, now),
                    (Ok(()), Err(error)) => outcome = Err(cause_of(error)),
                    (Err(_), Ok(message)) => pool.on_last_message(id, message, unsent, now),
                    (Err(_), Err(_)) => {}
                }
            }
            outcome.and(end.map_or(Ok(()), Err))?;
            pool.on_timeout(id, was_able, now)?;
            while messages.len() < room
                && let Some(message) = pool.next_message(id, now)
            {
                messages.push(message.map(|connection| {
                    if is_successor { connection.offer_to_successor() } else { connection.offer() }
                }));
            }
            due = pool.next_timeout(id);
            Ok(())
        });
        self.pool_has_more = room == 0 || messages.len() == room;
        messages.into_iter().try_for_each(|message| self.send(message))?;
        outcome?;
        self.set_timer(due.unwrap_or(now + LATER));
        Ok(())
    }

    /// Usually the time is later than before. Then the timer is left alone and goes off too early,
    /// which costs less than setting it each time.
    fn set_timer(&mut self, due: Instant) {
        if due < self.timer.deadline().into() || self.timer.is_elapsed() {
            self.timer.as_mut().reset(due.into());
        }
    }

    /// Queues a message without waiting for room: the number of offers is limited, and other
    /// messages are few.
    fn send(&mut self, message: ToWorker<Offer<SendFd>, ()>) -> Result<(), RetireCause> {
        let message = match message {
            ToWorker::Move(()) => match self.new_link()? {
                Some(link) => ToWorker::Move(link),
                None => return Ok(()),
            },
            other => other.map_both(|offer| offer, |()| unreachable!("handled above")),
        };
        match &message {
            ToWorker::Welcome { .. } => {
                self.has_welcomed = true;
                info!(worker = %self.id, pid = self.process.info().pid, "worker is ready");
            }
            ToWorker::Offer { number, offer } => {
                self.sending.add(1 + offer.bundle.len());
                let connection = ConnectionId(offer.cookie);
                debug!(worker = %self.id, number, %connection, "connection is offered");
            }
            ToWorker::Recall { before } => debug!(worker = %self.id, before, "offers are recalled"),
            // Once in a ping interval is often enough.
            ToWorker::Ping { .. } => self.close_ended(),
            ToWorker::Drain { .. } | ToWorker::Fenced => {}
            ToWorker::Move(_) => info!(worker = %self.id, "worker goes on at another link"),
        }
        self.outbound
            .accept(&mut DispatcherCodec::default(), message)
            .map_err(|refused| cause_of(refused.error))
    }

    /// Takes the new link of the worker. `None` if it was withdrawn meanwhile.
    fn new_link(&mut self) -> Result<Option<NewLink<SendFd>>, RetireCause> {
        let (theirs, ours) = lock(&self.shared.new_links).remove(self.id);
        let Some(socket) = theirs else { return Ok(None) };
        self.next_link = ours;
        self.process.release();
        let cookie = getsockopt(&socket, sys::Cookie).map_err(io::Error::from);
        let cookie = cookie.map_err(|error| cause_of(error.into()))?;
        Ok(Some(NewLink { cookie, socket: socket.into() }))
    }

    /// Closes the copies that the dispatcher has kept of connections that have ended.
    fn close_ended(&self) {
        let ended =
            self.shared.with_pool(|pool| pool.kept.take_ended(|connection| connection.has_ended()));
        let mut copies = Copies::new();
        ended.into_iter().for_each(|connection| copies.extend(connection.into_copies()));
        copies.close();
    }

    /// Sends FENCED to a worker that may live. It is not sent if earlier messages are unsent,
    /// because those would go out first, and may be offers.
    async fn report_fence(&mut self) {
        if self.outbound.unsent().bytes == 0 && self.send(ToWorker::Fenced).is_ok() {
            let _ = poll_fn(|cx| Poll::Ready(self.outbound.poll_flush(cx))).await;
        }
    }

    /// Ends the link, whatever the cause. The worker will never adopt the offers that it has not
    /// answered when it is fenced.
    async fn retire(mut self, cause: RetireCause) {
        // Fence the worker, and tell it if it may be alive.
        let last = self.fence().await;
        let has_received = self.outbound.is_all_received();
        if self.has_welcomed && !matches!(cause, RetireCause::Drained | RetireCause::Ended) {
            self.report_fence().await;
        }
        let Self { shared, id, mut process, outbound, has_welcomed, .. } = self;
        lock(&shared.new_links).remove(id); // dropping it shows the other dispatcher the end

        // Kill the process if it is at fault, or has sent no HELLO: such a process may not even
        // read its socket.
        let state = process.state(&cause, has_received);
        let is_at_fault =
            matches!(cause, RetireCause::Hung | RetireCause::Misbehaved(_) | RetireCause::Overdue);
        let lives = matches!(state, ProcessState::Lives { .. });
        let is_ours = shared.with_pool(|pool| pool.is_ours(id));
        if lives && is_ours && (is_at_fault || !has_welcomed) && shared.config.kill_hung {
            process.kill();
        }

        // Let the pool decide about the connections.
        drop(outbound); // from here on, only the pool has the descriptors of the offers
        let now = Instant::now();
        let must_report_end = shared.with_pool(|pool| {
            let unsent = last.apply_to(pool, id, now);
            pool.retire(id, &cause, unsent, state, now)
        });
        if lives {
            watch(process, &shared, is_ours, must_report_end);
        }
        shared.changed();
    }

    /// Ends a link whose worker goes on at another link to this dispatcher. It can adopt nothing
    /// more at this one.
    async fn relink(mut self, socket: Socket) -> Self {
        let last = self.fence().await;
        let Self { shared, id, mut process, outbound, .. } = self;
        drop(outbound); // from here on, only the pool has the descriptors of the offers
        let (now, hello_by) = (Instant::now(), after(shared.config.hello_timeout));
        shared.with_pool(|pool| {
            let unsent = last.apply_to(pool, id, now);
            pool.relink(id, unsent, hello_by, now);
        });
        process.take_back();
        Self::of_link(shared, id, socket, process)
    }

    /// Fences the worker: from now on it can write no answer. Reads the answers that it wrote
    /// before.
    async fn fence(&mut self) -> LastMessages {
        // An error means that the socket is shut down already.
        let _ = self.read.socket().shutdown(Shutdown::Read);
        let mut messages = Vec::from_iter(self.received.drain(..).filter_map(Result::ok));
        while let Some(Ok(message)) = self.read.next().await {
            messages.extend(message.ok());
        }
        let unsent = self.sending.unsent(self.outbound.unsent().fds);
        LastMessages::read_rest(messages, unsent, self.read.socket())
    }
}
