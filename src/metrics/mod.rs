//! The numbers of dispatchers, workers and servers that can be replaced, for the
//! [`metrics`](::metrics) facade (feature `metrics`).
//!
//! Install a recorder first, such as that of `metrics-exporter-prometheus`. Then update the numbers
//! as often as you like, for example before each scrape:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use std::time::Duration;
//!
//! use fdwire::{handoff::Dispatcher, metrics::DispatcherMetrics};
//!
//! let dispatcher = Dispatcher::builder().build();
//! let mut metrics = DispatcherMetrics::new("web");
//! tokio::spawn(async move {
//!     loop {
//!         metrics.update(&dispatcher.stats());
//!         tokio::time::sleep(Duration::from_secs(5)).await;
//!     }
//! });
//! # }
//! ```
//!
//! The example `prometheus` is a whole program.
//!
//! # The numbers
//!
//! The labels `dispatcher`, `incoming` and `server` have the names that you choose.
//!
#![doc = include_str!("numbers.md")]
//!
//! # Labels
//!
//! The number of series is limited if the number of your groups is limited. A worker that is
//! started again keeps its **slot**. A new worker, or one that connects again, gets the lowest free
//! slot of its group. So a group never has more slots than it had workers at the same time. The
//! default group has the label `group=""`. If a worker comes and goes between two updates, it
//! counts only in the numbers of the dispatcher.
//!
//! Make a new value for each dispatcher, and for each link of a worker that connects again. If it
//! has the same name as before, the counters go on from their values.

mod dispatcher;
mod incoming;
#[cfg(feature = "takeover")]
mod takeover;

use std::collections::HashMap;

use metrics::{
    Key, Label, Level, Metadata, Unit, describe_counter, describe_gauge, describe_histogram,
    with_recorder,
};

pub use dispatcher::{DispatcherMetrics, adoption_buckets};
pub use incoming::IncomingMetrics;
#[cfg(feature = "takeover")]
pub use takeover::TakeoverMetrics;

const METADATA: Metadata<'static> =
    Metadata::new("fdwire::metrics", Level::INFO, Some(module_path!()));

/// The rows of the table above: name, kind, unit, labels and meaning.
fn rows() -> impl Iterator<Item = [&'static str; 5]> {
    let rows = include_str!("numbers.md").lines().skip(2);
    rows.filter_map(|row| {
        let cells = row.trim_matches('|').split('|').map(|cell| cell.trim());
        Vec::from_iter(cells).try_into().ok()
    })
}

/// Describes the numbers with this prefix to the recorder.
fn describe(prefix: &str) {
    for [name, kind, unit, _, meaning] in rows().filter(|row| row[0][1..].starts_with(prefix)) {
        let name = name.trim_matches('`');
        let unit = if unit == "seconds" { Unit::Seconds } else { Unit::Count };
        match kind {
            "counter" => describe_counter!(name, unit, meaning),
            "gauge" => describe_gauge!(name, unit, meaning),
            _ => describe_histogram!(name, unit, meaning),
        }
    }
}

/// The series of one dispatcher, worker or server.
#[derive(Debug)]
struct Series {
    /// The label with the name that the application has chosen.
    name: Label,
    /// The value of each counter at the last update.
    counted: HashMap<Key, u64>,
}

impl Series {
    fn new(kind: &'static str, name: String) -> Self {
        Self { name: Label::new(kind, name), counted: HashMap::new() }
    }

    /// Returns the key of a series with further labels.
    fn key(&self, name: &'static str, more: &[Label]) -> Key {
        Key::from_parts(name, [std::slice::from_ref(&self.name), more].concat())
    }

    /// Increases a counter by the difference from the last update. It is not set to the total, so
    /// that it goes on when the next dispatcher or link counts from 0.
    fn count(&mut self, name: &'static str, more: &[Label], total: u64) {
        let key = self.key(name, more);
        let counter = with_recorder(|recorder| recorder.register_counter(&key, &METADATA));
        let before = self.counted.insert(key, total).unwrap_or(0);
        counter.increment(total.saturating_sub(before));
    }

    /// Sets a gauge.
    fn set(&self, name: &'static str, more: &[Label], value: f64) {
        let key = self.key(name, more);
        with_recorder(|recorder| recorder.register_gauge(&key, &METADATA)).set(value);
    }

    /// Records a value in a histogram this number of times.
    fn record(&self, name: &'static str, value: f64, times: u64) {
        let key = self.key(name, &[]);
        let histogram = with_recorder(|recorder| recorder.register_histogram(&key, &METADATA));
        histogram.record_many(value, usize::try_from(times).unwrap_or(usize::MAX));
    }

    /// Forgets the counters with these labels, because they are used for another worker from now
    /// on, which counts from 0.
    fn restart(&mut self, more: &[Label]) {
        self.counted.retain(|key, _| !key.labels().skip(1).eq(more));
    }
}
