//! The figures that were measured, as they are saved, and what follows from them.

use fdwire::SocketKind;
use serde::{Deserialize, Serialize};

use crate::rows::{Contender, Role};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<RowResult>,
}

/// Where and how it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    /// The cores of the two ends, if they were bound to some.
    pub(crate) bound_to: Option<(usize, usize)>,
    pub(crate) kernel: String,
    pub(crate) rustc: String,
    pub(crate) date: String,
    pub(crate) command: String,
    /// Of rows up to 64 B, of the others.
    pub(crate) send_buffer_bytes: (usize, usize),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RowResult {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) unit: String,
    pub(crate) contenders: Vec<Measured>,
}

/// A contender's samples, one a round.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) name: String,
    pub(crate) stream: bool,
    pub(crate) role: Role,
    pub(crate) ns: Vec<f64>,
    /// User and system time of the processes of both ends.
    pub(crate) cpu_ns: Vec<f64>,
}

impl Results {
    pub(crate) fn row(&self, id: &str) -> Option<&RowResult> {
        self.rows.iter().find(|row| row.id == id)
    }
}

impl RowResult {
    pub(crate) fn contender(&self, name: &str) -> Option<&Measured> {
        self.contenders.iter().find(|contender| contender.name == name)
    }

    /// The fastest of those that are meant.
    pub(crate) fn fastest(&self, of: impl Fn(&Measured) -> bool) -> Option<&Measured> {
        let of_them = self.contenders.iter().filter(|contender| of(contender));
        of_them.min_by(|a, b| a.median_ns().total_cmp(&b.median_ns()))
    }

    /// The work without passing anything: the first reference of the row.
    pub(crate) fn without_passing(&self) -> Option<&Measured> {
        self.contenders.iter().find(|contender| contender.role == Role::Reference)
    }

    /// Bare calls on a socket of the same kind.
    pub(crate) fn bare_for(&self, contender: &Measured) -> Option<&Measured> {
        self.fastest(|other| other.role == Role::Bare && other.stream == contender.stream)
    }

    /// Bare calls and an acknowledgement, on a socket of the same kind.
    pub(crate) fn acknowledged_for(&self, contender: &Measured) -> Option<&Measured> {
        self.fastest(|other| other.role == Role::Acknowledged && other.stream == contender.stream)
    }

    /// The fastest of what other crates do by themselves.
    pub(crate) fn fastest_peer(&self) -> Option<&Measured> {
        self.fastest(|contender| contender.role == Role::Peer)
    }
}

impl Measured {
    pub(crate) fn new(contender: &Contender) -> Self {
        let stream = contender.kind == SocketKind::Stream;
        Self {
            name: contender.name.clone(),
            stream,
            role: contender.role,
            ns: Vec::new(),
            cpu_ns: Vec::new(),
        }
    }

    pub(crate) fn median_ns(&self) -> f64 {
        quantile(&self.ns, 0.5)
    }

    pub(crate) fn median_cpu_ns(&self) -> f64 {
        quantile(&self.cpu_ns, 0.5)
    }

    /// Lower and upper quartile.
    pub(crate) fn quartiles_ns(&self) -> (f64, f64) {
        (quantile(&self.ns, 0.25), quantile(&self.ns, 0.75))
    }

    /// Its time in units of another's: the median of the ratios within a round, so that what slows
    /// the machine down for a while counts for nothing.
    pub(crate) fn times(&self, other: &Self) -> f64 {
        quantile(&self.ns.iter().zip(&other.ns).map(|(a, b)| a / b).collect::<Vec<_>>(), 0.5)
    }

    /// Its CPU time in units of another's: the median of the ratios within a round.
    pub(crate) fn cpu_times(&self, other: &Self) -> f64 {
        quantile(
            &self.cpu_ns.iter().zip(&other.cpu_ns).map(|(a, b)| a / b).collect::<Vec<_>>(),
            0.5,
        )
    }

    /// The CPU time that it takes beyond another's, round by round.
    fn cpu_beyond<'a>(&'a self, base: &'a Self) -> impl Iterator<Item = f64> + 'a {
        self.cpu_ns.iter().zip(&base.cpu_ns).map(|(a, b)| a - b)
    }

    pub(crate) fn median_cpu_beyond(&self, base: &Self) -> f64 {
        quantile(&self.cpu_beyond(base).collect::<Vec<_>>(), 0.5)
    }

    /// Returns the CPU time that it adds to that of `base`, in units of the time that another adds:
    /// the median of the ratios within a round.
    pub(crate) fn adds_times(&self, other: &Self, base: &Self) -> f64 {
        let added = self.cpu_beyond(base).zip(other.cpu_beyond(base));
        quantile(&added.map(|(a, b)| a / b).collect::<Vec<_>>(), 0.5)
    }
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = last as f64 * share;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}
