//! The fate of each client, and the tables that show it.

use std::{
    collections::{BTreeMap, HashSet},
    io::{Error, Result},
    time::Duration,
};

use comfy_table::{CellAlignment, Table, presets};
use fdwire::handoff::Stats;
use hdrhistogram::Histogram;

use crate::{
    demo::{Client, Demo, Outcome, PATIENCE},
    journal::{Entries, Given},
};

/// Every client is in one of `answered` and `cut` of a worker, `cut_unseen`, `lost` and `failures`.
pub(crate) struct Report {
    workers: BTreeMap<u16, Worker>,
    /// Cut after a worker had adopted the connection and before its application wrote the record.
    cut_unseen: u64,
    /// Connected, and adopted by no worker.
    lost: u64,
    /// Connections that the applications of two workers were given.
    given_twice: u64,
    failures: Vec<String>,
    kills: usize,
    restarts: u64,
    offered_again: u64,
    requests: usize,
    elapsed: Duration,
}

struct Worker {
    processes: HashSet<u32>,
    given: u64,
    cut: u64,
    /// Microseconds of the answered requests.
    answered: Histogram<u64>,
}

impl Report {
    /// `stats` are those after the end, when every connection has been adopted or has failed.
    ///
    /// A connection that broke was being served if the journal has it with a process that was
    /// killed. A connection that is missing in the journal was either lost, or adopted by a worker
    /// that was killed right then. The number of lost ones is the number of connected clients
    /// without the number of adopted connections.
    pub(crate) fn new(
        demo: Demo,
        journal: &Entries,
        killed: &HashSet<u32>,
        stats: &Stats,
        restarts: u64,
    ) -> Self {
        let mut report = Self {
            workers: BTreeMap::new(),
            cut_unseen: 0,
            lost: 0,
            given_twice: 0,
            failures: Vec::new(),
            kills: killed.len(),
            restarts,
            offered_again: stats.offered_again,
            requests: demo.clients.len(),
            elapsed: demo.elapsed,
        };
        // Compare each client's outcome with the entries of its connection in the journal.
        let (mut connected, mut unseen) = (0, 0);
        for Client { address, outcome } in &demo.clients {
            let given = journal.get(address).map_or(&[][..], Vec::as_slice);
            for Given { worker, pid } in given {
                let worker = report.worker(*worker);
                worker.given += 1;
                worker.processes.insert(*pid);
            }
            connected += u64::from(!matches!(outcome, Outcome::Failed { connected: false, .. }));
            report.given_twice += u64::from(given.len() > 1);
            match (outcome, given) {
                (Outcome::Answered { pid, latency }, [given]) if given.pid == *pid => {
                    report
                        .worker(given.worker)
                        .answered
                        .saturating_record(latency.as_micros() as u64);
                }
                (Outcome::Broken(_), [given]) if killed.contains(&given.pid) => {
                    report.worker(given.worker).cut += 1
                }
                (Outcome::Broken(_), []) => unseen += 1,
                (Outcome::Answered { pid, .. }, given) => {
                    report
                        .failures
                        .push(format!("{address}: answered by {pid}, given to {given:?}"));
                }
                (Outcome::Broken(error) | Outcome::Failed { error, .. }, given) => {
                    report.failures.push(format!("{address}: {error}, given to {given:?}"));
                }
            }
        }

        // Account for connected clients that are missing in the journal.
        report.lost = connected.saturating_sub(stats.adopted).max(stats.lost);
        report.cut_unseen = u64::saturating_sub(unseen, report.lost);
        if report.cut_unseen > report.kills as u64 {
            // Workers of this program adopt one connection at a time.
            report
                .failures
                .push(format!("{unseen} adopted and never seen, with {} kills", report.kills));
        }
        report
    }

    fn worker(&mut self, number: u16) -> &mut Worker {
        self.workers.entry(number).or_insert_with(|| Worker {
            processes: HashSet::new(),
            given: 0,
            cut: 0,
            answered: histogram(),
        })
    }

    /// # Errors
    /// If any client was neither answered nor cut while it was being served.
    pub(crate) fn print(&self) -> Result<()> {
        // A row for each worker, and one for all of them.
        let mut all = Worker {
            processes: HashSet::new(),
            given: 0,
            cut: self.cut_unseen,
            answered: histogram(),
        };
        let mut table = new_table();
        table.set_header(["worker", "processes", "given", "answered", "cut", "p50 ms", "p99 ms"]);
        for (number, worker) in &self.workers {
            all.processes.extend(&worker.processes);
            all.given += worker.given;
            all.cut += worker.cut;
            all.answered += &worker.answered;
            table.add_row(worker.row(number.to_string()));
        }
        table.add_row(all.row("all".to_owned()));
        align(&mut table, 0);
        println!("{table}");

        // The counts of the whole demo.
        let mut summary = new_table();
        for (what, count) in [
            ("answered", all.answered.len()),
            ("cut while being served", all.cut),
            ("... of these before the application wrote it down", self.cut_unseen),
            ("failed", self.failures.len() as u64),
            ("lost before adoption", self.lost),
            ("given twice", self.given_twice),
            ("offered again", self.offered_again),
            ("kills", self.kills as u64),
            ("restarts", self.restarts),
        ] {
            summary.add_row([what.to_owned(), count.to_string()]);
        }
        align(&mut summary, 1);
        println!("{summary}");

        let (requests, seconds) = (self.requests, self.elapsed.as_secs_f64());
        println!(
            "{requests} requests in {seconds:.2} s, {:.0} requests/s",
            requests as f64 / seconds
        );

        // The result.
        match (&self.failures[..], self.lost, self.given_twice) {
            ([], 0, 0) => Ok(()),
            ([first, ..], ..) => Err(Error::other(format!(
                "{} requests failed, the first: {first}",
                self.failures.len()
            ))),
            _ => Err(Error::other(format!(
                "{} connections lost, {} given twice",
                self.lost, self.given_twice
            ))),
        }
    }
}

impl Worker {
    fn row(&self, name: String) -> [String; 7] {
        let milliseconds =
            |quantile| format!("{:.2}", self.answered.value_at_quantile(quantile) as f64 / 1000.0);
        let counts = [self.processes.len() as u64, self.given, self.answered.len(), self.cut]
            .map(|count| count.to_string());
        let [processes, given, answered, cut] = counts;
        [name, processes, given, answered, cut, milliseconds(0.5), milliseconds(0.99)]
    }
}

/// Returns a histogram of microseconds up to the longest wait, with three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(PATIENCE.as_micros() as u64, 3).expect("the bounds are valid")
}

pub(crate) fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table
}

/// Aligns the numbers to the right, from this column on.
pub(crate) fn align(table: &mut Table, first: usize) {
    for column in table.column_iter_mut().skip(first) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
