//! The numbers of a dispatcher and of its workers.

use std::collections::{BTreeMap, BTreeSet};

use metrics::Label;

use super::{Series, describe};
use crate::handoff::{
    AdoptionTimes, Group, RetireCounts, Stats, WorkerId, WorkerState, WorkerStats,
};

/// Passes the [`Stats`] of a dispatcher to the recorder of its process: see the [module](super).
#[derive(Debug)]
pub struct DispatcherMetrics {
    series: Series,
    /// The adoption times at the last update.
    times: AdoptionTimes,
    /// The groups that existed at the last update.
    groups: BTreeSet<Group>,
    /// The worker in each occupied slot of a group. Slots are numbered from 1.
    slots: BTreeMap<(Group, u64), WorkerId>,
}

impl DispatcherMetrics {
    /// Describes the numbers to the recorder. `name` becomes the label `dispatcher`, which
    /// distinguishes this dispatcher from others of the process.
    pub fn new(name: impl Into<String>) -> Self {
        describe("fdwire_dispatcher_");
        describe("fdwire_group_");
        describe("fdwire_worker_");
        Self {
            series: Series::new("dispatcher", name.into()),
            times: AdoptionTimes::default(),
            groups: BTreeSet::new(),
            slots: BTreeMap::new(),
        }
    }

    /// Updates the recorder. All numbers have to come from the same dispatcher.
    pub fn update(&mut self, stats: &Stats) {
        for (name, total) in [
            // Totals since the dispatcher was made.
            ("fdwire_dispatcher_dispatched_connections_total", stats.dispatched),
            ("fdwire_dispatcher_adopted_connections_total", stats.adopted),
            ("fdwire_dispatcher_given_back_connections_total", stats.given_back),
            ("fdwire_dispatcher_lost_connections_total", stats.lost),
            ("fdwire_dispatcher_repeated_offers_total", stats.offered_again),
            ("fdwire_dispatcher_send_shortages_total", stats.send_shortages),
            ("fdwire_dispatcher_accept_pauses_total", stats.accept_pauses),
            ("fdwire_dispatcher_refused_workers_total", stats.refused_workers),
        ] {
            self.series.count(name, &[], total);
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
            self.series.count("fdwire_dispatcher_retired_workers_total", &[cause], total);
        }
        let wait = stats.slot_wait.unwrap_or_default().as_secs_f64();
        let pause = stats.accept_paused_for.unwrap_or_default().as_secs_f64();
        for (name, value) in [
            ("fdwire_dispatcher_waiting_connections", stats.waiting as f64),
            ("fdwire_dispatcher_slot_wait_seconds", wait),
            ("fdwire_dispatcher_accept_pause_seconds", pause),
            ("fdwire_dispatcher_in_flight_descriptors", stats.in_flight as f64),
            ("fdwire_dispatcher_leftover_processes", stats.leftover as f64),
        ] {
            self.series.set(name, &[], value);
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
            self.series.set("fdwire_dispatcher_workers", &[label], count as f64);
        }
        self.record_times(stats.adoption_times);
        self.update_groups(stats);
        self.update_workers(stats);
    }

    /// Records the new connections of each bucket, all with the longest time of the bucket.
    fn record_times(&mut self, times: AdoptionTimes) {
        let mut longest = 0.0;
        for (up_to, more) in times.since(&self.times).buckets() {
            // The last bucket has no longest time. Use twice that of the bucket before.
            longest = up_to.map_or(2.0 * longest, |up_to| up_to.as_secs_f64());
            if more > 0 {
                self.series.record("fdwire_dispatcher_adoption_seconds", longest, more);
            }
        }
        self.times = times;
    }

    /// Updates the numbers of each group. Those of groups that no longer exist become 0.
    fn update_groups(&mut self, stats: &Stats) {
        for group in &stats.groups {
            let wait = group.slot_wait.unwrap_or_default().as_secs_f64();
            self.set_group(&group.group, [group.workers as f64, group.waiting as f64, wait]);
        }
        let groups = stats.groups.iter().map(|group| group.group.clone()).collect();
        for gone in self.groups.difference(&groups) {
            self.set_group(gone, [0.0; 3]);
        }
        self.groups = groups;
    }

    fn set_group(&self, group: &Group, [workers, waiting, wait]: [f64; 3]) {
        let group = [label("group", group)];
        for (name, value) in [
            ("fdwire_group_workers", workers),
            ("fdwire_group_waiting_connections", waiting),
            ("fdwire_group_slot_wait_seconds", wait),
        ] {
            self.series.set(name, &group, value);
        }
    }

    /// Updates the numbers of each worker, by its slot.
    fn update_workers(&mut self, stats: &Stats) {
        // Workers that have left for good free their slots. Record their last numbers first.
        let Self { series, slots, .. } = self;
        slots.retain(|(group, slot), id| {
            if stats.workers.iter().any(|worker| worker.id == *id) {
                return true;
            }
            let labels = [label("group", group), label("slot", slot)];
            match stats.departed.iter().find(|worker| worker.id == *id) {
                Some(last) => update_worker(series, &labels, last),
                None => set_worker(series, &labels, [0; 3]),
            }
            series.restart(&labels);
            false
        });
        for worker in &stats.workers {
            let slot = self.slot_of(worker);
            let labels = [label("group", &worker.group), label("slot", slot)];
            update_worker(&mut self.series, &labels, worker);
        }
    }

    /// Returns the slot of a worker. A new worker gets the lowest free slot of its group.
    fn slot_of(&mut self, worker: &WorkerStats) -> u64 {
        let own = self.slots.iter().find(|(_, id)| **id == worker.id);
        if let Some(((_, slot), _)) = own {
            return *slot;
        }
        let mut key = (worker.group.clone(), 1);
        while self.slots.contains_key(&key) {
            key.1 += 1;
        }
        let slot = key.1;
        self.slots.insert(key, worker.id);
        slot
    }
}

fn update_worker(series: &mut Series, labels: &[Label], worker: &WorkerStats) {
    for (name, total) in [
        ("fdwire_worker_adopted_connections_total", worker.adopted),
        ("fdwire_worker_rejected_connections_total", worker.rejected),
        ("fdwire_worker_restarts_total", worker.restarts),
    ] {
        series.count(name, labels, total);
    }
    set_worker(series, labels, [worker.active, worker.unanswered, worker.credit]);
}

fn set_worker(series: &Series, labels: &[Label], [active, unanswered, credit]: [u64; 3]) {
    for (name, value) in [
        ("fdwire_worker_active_connections", active),
        ("fdwire_worker_unanswered_offers", unanswered),
        ("fdwire_worker_credit_offers", credit),
    ] {
        series.set(name, labels, value as f64);
    }
}

fn label(name: &'static str, value: impl ToString) -> Label {
    Label::new(name, value.to_string())
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
