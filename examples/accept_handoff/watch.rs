//! The front and its workers, live: a picture that is drawn again and again on a terminal,
//! and lines elsewhere.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{IsTerminal, Result, Write, stdout},
    net::SocketAddr,
    time::{Duration, Instant},
};

use fdwire::handoff::{AdoptionTimes, Dispatcher, Stats, WorkerId, WorkerState};
use tokio::time::{MissedTickBehavior, interval};

use crate::report::{align, new_table};

/// The time between two pictures, and between two lines.
const PICTURE: Duration = Duration::from_millis(250);
const LINE: Duration = Duration::from_secs(1);

/// Escape sequences: to the top of the screen, erase to the end of the line, erase below.
const HOME: &str = "\x1b[H";
const ERASE_LINE: &str = "\x1b[K";
const ERASE_BELOW: &str = "\x1b[J";

/// The parts of a bar, from empty to full.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

pub(crate) struct Watch {
    address: SocketAddr,
    begin: Instant,
    /// The time of the last look at the numbers, and the numbers.
    last: Instant,
    adopted: u64,
    adopted_by: HashMap<WorkerId, u64>,
    times: AdoptionTimes,
}

impl Watch {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            begin: Instant::now(),
            last: Instant::now(),
            adopted: 0,
            adopted_by: HashMap::new(),
            times: AdoptionTimes::default(),
        }
    }

    /// Watches until this future is dropped.
    ///
    /// # Errors
    /// The errors of writing to the standard output.
    pub(crate) async fn run(&mut self, dispatcher: &Dispatcher) -> Result<()> {
        let is_terminal = stdout().is_terminal();
        let mut ticks = interval(if is_terminal { PICTURE } else { LINE });
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.show(&dispatcher.stats(), is_terminal)?;
        }
    }

    fn show(&mut self, stats: &Stats, is_terminal: bool) -> Result<()> {
        let seconds = self.last.elapsed().as_secs_f64();
        let per_second = |more: u64| format!("{:.0}", more as f64 / seconds.max(0.001));
        let times = stats.adoption_times.since(&self.times);
        let head = format!(
            "{:.1} s: adopted {} ({}/s), waiting {}, offered again {}, lost {}, restarts {}",
            self.begin.elapsed().as_secs_f64(),
            stats.adopted,
            per_second(stats.adopted - self.adopted),
            stats.waiting,
            stats.offered_again,
            stats.lost,
            stats.workers.iter().map(|worker| worker.restarts).sum::<u64>(),
        );
        let latency = format!("adopted within: {}", quantiles(&times));
        let text = if is_terminal {
            let table = self.workers(stats, per_second);
            let bars = bars(&times);
            screen(&format!("http://{}/\n{head}\n{latency}  {bars}\n{table}", self.address))
        } else {
            let ready = stats.workers.iter().filter(|it| it.state == WorkerState::Ready).count();
            format!("{head}, ready {ready} of {}, {latency}\n", stats.workers.len())
        };
        self.last = Instant::now();
        (self.adopted, self.times) = (stats.adopted, stats.adoption_times);
        self.adopted_by = stats.workers.iter().map(|it| (it.id, it.adopted)).collect();
        stdout().write_all(text.as_bytes())?;
        stdout().flush()
    }

    /// Returns a row for each worker.
    fn workers(&self, stats: &Stats, per_second: impl Fn(u64) -> String) -> String {
        let mut table = new_table();
        table.set_header([
            "worker",
            "pid",
            "state",
            "active",
            "queue",
            "adopted",
            "per s",
            "restarts",
            "last exit",
        ]);
        for worker in &stats.workers {
            let before = self.adopted_by.get(&worker.id).copied().unwrap_or(0);
            let exit = worker.last_exit.as_ref();
            table.add_row([
                worker.id.to_string(),
                worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                format!("{:?}", worker.state).to_lowercase(),
                worker.active.to_string(),
                worker.unanswered.to_string(),
                worker.adopted.to_string(),
                per_second(worker.adopted - before),
                worker.restarts.to_string(),
                exit.map_or_else(String::new, |exit| match exit.status {
                    Some(status) => status.to_string(),
                    None => exit.cause.to_string(),
                }),
            ]);
        }
        align(&mut table, 3);
        table.to_string()
    }
}

/// Draws the picture in place of the one before it.
fn screen(picture: &str) -> String {
    let mut screen = HOME.to_owned();
    for line in picture.lines() {
        let _ = write!(screen, "{line}{ERASE_LINE}\r\n"); // to a String
    }
    screen + ERASE_BELOW
}

fn quantiles(times: &AdoptionTimes) -> String {
    let within =
        |share| times.quantile(share).map_or_else(|| "-".to_owned(), |it| format!("{it:?}"));
    format!("p50 {}, p99 {}, p99.9 {}", within(0.5), within(0.99), within(0.999))
}

/// One bar for each bucket, from 64 µs on, each twice as long as the one before.
fn bars(times: &AdoptionTimes) -> String {
    let most = times.buckets().map(|(_, count)| count).max().unwrap_or(0).max(1);
    let bar = |count: u64| BARS[(count * 8).div_ceil(most) as usize];
    times.buckets().map(|(_, count)| bar(count)).collect()
}
