//! Connections a second while old generations drain.

use std::{
    fmt::Write as _,
    net::{SocketAddr, TcpListener},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    bars::{Bar, Need},
    figures::median,
    load::{Load, WINDOW},
    processes::{Process, Result},
};

const GENERATIONS: usize = 10;

/// A listener, the process that accepts, and other processes that have the listener too.
struct Site {
    name: &'static str,
    address: SocketAddr,
    processes: Vec<Process>,
    _directory: tempfile::TempDir,
    /// Connections a second, one figure a round.
    rates: Vec<f64>,
    /// CPU of all processes for each connection, one figure a round.
    cpu: Vec<Duration>,
}

impl Site {
    fn new(
        name: &'static str,
        others: fn(&Path, &TcpListener) -> Result<Vec<Process>>,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("takeover");
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut processes = vec![Process::first(&path, &listener)?];
        processes.extend(others(&path, &listener)?);
        let (rates, cpu) = (Vec::new(), Vec::new());
        let address = listener.local_addr()?;
        Ok(Self { name, address, processes, _directory: directory, rates, cpu })
    }

    /// Measures one round.
    fn measure(&mut self) -> Result<()> {
        let before = self.cpu()?;
        let load = Load::start(self.address);
        let begin = Instant::now();
        sleep(WINDOW);
        let accepted = load.take().len();
        let elapsed = begin.elapsed();
        load.stop()?;
        self.rates.push(accepted as f64 / elapsed.as_secs_f64());
        self.cpu.push((self.cpu()? - before) / accepted.max(1) as u32);
        Ok(())
    }

    /// Returns the CPU time of all processes so far.
    fn cpu(&self) -> Result<Duration> {
        self.processes.iter().map(Process::cpu).sum()
    }

    /// Returns the median of the ratios to the rates of the site `usual` within a round.
    fn ratio(&self, usual: &Self) -> f64 {
        median(self.rates.iter().zip(&usual.rates).map(|(rate, usual)| rate / usual))
    }
}

pub(crate) fn measure(rounds: usize) -> Result<(String, Bar)> {
    // Start everything: each site has a listener of its own.
    let mut sites = [
        Site::new("no other process", |_, _| Ok(Vec::new()))?,
        Site::new("ten generations drain", |path, listener| {
            let address = listener.local_addr()?;
            (0..GENERATIONS).map(|_| Ok(Process::serving(path, address, 1)?.0)).collect()
        })?,
        Site::new("ten processes that left a copy in their event loops", |_, listener| {
            (0..GENERATIONS).map(|_| Process::watcher(listener)).collect()
        })?,
    ];

    // Each round begins with another site.
    for round in 0..rounds {
        for turn in 0..sites.len() {
            let turn = (round + turn) % sites.len();
            sites[turn].measure()?;
        }
    }

    // Report the medians.
    let mut table = String::from(
        "\n## Connections a second while old generations drain\n\nAccepted by one process, with 4 \
         clients that connect again as soon as they are answered. *ratio* is the median of the \
         ratios to the first line within a round. The last line shows processes that stop \
         accepting and keep their listener registered.\n\n\
         | beside the process that accepts | connections / s | ratio | CPU of all of them for each |\n\
         |---|---|---|---|\n",
    );
    for site in &sites {
        let rate = median(site.rates.iter().copied());
        let cpu = median(site.cpu.iter().map(|cpu| cpu.as_secs_f64() * 1e6));
        let ratio = site.ratio(&sites[0]);
        writeln!(table, "| {} | {rate:.0} | {ratio:.2} | {cpu:.0} µs |", site.name)?;
    }
    let name = "accept rate with ten generations that drain, in units of that without";
    let figure = sites[1].ratio(&sites[0]);
    Ok((table, Bar { name, figure, unit: "", need: Need::AtLeast(0.95) }))
}
