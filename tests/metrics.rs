//! The numbers that reach a recorder of the `metrics` facade.

#[path = "common/mod.rs"]
mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use common::run;
use fdwire::{
    Socket, SocketKind,
    handoff::{Dispatcher, Incoming},
    metrics::{DispatcherMetrics, IncomingMetrics, TakeoverMetrics},
    takeover::{Listeners, Options, Server},
};
use metrics::{Unit, with_local_recorder};
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder},
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};

const TABLE: &str = include_str!("../src/metrics/numbers.md");

/// A recorder, and the numbers that it has recorded in this test.
struct Recorded {
    recorder: DebuggingRecorder,
    /// The totals of the counters so far, by name and labels.
    counters: BTreeMap<String, u64>,
}

impl Recorded {
    fn new() -> Self {
        Self { recorder: DebuggingRecorder::new(), counters: BTreeMap::new() }
    }

    fn with<T>(&self, act: impl FnOnce() -> T) -> T {
        with_local_recorder(&self.recorder, act)
    }

    /// Returns the value of each metric by `name{labels}`. That of a counter is its total, and that
    /// of a histogram is the number of values since the last call.
    fn values(&mut self) -> BTreeMap<String, f64> {
        let mut values = BTreeMap::new();
        for (key, _, _, value) in self.recorder.snapshotter().snapshot().into_vec() {
            let labels = key.key().labels().map(|it| format!("{}={}", it.key(), it.value()));
            let name = format!("{}{{{}}}", key.key().name(), Vec::from_iter(labels).join(","));
            let value = match value {
                DebugValue::Counter(count) => {
                    // A snapshot resets the counter of the recorder.
                    let total = self.counters.entry(name.clone()).or_default();
                    *total += count;
                    *total as f64
                }
                DebugValue::Gauge(value) => value.into_inner(),
                DebugValue::Histogram(values) => values.len() as f64,
            };
            values.insert(name, value);
        }
        values
    }
}

/// A dispatcher that serves a listener, with one worker in this process.
struct Front {
    dispatcher: Dispatcher,
    listener: TcpListener,
}

impl Front {
    async fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self { dispatcher: Dispatcher::builder().build(), listener }
    }

    fn add_worker(&self) -> Incoming {
        let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
        self.dispatcher.add_worker(dispatcher_end);
        Incoming::new(worker_end)
    }

    /// Hands over a connection, which the worker drops.
    async fn hand_over(&self, worker: &mut Incoming) {
        let mut client = TcpStream::connect(self.listener.local_addr().unwrap()).await.unwrap();
        let (connection, _) = self.listener.accept().await.unwrap();
        let adopted = self.dispatcher.dispatch(connection);
        drop(worker.next().await.unwrap());
        adopted.await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }

    async fn remove(&self, worker: Incoming) {
        let workers = self.dispatcher.stats().workers.len();
        let handle = worker.handle();
        drop(worker);
        handle.ended().await;
        while self.dispatcher.stats().workers.len() == workers {
            tokio::task::yield_now().await;
        }
    }
}

#[test]
fn the_metrics_of_the_table_are_recorded_and_described_and_no_others() {
    run(async {
        // A dispatcher, a worker and a server of takeovers have their numbers recorded.
        let recorded = Recorded::new();
        let front = Front::new().await;
        let mut worker = front.add_worker();
        front.hand_over(&mut worker).await;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("takeover");
        let server = Server::bind(path, Listeners::new(), Options::default()).unwrap();
        recorded.with(|| {
            DispatcherMetrics::new("front").update(&front.dispatcher.stats());
            IncomingMetrics::new("worker").update(&worker.handle().stats());
            TakeoverMetrics::new("app").update(&server);
        });

        // Each metric is a row of the table, with its kind, unit, labels and description.
        let described = recorded.recorder.snapshotter().snapshot().into_vec();
        let described = described.into_iter().map(|(key, unit, meaning, _)| {
            let labels = key.key().labels().map(|it| format!("`{}`", it.key()));
            let kind = match key.kind() {
                MetricKind::Counter => "counter",
                MetricKind::Gauge => "gauge",
                MetricKind::Histogram => "histogram",
            };
            let unit = unit.as_ref().map_or("", Unit::as_str);
            let meaning = meaning.expect("a description");
            let name = key.key().name();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            assert_eq!(name.ends_with("_seconds"), unit == "seconds", "{name}");
            let labels = Vec::from_iter(labels).join(", ");
            format!("| `{name}` | {kind} | {unit} | {labels} | {meaning} |")
        });
        let described: BTreeSet<_> = described.collect();
        let table: BTreeSet<_> = TABLE.lines().skip(2).map(str::to_owned).collect();
        assert_eq!(described, table);
    });
}

#[test]
fn counters_go_on_and_slot_labels_are_used_again_when_workers_come_and_go() {
    run(async {
        // A worker stays while another one comes. So there are two slots.
        let mut recorded = Recorded::new();
        let front = Front::new().await;
        let mut front_metrics = recorded.with(|| DispatcherMetrics::new("front"));
        let slots = ["1", "2"].map(|slot| format!("{{dispatcher=front,group=,slot={slot}}}"));
        let mut update = |recorded: &mut Recorded| {
            recorded.with(|| front_metrics.update(&front.dispatcher.stats()));
            recorded.values()
        };
        let mut stays = front.add_worker();
        front.hand_over(&mut stays).await;
        update(&mut recorded);
        // In each round the older worker leaves. The counters of the slots go on, and no third slot
        // is used.
        for round in 1..=3 {
            let mut comes = front.add_worker();
            front.remove(stays).await;
            front.hand_over(&mut comes).await;
            let values = update(&mut recorded);
            let adopted = "fdwire_worker_adopted_connections_total";
            let total: f64 =
                slots.iter().filter_map(|slot| values.get(&format!("{adopted}{slot}"))).sum();
            assert_eq!(total, f64::from(round + 1), "{values:#?}");
            let all = values["fdwire_dispatcher_adopted_connections_total{dispatcher=front}"];
            assert_eq!(all, f64::from(round + 1));
            let times = values["fdwire_dispatcher_adoption_seconds{dispatcher=front}"];
            assert_eq!(times, 1.0, "one connection was adopted in this round");
            assert_eq!(values["fdwire_dispatcher_workers{dispatcher=front,state=ready}"], 1.0);
            assert!(!values.keys().any(|name| name.contains("slot=3")), "{values:#?}");
            stays = comes;
        }
        let values = update(&mut recorded);
        let drained = "fdwire_dispatcher_retired_workers_total{dispatcher=front,cause=drained}";
        assert_eq!(values[drained], 3.0);
        // When the last worker has left, the gauges of its slot are set to 0. A snapshot also sets
        // gauges to 0, so they get another value before.
        front.remove(stays).await;
        let gauges = ["active_connections", "unanswered_offers", "credit_offers"];
        let gauges = gauges.map(|name| format!("fdwire_worker_{name}"));
        for name in gauges.clone() {
            let labels = [("dispatcher", "front"), ("group", ""), ("slot", "1")];
            recorded.with(|| metrics::gauge!(name, &labels).set(7.0));
        }
        let values = update(&mut recorded);
        for name in gauges {
            assert_eq!(values[&format!("{name}{}", slots[0])], 0.0);
        }
    });
}

#[test]
fn counters_go_on_when_a_worker_connects_again() {
    run(async {
        let mut recorded = Recorded::new();
        let front = Front::new().await;
        for round in 1..=3 {
            let mut worker = front.add_worker();
            let mut metrics = recorded.with(|| IncomingMetrics::new("worker"));
            front.hand_over(&mut worker).await;
            for _ in 0..2 {
                recorded.with(|| metrics.update(&worker.handle().stats()));
            }
            let values = recorded.values();
            let adopted = "fdwire_incoming_adopted_connections_total{incoming=worker}";
            assert_eq!(values[adopted], f64::from(round));
            assert_eq!(values["fdwire_incoming_active_connections{incoming=worker}"], 0.0);
            front.remove(worker).await;
        }
    });
}
