//! The time from the request until the new process is ready.

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    bars::{Bar, Need},
    figures::{in_milliseconds, median, milliseconds},
    processes::{Process, Result, free_address},
};

/// The numbers of listeners that are measured. The last one has a bar.
const LISTENERS: [usize; 3] = [1, 100, 1000];

/// A server that is replaced again and again.
struct Site {
    listeners: usize,
    _directory: tempfile::TempDir,
    path: PathBuf,
    address: SocketAddr,
    serving: Process,
    elapsed: Vec<Duration>,
    cpu_of_new: Vec<Duration>,
    cpu_of_old: Vec<Duration>,
}

impl Site {
    fn new(listeners: usize) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (path, address) = (directory.path().join("takeover"), free_address()?);
        let (serving, ..) = Process::serving(&path, address, listeners)?;
        let [elapsed, cpu_of_new, cpu_of_old] = [const { Vec::new() }; 3];
        let _directory = directory;
        Ok(Self { listeners, _directory, path, address, serving, elapsed, cpu_of_new, cpu_of_old })
    }

    /// Measures one takeover.
    fn take_over(&mut self) -> Result<()> {
        let before = self.serving.cpu()?;
        let (next, cpu, elapsed) = Process::serving(&self.path, self.address, self.listeners)?;
        self.elapsed.push(elapsed);
        self.cpu_of_new.push(cpu);
        self.cpu_of_old.push(self.serving.cpu()? - before);
        self.serving = next; // the old one is killed
        Ok(())
    }

    /// Returns the median of the CPU time of both processes, in milliseconds.
    fn cpu(&self) -> f64 {
        let both = self.cpu_of_new.iter().zip(&self.cpu_of_old);
        median(both.map(|(new, old)| milliseconds(&(*new + *old))))
    }
}

pub(crate) fn measure(rounds: usize) -> Result<(String, Bar)> {
    let mut sites = LISTENERS.into_iter().map(Site::new).collect::<Result<Vec<_>>>()?;
    for _ in 0..rounds {
        sites.iter_mut().try_for_each(Site::take_over)?;
    }
    let mut table = String::from(
        "\n## From the request until the new process is ready\n\nBy the number of listeners, all \
         TCP. The set-up of the application takes no time here.\n\n\
         | listeners | time | CPU of the new process | CPU of the old process |\n\
         |---|---|---|---|\n",
    );
    for Site { listeners, elapsed, cpu_of_new, cpu_of_old, .. } in &sites {
        let [elapsed, new, old] =
            [elapsed, cpu_of_new, cpu_of_old].map(|figures| in_milliseconds(figures));
        writeln!(table, "| {listeners} | {elapsed} | {new} | {old} |")?;
    }
    let figure = sites.last().map_or(f64::NAN, Site::cpu);
    let name = "CPU of both processes for 1,000 listeners";
    Ok((table, Bar { name, figure, unit: " ms", need: Need::AtMost(20.0) }))
}
