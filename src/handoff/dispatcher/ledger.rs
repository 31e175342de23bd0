//! What one worker was offered and has not answered: **sans-IO**, generic over what stands for a connection.

use std::collections::VecDeque;

/// The account of one worker.
///
/// Invariants: `offered <= demand` (kept by whoever offers), `finished <= adopted`, and
/// `adopted + rejected + unanswered.len() == offered`. A connection is in it from [`offer`](Self::offer) until it comes out by
/// exactly one of [`adopted`](Self::adopted), [`rejected`](Self::rejected), [`take_back`](Self::take_back) and
/// [`retire`](Self::retire).
#[derive(Debug)]
pub(super) struct Ledger<C> {
    /// Oldest first: answers come in this order.
    unanswered: VecDeque<C>,
    offered: u64,
    demand: u64,
    adopted: u64,
    finished: u64,
}

/// An answer that does not fit what was offered: the worker cannot be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("it answered {answered} offers, {unanswered} were unanswered")]
    NotOffered { answered: u32, unanswered: usize },
    #[error("its demand fell from {from} to {to}")]
    DemandFell { from: u64, to: u64 },
    #[error("its finished connections fell from {from} to {to}")]
    FinishedFell { from: u64, to: u64 },
    #[error("it finished {finished} connections and adopted {adopted}")]
    FinishedMoreThanAdopted { finished: u64, adopted: u64 },
}

impl<C> Ledger<C> {
    pub(super) fn new() -> Self {
        Self { unanswered: VecDeque::new(), offered: 0, demand: 0, adopted: 0, finished: 0 }
    }

    /// Notes an offer. Offers are numbered from 0: returns its number.
    pub(super) fn offer(&mut self, connection: C) -> u64 {
        self.unanswered.push_back(connection);
        self.offered += 1;
        self.offered - 1
    }

    /// Number of the next offer.
    pub(super) fn next_number(&self) -> u64 {
        self.offered
    }

    /// The offer whose answer is due first, with its number.
    pub(super) fn oldest(&self) -> Option<(u64, &C)> {
        self.unanswered.front().map(|connection| (self.offered - self.unanswered.len() as u64, connection))
    }

    /// The next answers are "mine". Those connections are the worker's. The last `unsent` offers are still here, and it cannot
    /// have seen them.
    pub(super) fn adopted(&mut self, count: u32, unsent: usize) -> Result<impl Iterator<Item = C> + '_, Violation> {
        let adopted = self.adopted + u64::from(count);
        let answered = Self::answered(&mut self.unanswered, count, unsent)?;
        self.adopted = adopted;
        Ok(answered)
    }

    /// The next answers are "not mine".
    pub(super) fn rejected(&mut self, count: u32, unsent: usize) -> Result<impl Iterator<Item = C> + '_, Violation> {
        Self::answered(&mut self.unanswered, count, unsent)
    }

    fn answered(
        unanswered: &mut VecDeque<C>,
        count: u32,
        unsent: usize,
    ) -> Result<std::collections::vec_deque::Drain<'_, C>, Violation> {
        let sent = unanswered.len().saturating_sub(unsent);
        match usize::try_from(count) {
            Ok(count) if count <= sent => Ok(unanswered.drain(..count)),
            _ => Err(Violation::NotOffered { answered: count, unanswered: sent }),
        }
    }

    /// Offers that the worker takes in all.
    pub(super) fn demand(&mut self, total: u64) -> Result<(), Violation> {
        if total < self.demand {
            return Err(Violation::DemandFell { from: self.demand, to: total });
        }
        self.demand = total;
        Ok(())
    }

    /// It has no room or no time: what it has asked for and was not offered is void.
    pub(super) fn refused(&mut self) {
        self.demand = self.offered;
    }

    /// Adopted connections that have ended in all.
    pub(super) fn finished(&mut self, total: u64) -> Result<(), Violation> {
        if total < self.finished {
            return Err(Violation::FinishedFell { from: self.finished, to: total });
        }
        if total > self.adopted {
            return Err(Violation::FinishedMoreThanAdopted { finished: total, adopted: self.adopted });
        }
        self.finished = total;
        Ok(())
    }

    pub(super) fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    pub(super) fn has_adopted(&self) -> bool {
        self.adopted > 0
    }

    /// The last `count` offers, the last one first: they were not made after all.
    pub(super) fn take_back(&mut self, count: usize) -> impl Iterator<Item = C> + '_ {
        let first = self.unanswered.len().saturating_sub(count);
        self.offered -= (self.unanswered.len() - first) as u64;
        self.unanswered.drain(first..).rev()
    }

    /// The worker answers no more: what is left belongs to nobody.
    pub(super) fn retire(self) -> impl Iterator<Item = C> {
        self.unanswered.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        Decoder, Encoder, FdQueue, SendBuf,
        handoff::protocol::{DispatcherCodec, FromWorker, RejectReason, WorkerCodec},
    };

    /// What a worker does with so many of the offers that it has read.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Offer(u32),
        Adopt(u32),
        Reject(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..5u32).prop_map(Step::Offer),
            (0..4u32).prop_map(Step::Adopt),
            (0..3u32).prop_map(Step::Reject),
        ];
        vec(step, 0..60)
    }

    fn encode(bytes: &mut BytesMut, message: FromWorker) {
        let mut buf = SendBuf::<u32>::new();
        WorkerCodec::default().encode(message, &mut buf).unwrap();
        bytes.extend_from_slice(&buf.into_parts().0);
    }

    proptest! {
        /// A worker may die after any byte of its answers, and they may come in any pieces. What it can have given to its
        /// application is what it has answered for in full.
        #[test]
        fn each_connection_is_adopted_once_or_comes_back(
            steps in steps(),
            cut in 0.0..=1.0f64,
            pieces in vec(1..20usize, 1..50),
        ) {
            let mut ledger = Ledger::new();
            let (mut answers, mut read) = (BytesMut::new(), VecDeque::new());
            // Where each run of adopted connections is answered for in full, and what was adopted.
            let mut adopted_at = Vec::new();
            let mut serial = 0u32;
            for step in steps {
                match step {
                    Step::Offer(count) => for _ in 0..count {
                        prop_assert_eq!(ledger.offer(serial), u64::from(serial));
                        read.push_back(serial);
                        serial += 1;
                    },
                    Step::Adopt(count) => {
                        let count = count.min(read.len() as u32);
                        encode(&mut answers, FromWorker::Adopted { count });
                        adopted_at.push((answers.len(), Vec::from_iter(read.drain(..count as usize))));
                    }
                    Step::Reject(count) => {
                        let count = count.min(read.len() as u32);
                        encode(&mut answers, FromWorker::Rejected { count, reason: RejectReason::Full });
                        read.drain(..count as usize);
                    }
                }
            }
            let cut = (answers.len() as f64 * cut) as usize;
            let mut arriving = answers.split_to(cut);

            let (mut adopted, mut back) = (Vec::new(), Vec::new());
            let mut received = BytesMut::new();
            let mut pieces = pieces.iter().cycle();
            while !arriving.is_empty() {
                let piece = *pieces.next().unwrap();
                received.extend_from_slice(&arriving.split_to(piece.min(arriving.len())));
                while let Some(answer) = DispatcherCodec::default().decode(&mut received, &mut FdQueue::<u32>::new()).unwrap() {
                    match answer {
                        FromWorker::Adopted { count } => adopted.extend(ledger.adopted(count, 0).unwrap()),
                        FromWorker::Rejected { count, .. } => back.extend(ledger.rejected(count, 0).unwrap()),
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            back.extend(ledger.retire());

            let answered_for = adopted_at.into_iter().filter(|(end, _)| *end <= cut).flat_map(|(_, run)| run);
            prop_assert_eq!(&adopted, &Vec::from_iter(answered_for));
            let mut all = [adopted, back].concat();
            all.sort_unstable();
            prop_assert_eq!(all, Vec::from_iter(0..serial));
        }

        /// Whatever a worker says, a connection comes out of the ledger once.
        #[test]
        fn a_liar_is_found_out_and_nothing_is_lost(
            claims in vec((0..4u8, 0..6u32, 0..3usize), 0..60),
        ) {
            let mut ledger = Ledger::new();
            let (mut serial, mut out) = (0, Vec::new());
            for (kind, count, unsent) in claims {
                let unanswered = ledger.unanswered().saturating_sub(unsent);
                let fits = count as usize <= unanswered;
                match kind {
                    0 => for _ in 0..count {
                        ledger.offer(serial);
                        serial += 1;
                    },
                    1 => match ledger.adopted(count, unsent) {
                        Ok(adopted) => { prop_assert!(fits); out.extend(adopted); }
                        Err(violation) => prop_assert_eq!(violation, Violation::NotOffered { answered: count, unanswered }),
                    },
                    2 => match ledger.rejected(count, unsent) {
                        Ok(rejected) => { prop_assert!(fits); out.extend(rejected); }
                        Err(_) => prop_assert!(!fits),
                    },
                    _ => {
                        let total = u64::from(count);
                        let fits = (ledger.finished..=ledger.adopted).contains(&total);
                        prop_assert_eq!(ledger.finished(total).is_ok(), fits);
                    }
                }
                prop_assert_eq!(ledger.oldest().map(|(number, _)| number), (ledger.unanswered() > 0).then_some(out.len() as u64));
            }
            out.extend(ledger.retire());
            prop_assert_eq!(out, Vec::from_iter(0..serial));
        }
    }

    #[test]
    fn totals_fall_only_after_a_refusal() {
        let mut ledger = Ledger::<()>::new();
        ledger.demand(5).unwrap();
        ledger.demand(5).unwrap();
        assert_eq!(ledger.demand(4), Err(Violation::DemandFell { from: 5, to: 4 }));
        ledger.offer(());
        ledger.refused();
        assert_eq!(ledger.demand(0), Err(Violation::DemandFell { from: 1, to: 0 }));
        ledger.demand(1).unwrap();
        assert_eq!(ledger.finished(1), Err(Violation::FinishedMoreThanAdopted { finished: 1, adopted: 0 }));
    }
}
