//! The measured figures, as they are saved, and the medians and ratios computed from them.

use fdwire::SocketKind;
use serde::{Deserialize, Serialize};

use crate::rows::{Contender, Role};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<RowResult>,
}

/// The machine and the run.
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
    /// The send buffer of rows up to 64 B, and that of the others.
    pub(crate) send_buffer_bytes: (usize, usize),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RowResult {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) unit: String,
    pub(crate) contenders: Vec<Measured>,
}

/// A contender's samples, one for each round.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) name: String,
    /// Whether the socket is of the kind STREAM.
    pub(crate) stream: bool,
    pub(crate) role: Role,
    /// Elapsed time for each message.
    pub(crate) ns: Vec<f64>,
    /// User and system time of the processes of both ends, for each message.
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

    /// Returns the fastest of the contenders that `filter` accepts.
    pub(crate) fn fastest(&self, filter: impl Fn(&Measured) -> bool) -> Option<&Measured> {
        let accepted = self.contenders.iter().filter(|contender| filter(contender));
        accepted.min_by(|a, b| a.median_ns().total_cmp(&b.median_ns()))
    }

    /// Returns the contender that does the work in one process: the first reference of the row.
    pub(crate) fn without_passing(&self) -> Option<&Measured> {
        self.contenders.iter().find(|contender| contender.role == Role::Reference)
    }

    /// Returns bare calls on a socket of the same kind.
    pub(crate) fn bare_for(&self, contender: &Measured) -> Option<&Measured> {
        self.fastest(|other| other.role == Role::Bare && other.stream == contender.stream)
    }

    /// Returns bare calls with an acknowledgement, on a socket of the same kind.
    pub(crate) fn acknowledged_for(&self, contender: &Measured) -> Option<&Measured> {
        self.fastest(|other| other.role == Role::Acknowledged && other.stream == contender.stream)
    }

    /// Returns the fastest of the other crates, without batches put together by hand.
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

    /// Returns the lower and the upper quartile.
    pub(crate) fn quartiles_ns(&self) -> (f64, f64) {
        (quantile(&self.ns, 0.25), quantile(&self.ns, 0.75))
    }

    /// Returns its time in units of another's. It is the median of the ratios within a round, so a
    /// machine that is slow for a while does not change it.
    pub(crate) fn times(&self, other: &Self) -> f64 {
        quantile(&self.ns.iter().zip(&other.ns).map(|(a, b)| a / b).collect::<Vec<_>>(), 0.5)
    }

    /// Returns its CPU time in units of another's: the median of the ratios within a round.
    pub(crate) fn cpu_times(&self, other: &Self) -> f64 {
        quantile(
            &self.cpu_ns.iter().zip(&other.cpu_ns).map(|(a, b)| a / b).collect::<Vec<_>>(),
            0.5,
        )
    }

    /// Returns the CPU time that it takes beyond another's, round by round.
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
