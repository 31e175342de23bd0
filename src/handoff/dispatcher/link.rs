//! One worker: a task that owns its socket and the account of its offers. Whatever ends it, [`Link::run`] does so in one way.

mod time;

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    io,
    net::Shutdown,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::StreamExt;
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::{debug, info, warn};

use time::{Ping, Recall};

use super::{
    Cause, Shared, WorkerId, WorkerState,
    bell::Bell,
    job::{Job, LinkId, close},
    ledger::{Ledger, Violation},
    pool::Heard,
    process::Process,
    protocol::{DispatcherCodec, FromWorker, ToWorker, VERSION},
};
use crate::{
    Error, ReadHalf, SendFd, Socket,
    framed::{Outbound, halves},
};

impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        match error {
            // It refuses descriptors.
            Error::Io(error) if error.kind() != io::ErrorKind::PermissionDenied => Self::Ended,
            error if error.is_peer_gone() => Self::Ended,
            error => Self::Misbehaved(error.to_string()),
        }
    }
}

impl From<Violation> for Cause {
    fn from(violation: Violation) -> Self {
        Self::Misbehaved(violation.to_string())
    }
}

/// Bytes that wait for the socket, from which on no more offers are made.
const ENOUGH_UNSENT: usize = 128 << 10;

/// Offers made between two looks at the pool.
const BATCH: usize = 64;

/// For a timer that has nothing to do.
const LATER: Duration = Duration::from_secs(3600);

pub(super) struct Link {
    shared: Arc<Shared>,
    id: WorkerId,
    number: LinkId,
    bell: Arc<Bell>,
    process: Process,
    read: ReadHalf<DispatcherCodec>,
    outbound: Outbound,
    ledger: Ledger<Job>,
    heard: Heard,
    greeted: bool,
    goodbye: bool,
    /// The pool may have more for this worker.
    more: bool,
    /// Taken from the pool and not sent.
    unsent: VecDeque<Job>,
    ping: Ping,
    recall: Recall,
    /// The last time when nothing could be said or heard through no fault of the worker: this process was stopped, or its
    /// machine, or the kernel had too little to send with.
    able_since: Instant,
    /// Told to drain, until when.
    drain: Option<Option<Instant>>,
    timer: Pin<Box<Sleep>>,
}

/// What is left of a worker whose link has ended.
pub(super) struct Ended {
    /// It was of use.
    pub(super) has_adopted: bool,
}

impl Link {
    pub(super) fn new(shared: Arc<Shared>, id: WorkerId, socket: Socket, process: Process) -> Self {
        let bell = Arc::new(Bell::default());
        let number = shared.lock().connected(id, process.pid(), Arc::clone(&bell));
        let (read, outbound) = halves(socket.quiet(), DispatcherCodec::default());
        let now = Instant::now();
        bell.ring(); // it may have been removed already
        Self {
            id,
            number,
            bell,
            process,
            read,
            outbound,
            ledger: Ledger::new(),
            heard: Heard::default(),
            greeted: false,
            goodbye: false,
            more: false,
            unsent: VecDeque::new(),
            ping: Ping { nonce: 0, unanswered: None, due: now, late: false, not_before: now },
            recall: Recall { before: 0, at: now },
            able_since: now,
            drain: None,
            timer: Box::pin(sleep_until(now + LATER)),
            shared,
        }
    }

    /// Serves the worker until it is gone.
    pub(super) async fn run(mut self) -> Ended {
        let cause = poll_fn(|cx| self.poll(cx)).await;
        self.retire(cause).await
    }

    /// The one way out, whatever the cause. After the cut the worker can write no answer, and those that it wrote before are
    /// here to be read: what is unanswered then, it will never adopt.
    async fn retire(mut self, cause: Cause) -> Ended {
        let _ = self.read.socket().shutdown(Shutdown::Read); // an error says that there is nothing left to cut
        while let Some(Ok(message)) = self.read.next().await
            && self.hear(message).is_ok()
        {}
        self.enter();
        let Self { shared, id, number, mut process, mut ledger, mut unsent, outbound, greeted, .. } = self;
        // Each offer has one descriptor: the last ones, of which none has left, the worker has never had.
        for mut job in ledger.take_back(outbound.unsent().1) {
            job.offers -= 1;
            unsent.push_front(job);
        }
        drop(outbound);
        let pid = process.pid();
        match cause {
            Cause::Drained => info!(worker = %id, pid, "worker has drained"),
            _ => warn!(worker = %id, pid, %cause, unanswered = ledger.unanswered(), "worker is gone"),
        }
        let has_adopted = ledger.has_adopted();
        // Where nothing tells of its process, the end of its socket is taken for the end of the process.
        let ended = process.has_ended() || cause == Cause::Ended && !process.is_known();
        // A process that has not said hello may not even look at its socket.
        let cut_off = matches!(cause, Cause::Hung | Cause::Misbehaved(_) | Cause::Overdue) || !greeted;
        if cut_off && !ended && shared.config.kill_hung {
            process.kill();
        }
        let may_hold_copies = !ended && ledger.unanswered() > 0;
        let end_matters = {
            let mut pool = shared.lock();
            pool.retired(id, &cause, ledger.retire(), unsent, may_hold_copies);
            if ended {
                pool.copies.process_ended(number);
            }
            may_hold_copies || pool.copies.are_kept_for(number)
        };
        if !ended {
            process.watch(&shared, number, end_matters);
        }
        shared.changed();
        Ended { has_adopted }
    }

    /// Everything that there is to do. Ready when the worker has to go.
    ///
    /// What was received is looked at before the time: where this process was not running, answers wait in the socket.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        loop {
            if let Err(cause) = self.read(cx) {
                return Poll::Ready(cause);
            }
            // What it has written is in the socket by now: the retiring reads it.
            if self.process.poll_ended(cx).is_ready() {
                return Poll::Ready(Cause::Ended);
            }
            if let Err(cause) = self.keep_time() {
                return Poll::Ready(cause);
            }
            if self.bell.was_rung(cx)
                && let Err(cause) = self.obey()
            {
                return Poll::Ready(cause);
            }
            if let Err(cause) = self.write(cx) {
                return Poll::Ready(cause);
            }
            // Mostly there is more time than before. Then it goes off too early, which costs less than setting it each time.
            let due = self.due();
            if due < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Hears what the worker has said, and enters it into the pool.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), Cause> {
        let mut heard = false;
        let outcome = loop {
            match self.read.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    heard = true;
                    if let Err(cause) = self.hear(message) {
                        break Err(cause);
                    }
                }
                Poll::Ready(Some(Err(error))) => break Err(error.into()),
                Poll::Ready(None) => break Err(if self.goodbye { Cause::Drained } else { Cause::Ended }),
                Poll::Pending if self.goodbye => break Err(Cause::Drained),
                Poll::Pending => break Ok(()),
            }
        };
        if heard {
            self.enter();
            self.is_alive();
        }
        outcome
    }

    fn hear(&mut self, message: FromWorker) -> Result<(), Cause> {
        if self.goodbye {
            return Err(misbehaved("it spoke after its goodbye"));
        }
        let (_, unsent) = self.outbound.unsent(); // each offer has one descriptor
        match message {
            FromWorker::Hello { lowest, highest } => {
                if self.greeted {
                    return Err(misbehaved("a second hello"));
                }
                if !(lowest..=highest).contains(&VERSION) {
                    return Err(misbehaved(format!("it speaks versions {lowest} to {highest}, not {VERSION}")));
                }
                self.greeted = true;
                self.say(ToWorker::Welcome { version: VERSION })?;
                self.shared.lock().set_state(self.id, WorkerState::Ready);
                info!(worker = %self.id, pid = self.process.pid(), "worker is ready");
            }
            _ if !self.greeted => return Err(misbehaved("its first message is not a hello")),
            FromWorker::Demand { total } => {
                self.ledger.demand(total)?;
                self.heard.demand = Some(total);
            }
            FromWorker::Adopted { count } => self.heard.adopted.extend(self.ledger.adopted(count, unsent)?),
            FromWorker::Rejected { count, reason } => {
                self.heard.rejected.extend(self.ledger.rejected(count, unsent)?.map(|job| (job, reason)));
                if reason.is_refusal() {
                    self.ledger.refused();
                    self.heard.demand = Some(0);
                    self.heard.has_refused = true;
                    self.heard.unsent.append(&mut self.unsent);
                }
            }
            FromWorker::Load { finished } => {
                self.ledger.finished(finished)?;
                self.heard.finished = Some(finished);
            }
            FromWorker::Pong { nonce } if nonce == self.ping.nonce => self.ping.unanswered = None,
            FromWorker::Pong { nonce } => {
                return Err(misbehaved(format!("it answered ping {nonce}, which was not the last")));
            }
            FromWorker::Draining => self.heard.draining = true,
            FromWorker::Goodbye => self.goodbye = true,
        }
        Ok(())
    }

    /// Enters into the pool what was heard, then tells those who wait for it.
    fn enter(&mut self) {
        let closed = {
            let mut pool = self.shared.lock();
            pool.heard(self.id, &mut self.heard);
            pool.closed
        };
        for mut job in self.heard.adopted.drain(..) {
            let holders = std::mem::take(&mut job.holders);
            let socket = job.adopted_by(self.id);
            match holders.is_empty() {
                true => close(socket),
                false => self.shared.lock().copies.keep(socket, self.number, holders),
            }
        }
        if closed {
            self.shared.changed(); // somebody may wait for the last one
        }
    }

    fn is_alive(&mut self) {
        if let Some(since) = &mut self.ping.unanswered {
            *since = Instant::now();
        }
        if std::mem::take(&mut self.ping.late) {
            self.shared.lock().set_state(self.id, WorkerState::Ready);
        }
    }

    /// Does what the pool wants.
    fn obey(&mut self) -> Result<(), Cause> {
        self.more = true;
        let removed = self.shared.lock().workers.get(&self.id).and_then(|worker| worker.removed);
        let Some(until) = removed.filter(|_| removed != self.drain) else { return Ok(()) };
        if !self.greeted {
            return Err(Cause::Drained); // it has nothing, and the end of its socket tells it
        }
        self.drain = removed;
        self.say(ToWorker::Drain { within: until.map(|until| until.saturating_duration_since(Instant::now())) })
    }

    /// Makes offers, and sends what waits as far as the socket takes it.
    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Cause> {
        loop {
            self.make_offers()?;
            if self.outbound.unsent().0 == 0 {
                return Ok(());
            }
            match self.outbound.poll_flush(cx) {
                Poll::Ready(outcome) => outcome?,
                Poll::Pending => return Ok(()),
            }
        }
    }

    fn make_offers(&mut self) -> Result<(), Cause> {
        while self.outbound.unsent().0 < ENOUGH_UNSENT {
            let Some(mut job) = self.unsent.pop_front() else {
                if !self.more {
                    break;
                }
                self.shared.lock().take_assigned(self.id, BATCH, &mut self.unsent);
                self.more = self.unsent.len() == BATCH;
                continue;
            };
            if let Err(cause) = self.say(ToWorker::Offer(job.offer())) {
                self.unsent.push_front(job);
                return Err(cause);
            }
            debug!(worker = %self.id, "a connection is offered");
            self.heard.offered_again += u64::from(job.offers > 0);
            job.offers += 1;
            job.offered_at = Some(Instant::now());
            self.ledger.offer(job);
        }
        Ok(())
    }

    /// Queues a message. Room is not waited for: offers are bounded by their number, and the other messages are few.
    fn say(&mut self, message: ToWorker<SendFd>) -> Result<(), Cause> {
        self.outbound.accept(&mut DispatcherCodec::default(), message).map_err(|refused| refused.error.into())
    }
}

fn misbehaved(how: impl Into<String>) -> Cause {
    Cause::Misbehaved(how.into())
}
