//! The numbers of a dispatcher, a worker and a server that is replaced, for the
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
//! `dispatcher`, `incoming` and `server` are the names that you give.
//!
#![doc = include_str!("numbers.md")]
//!
//! # Labels
//!
//! The number of series is bounded, if that of your groups is. A worker that is started again keeps
//! its **slot**. One that comes anew, or connects again, gets the lowest slot of its group that is
//! free, so a group has no more slots than it had workers at a time. The default group has the
//! label `group=""`. A worker that comes and goes between two updates counts in the numbers of the
//! dispatcher only.
//!
//! Make a new value for each dispatcher, and for each link of a worker that connects again. With
//! the same name, the counters go on where they were.

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

/// Describes those numbers that have this prefix to the recorder.
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

/// The series of one thing that is watched.
#[derive(Debug)]
struct Series {
    /// The name that it was given.
    name: Label,
    /// The count of each counter so far.
    counted: HashMap<Key, u64>,
}

impl Series {
    fn new(kind: &'static str, name: String) -> Self {
        Self { name: Label::new(kind, name), counted: HashMap::new() }
    }

    fn key(&self, name: &'static str, more: &[Label]) -> Key {
        Key::from_parts(name, [std::slice::from_ref(&self.name), more].concat())
    }

    /// Adds to a counter what has come since the last time. It is not set to the total, so that it
    /// goes on when the next dispatcher or link counts from 0.
    fn count(&mut self, name: &'static str, more: &[Label], total: u64) {
        let key = self.key(name, more);
        let counter = with_recorder(|recorder| recorder.register_counter(&key, &METADATA));
        let before = self.counted.insert(key, total).unwrap_or(0);
        counter.increment(total.saturating_sub(before));
    }

    fn set(&self, name: &'static str, more: &[Label], value: f64) {
        let key = self.key(name, more);
        with_recorder(|recorder| recorder.register_gauge(&key, &METADATA)).set(value);
    }

    fn record(&self, name: &'static str, value: f64, times: u64) {
        let key = self.key(name, &[]);
        let histogram = with_recorder(|recorder| recorder.register_histogram(&key, &METADATA));
        histogram.record_many(value, usize::try_from(times).unwrap_or(usize::MAX));
    }

    /// The counters with these labels count for another one from now on, which begins at 0.
    fn restart(&mut self, more: &[Label]) {
        self.counted.retain(|key, _| !key.labels().skip(1).eq(more));
    }
}
