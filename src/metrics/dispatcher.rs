//! The numbers of a dispatcher and of its workers.

use metrics::Label;

use super::{Series, describe};
use crate::handoff::{AdoptionTimes, RetireCounts, Stats, WorkerId, WorkerState, WorkerStats};

/// Gives the [`Stats`] of a dispatcher to the recorder: see the [module](super).
#[derive(Debug)]
pub struct DispatcherMetrics {
    series: Series,
    times: AdoptionTimes,
    /// The worker of each slot, from 1 on.
    slots: Vec<Option<WorkerId>>,
}

impl DispatcherMetrics {
    /// Describes the numbers to the recorder. `name` becomes the label `dispatcher`, and tells this
    /// dispatcher from others of the process.
    pub fn new(name: impl Into<String>) -> Self {
        describe("fdwire_dispatcher_");
        describe("fdwire_worker_");
        Self {
            series: Series::new("dispatcher", name.into()),
            times: AdoptionTimes::default(),
            slots: Vec::new(),
        }
    }

    /// Brings the recorder up to date. The numbers are those of one and the same dispatcher.
    pub fn update(&mut self, stats: &Stats) {
        for (name, total) in [
            ("fdwire_dispatcher_dispatched_connections_total", stats.dispatched),
            ("fdwire_dispatcher_adopted_connections_total", stats.adopted),
            ("fdwire_dispatcher_given_back_connections_total", stats.given_back),
            ("fdwire_dispatcher_lost_connections_total", stats.lost),
            ("fdwire_dispatcher_repeated_offers_total", stats.offered_again),
            ("fdwire_dispatcher_send_shortages_total", stats.send_shortages),
            ("fdwire_dispatcher_refused_workers_total", stats.refused_workers),
        ] {
            self.series.count(name, None, total);
        }
        let RetireCounts { ended, hung, misbehaved, drained, overdue } = stats.retired;
        for (cause, total) in [
            ("ended", ended),
            ("hung", hung),
            ("misbehaved", misbehaved),
            ("drained", drained),
            ("overdue", overdue),
        ] {
            let cause = Label::from_static_parts("cause", cause);
            self.series.count("fdwire_dispatcher_retired_workers_total", Some(&cause), total);
        }
        let wait = stats.waits_for_place.unwrap_or_default().as_secs_f64();
        for (name, value) in [
            ("fdwire_dispatcher_waiting_connections", stats.waiting as f64),
            ("fdwire_dispatcher_place_wait_seconds", wait),
            ("fdwire_dispatcher_in_flight_descriptors", stats.in_flight as f64),
            ("fdwire_dispatcher_leftover_processes", stats.leftover as f64),
        ] {
            self.series.set(name, None, value);
        }
        for (label, state) in [
            ("starting", WorkerState::Starting),
            ("ready", WorkerState::Ready),
            ("silent", WorkerState::Silent),
            ("draining", WorkerState::Draining),
            ("restarting", WorkerState::Restarting),
        ] {
            let count = stats.workers.iter().filter(|worker| worker.state == state).count();
            let label = Label::from_static_parts("state", label);
            self.series.set("fdwire_dispatcher_workers", Some(&label), count as f64);
        }
        self.record_times(stats.adoption_times);
        self.update_workers(stats);
    }

    /// Records each bucket's connections with the longest time that belongs to it.
    fn record_times(&mut self, times: AdoptionTimes) {
        let mut longest = 0.0;
        for (up_to, more) in times.since(&self.times).buckets() {
            // The last bucket has no longest time: then it is twice that of the one before.
            longest = up_to.map_or(2.0 * longest, |up_to| up_to.as_secs_f64());
            if more > 0 {
                self.series.record("fdwire_dispatcher_adoption_seconds", longest, more);
            }
        }
        self.times = times;
    }

    fn update_workers(&mut self, stats: &Stats) {
        // Those that have left for good free their slots, with their last numbers.
        for slot in 0..self.slots.len() {
            let Some(id) = self.slots[slot] else { continue };
            if stats.workers.iter().all(|worker| worker.id != id) {
                let label = label(slot);
                match stats.departed.iter().find(|worker| worker.id == id) {
                    Some(last) => self.update_worker(&label, last),
                    None => self.set_worker(&label, [0; 3]),
                }
                self.series.restart(&label);
                self.slots[slot] = None;
            }
        }
        for worker in &stats.workers {
            let slot = self.slot_of(worker.id);
            self.update_worker(&label(slot), worker);
        }
    }

    /// Its own slot, or the lowest one that is free.
    fn slot_of(&mut self, id: WorkerId) -> usize {
        let own = self.slots.iter().position(|slot| *slot == Some(id));
        let free = || self.slots.iter().position(Option::is_none);
        let slot = own.or_else(free).unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(id);
        slot
    }

    fn update_worker(&mut self, slot: &Label, worker: &WorkerStats) {
        for (name, total) in [
            ("fdwire_worker_adopted_connections_total", worker.adopted),
            ("fdwire_worker_rejected_connections_total", worker.rejected),
            ("fdwire_worker_restarts_total", worker.restarts),
        ] {
            self.series.count(name, Some(slot), total);
        }
        self.set_worker(slot, [worker.active, worker.unanswered, worker.room]);
    }

    fn set_worker(&self, slot: &Label, [active, unanswered, room]: [u64; 3]) {
        for (name, value) in [
            ("fdwire_worker_active_connections", active),
            ("fdwire_worker_unanswered_offers", unanswered),
            ("fdwire_worker_room_offers", room),
        ] {
            self.series.set(name, Some(slot), value as f64);
        }
    }
}

fn label(slot: usize) -> Label {
    Label::new("slot", (slot + 1).to_string())
}

/// Returns the upper bounds, in seconds, of the buckets that a dispatcher counts
/// [adoption times](AdoptionTimes) in. An exporter with the same buckets loses nothing.
///
/// ```
/// let buckets = fdwire::metrics::adoption_buckets();
/// assert_eq!((buckets[0], buckets.len()), (0.000_064, 21));
/// ```
pub fn adoption_buckets() -> Vec<f64> {
    let buckets = AdoptionTimes::default();
    buckets.buckets().filter_map(|(up_to, _)| Some(up_to?.as_secs_f64())).collect()
}
