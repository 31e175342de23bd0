//! The tables.

use std::{
    fmt::Write as _,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    load::{Load, longest_gap},
    processes::{Process, Result},
};

const LISTENERS: [usize; 3] = [1, 100, 1000];

/// For a measurement under load.
const WINDOW: Duration = Duration::from_millis(400);

const GENERATIONS: usize = 10;

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// From the request until the new process is ready.
pub(crate) fn until_ready(rounds: usize) -> Result<String> {
    let mut sites = Vec::new();
    for listeners in LISTENERS {
        let directory = tempfile::tempdir()?;
        let (path, address) = (directory.path().join("takeover"), free_address()?);
        let (first, ..) = Process::serving(&path, address, listeners)?;
        sites.push((
            listeners,
            directory,
            path,
            address,
            first,
            [Vec::new(), Vec::new(), Vec::new()],
        ));
    }
    for _ in 0..rounds {
        for (listeners, _, path, address, serving, [elapsed, new, old]) in &mut sites {
            let before = serving.cpu()?;
            let (next, cpu_of_new, time) = Process::serving(path, *address, *listeners)?;
            elapsed.push(time);
            new.push(cpu_of_new);
            old.push(serving.cpu()? - before);
            *serving = next; // the old one is killed
        }
    }
    let mut table = String::from(
        "\n## From the request until the new process is ready\n\n\
         By the number of listeners, all TCP. Set-up of the \
         application itself takes no time here.\n\n\
         | listeners | time | CPU of the new process | CPU of the old process |\n\
         |---|---|---|---|\n",
    );
    for (listeners, .., figures) in &mut sites {
        let [elapsed, new, old] = figures.each_mut().map(|figures| milliseconds(figures));
        writeln!(table, "| {listeners} | {elapsed} | {new} | {old} |")?;
    }
    Ok(table)
}

/// The longest gap between two accepted connections.
pub(crate) fn gap(rounds: usize) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let (path, address) = (directory.path().join("takeover"), free_address()?);
    let (mut serving, ..) = Process::serving(&path, address, 1)?;
    let load = Load::start(address);
    let [mut without, mut with] = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        let mut next = Process::server(&path, address, 1)?;
        next.report()?; // it is started: only the takeover itself is in its window
        sleep(WINDOW / 4);
        load.take();
        sleep(WINDOW);
        without.push(longest_gap(&load.take()));
        let begin = Instant::now();
        next.go()?;
        next.report()?;
        sleep(WINDOW.saturating_sub(begin.elapsed()));
        with.push(longest_gap(&load.take()));
        serving = next; // the old one has accepted nothing since
    }
    load.stop()?;
    drop(serving);
    Ok(format!(
        "\n## The longest gap between two accepted connections\n\n\
         In windows of {} ms, with 4 clients that connect \
         again as soon as they are answered. No connection failed.\n\n\
         | window | longest gap |\n|---|---|\n\
         | without a takeover | {} |\n| with one | {} |\n",
        WINDOW.as_millis(),
        milliseconds(&mut without),
        milliseconds(&mut with),
    ))
}

/// A listener, the process that accepts, and those that do not.
struct Site {
    name: &'static str,
    address: SocketAddr,
    processes: Vec<Process>,
    _directory: tempfile::TempDir,
    rates: Vec<f64>,
    cpu: Vec<Duration>,
}

impl Site {
    fn new(
        name: &'static str,
        others: fn(&Path, &TcpListener) -> Result<Vec<Process>>,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path: PathBuf = directory.path().join("takeover");
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut processes = vec![Process::first(&path, &listener)?];
        processes.extend(others(&path, &listener)?);
        let address = listener.local_addr()?;
        Ok(Self {
            name,
            address,
            processes,
            _directory: directory,
            rates: Vec::new(),
            cpu: Vec::new(),
        })
    }

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

    fn cpu(&self) -> Result<Duration> {
        self.processes.iter().map(Process::cpu).sum()
    }
}

/// Connections a second while old generations drain.
pub(crate) fn accept_rate(rounds: usize) -> Result<String> {
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
    for round in 0..rounds {
        for turn in 0..sites.len() {
            let turn = (round + turn) % sites.len();
            sites[turn].measure()?;
        }
    }
    let usual = sites[0].rates.clone();
    let mut table = String::from(
        "\n## Connections a second while old generations drain\n\n\
         Accepted by one process, with 4 clients that connect again as soon as they are answered. \
         *ratio* is the median of the ratios to the first line within a round. The last line is \
         what a process does that stops to accept and keeps its listener registered.\n\n\
         | beside the process that accepts | connections / s | ratio \
         | CPU of all of them for each |\n|---|---|---|---|\n",
    );
    for site in &mut sites {
        let mut ratios: Vec<_> =
            site.rates.iter().zip(&usual).map(|(rate, usual)| rate / usual).collect();
        let [_, ratio, _] = quartiles(&mut ratios);
        let [_, rate, _] = quartiles(&mut site.rates);
        let mut cpu: Vec<_> = site.cpu.iter().map(|cpu| cpu.as_secs_f64() * 1e6).collect();
        let [_, cpu, _] = quartiles(&mut cpu);
        writeln!(table, "| {} | {rate:.0} | {ratio:.2} | {cpu:.0} µs |", site.name)?;
    }
    Ok(table)
}

fn milliseconds(figures: &mut [Duration]) -> String {
    let mut figures: Vec<_> = figures.iter().map(|figure| figure.as_secs_f64() * 1e3).collect();
    let [low, median, high] = quartiles(&mut figures);
    format!("{median:.2} ms ({low:.2} to {high:.2})")
}

fn quartiles(figures: &mut [f64]) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    let at = |quarter: usize| figures[(figures.len() - 1) * quarter / 4];
    [at(1), at(2), at(3)]
}
