//! The messages to and from a worker.

use std::time::Instant;

use super::{Event, Pending, Pool, RetireCause, WorkerId};
use crate::handoff::protocol::{FromWorker, RejectReason, ToWorker};

impl<C> Pool<C> {
    /// Returns the next message for a worker. Messages have to be sent in this order. After `None`,
    /// an [`Event::Wake`] reports the next one.
    pub(in crate::handoff::dispatcher) fn next_message(
        &mut self,
        id: WorkerId,
        now: Instant,
    ) -> Option<ToWorker<&C, ()>> {
        let next = self.workers.get_mut(&id)?.account.as_mut()?.next_message(now)?;
        self.totals.offered_again += u64::from(next.is_repeated);
        Some(next.message)
    }

    /// Processes a message from a worker. The last `unsent` of its offers were taken with
    /// [`next_message`](Self::next_message), and not sent to it.
    ///
    /// # Errors
    /// Returns the cause if the worker has to be retired.
    pub(in crate::handoff::dispatcher) fn on_message(
        &mut self,
        id: WorkerId,
        message: FromWorker,
        unsent: usize,
        now: Instant,
    ) -> Result<(), RetireCause> {
        let Some(worker) = self.workers.get_mut(&id) else { return Ok(()) };
        let Some(account) = &mut worker.account else { return Ok(()) };
        account.timeouts.on_received(now);
        match message {
            FromWorker::Hello { lowest, highest, max_fds, open } => {
                account.on_hello((lowest, highest), max_fds, open, now)?;
                // Catch up on what has happened while the process started. Nothing is planned
                // before HELLO, so no connection comes back here.
                let has_other_successor = self.successor.is_some_and(|successor| successor != id);
                if has_other_successor && worker.removed.is_none() {
                    account.hand_on(now);
                }
                if let Some(drain) = worker.removed {
                    account.drain();
                    account.send_drain(drain, now);
                }
                if let Some(replacement) = worker.replacement {
                    self.on_new_ready(replacement, now);
                }
            }
            _ if !account.timeouts.is_greeted() => {
                return Err(RetireCause::Misbehaved("its first message is not a hello".into()));
            }
            FromWorker::Adopted { first, count } => {
                let adopted = account.on_adopted(first, count, unsent)?;
                self.hand_out_adopted(id, adopted, now);
            }
            FromWorker::Rejected { first, count, reason } => {
                let rejected = account.on_rejected(first, count, unsent)?;
                // After a refusal, others get what was planned for this worker.
                let planned =
                    if reason.is_refusal() { account.on_refusal(now) } else { Vec::new() };
                self.put_back_rejected(id, rejected, reason, planned);
            }
            FromWorker::Draining => {
                let planned = account.drain();
                self.put_back(planned);
            }
            FromWorker::Goodbye => return Err(RetireCause::Drained),
            FromWorker::Demand { total } => account.on_demand(total)?,
            FromWorker::Load { finished } => account.on_load(finished)?,
            FromWorker::Pong { nonce } => account.on_pong(nonce)?,
        }
        self.distribute(now);
        Ok(())
    }

    /// Processes a message that a worker had sent before it was fenced. Every complete answer
    /// counts, even if the worker has broken the protocol.
    pub(in crate::handoff::dispatcher) fn on_last_message(
        &mut self,
        id: WorkerId,
        message: FromWorker,
        unsent: usize,
        now: Instant,
    ) {
        let Some(account) = self.account(id) else { return };
        match message {
            FromWorker::Adopted { first, count } => {
                let adopted = account.on_last_adopted(first, count, unsent);
                self.hand_out_adopted(id, adopted, now);
            }
            FromWorker::Rejected { first, count, reason } => {
                let rejected = account.take_last_answered(first, count, unsent);
                self.put_back_rejected(id, rejected, reason, Vec::new());
            }
            _ => {}
        }
    }

    /// Counts everything that was sent to a worker as adopted, because the messages that it had
    /// sent before it was fenced cannot be read. No other worker gets these connections.
    pub(in crate::handoff::dispatcher) fn on_unreadable(
        &mut self,
        id: WorkerId,
        unsent: usize,
        now: Instant,
    ) {
        let Some(account) = self.account(id) else { return };
        let adopted = account.adopt_all(unsent);
        self.hand_out_adopted(id, adopted, now);
    }

    /// Hands adopted connections out in events.
    fn hand_out_adopted(
        &mut self,
        id: WorkerId,
        adopted: impl IntoIterator<Item = Pending<C>>,
        now: Instant,
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(account) = &worker.account else { return };
        let process = account.process.id;
        for Pending { connection, since, holders, .. } in adopted {
            worker.adopted += 1;
            self.totals.adopted += 1;
            self.totals.adoption_times.record(now.saturating_duration_since(since));
            self.events.push(Event::Adopted { connection, worker: id, process, holders });
        }
    }

    /// Puts rejected connections back into the queue, together with those that were planned.
    fn put_back_rejected(
        &mut self,
        id: WorkerId,
        rejected: Vec<Pending<C>>,
        reason: RejectReason,
        planned: Vec<Pending<C>>,
    ) {
        let mut again = rejected;
        again.iter_mut().for_each(|pending| pending.on_rejected(id, reason));
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.rejected += again.len() as u64;
        }
        again.extend(planned);
        self.put_back(again);
    }
}
