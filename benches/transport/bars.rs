//! The bars: ratios that fdwire's figures have to reach. A ratio means the same on any machine.

use crate::{
    results::{Measured, Results, RowResult},
    rows::{IN_TASKS, Role},
};

/// A figure and its limit.
pub(crate) struct Bar {
    pub(crate) row: String,
    pub(crate) what: String,
    pub(crate) figure: f64,
    pub(crate) need: Need,
}

#[derive(Clone, Copy)]
pub(crate) enum Need {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    pub(crate) fn is_met(&self) -> bool {
        match self.need {
            Need::AtMost(limit) => self.figure <= limit,
            Need::AtLeast(limit) => self.figure >= limit,
        }
    }

    pub(crate) fn need(&self) -> String {
        match self.need {
            Need::AtMost(limit) => format!("at most {limit}"),
            Need::AtLeast(limit) => format!("at least {limit}"),
        }
    }

    pub(crate) fn verdict(&self) -> &'static str {
        if self.is_met() { "met" } else { "MISSED" }
    }
}

/// Returns the bars of all rows that were measured.
pub(crate) fn bars(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut of = |id: &str, each: fn(&mut Bars<'_>, &Measured)| {
        let Some(row) = results.row(id) else { return };
        for fdwire in row.contenders.iter().filter(|contender| contender.role == Role::Fdwire) {
            each(&mut Bars { row, bars: &mut bars }, fdwire);
        }
    };

    // Small messages in batches.
    of("64B-batched", |bars, fdwire| {
        bars.times_bare(fdwire, 2.0);
        bars.faster_than(fdwire, bars.row.contender("LengthDelimitedCodec"), 1.2);
        bars.faster_than(fdwire, bars.row.fastest(passes_fds), 15.0);
    });
    of("64B-fd-batched", |bars, fdwire| {
        bars.times_bare(fdwire, 1.3);
        bars.faster_than(fdwire, bars.row.contender("anchovy, by hand"), 1.0);
        bars.faster_than(fdwire, bars.row.fastest(passes_fds), 4.0);
    });

    // Round trips.
    for id in ["64B-round-trip", "64B-fd-round-trip"] {
        of(id, |bars, fdwire| {
            bars.times(fdwire, bars.row.contender("tokio-seqpacket"), 1.05);
            bars.times_bare(fdwire, 1.15);
        });
    }

    // Long messages. The fastest peer is compared only with the faster one of fdwire's kinds of
    // socket, which a user would choose for bulk.
    for id in ["64KiB", "1MiB", "16MiB"] {
        of(id, |bars, fdwire| bars.faster_than(fdwire, bars.row.bare_for(fdwire), 0.9));
        of(id, |bars, fdwire| {
            if bars
                .row
                .fastest(|contender| contender.role == Role::Fdwire)
                .is_some_and(|it| it.name == fdwire.name)
            {
                bars.faster_than(fdwire, bars.row.fastest_peer(), 1.0);
            }
        });
    }

    // The hand-off layer with an HTTP server, against bare calls that promise nothing.
    for id in ["http-busy", "http-idle", "http-mt-busy", "http-mt-idle"] {
        of(id, |bars, fdwire| bars.adds(fdwire, if fdwire.stream { 1.6 } else { 1.5 }));
    }

    // The hand-off layer, against other ways to use two processes. These do not promise that no
    // connection is lost.
    of("http-mt-busy", |bars, fdwire| {
        if fdwire.name == IN_TASKS {
            bars.cpu_times(fdwire, bars.row.contender("two processes, SO_REUSEPORT"), 1.25);
            bars.cpu_times(fdwire, bars.row.contender("haproxy"), 1.0);
        }
    });
    bars
}

/// Returns true for peers that pass descriptors, message by message.
fn passes_fds(contender: &Measured) -> bool {
    contender.role == Role::Peer && contender.name != "LengthDelimitedCodec"
}

/// Adds the bars of a row, for those of its contenders that were measured.
struct Bars<'a> {
    row: &'a RowResult,
    bars: &'a mut Vec<Bar>,
}

impl Bars<'_> {
    fn push(&mut self, what: String, figure: f64, need: Need) {
        self.bars.push(Bar { row: self.row.title.clone(), what, figure, need });
    }

    fn times(&mut self, fdwire: &Measured, other: Option<&Measured>, at_most: f64) {
        if let Some(other) = other {
            let what = format!("{}: time / {}", fdwire.name, other.name);
            self.push(what, fdwire.times(other), Need::AtMost(at_most));
        }
    }

    /// Compares the CPU time that each adds to the work of one process.
    fn adds(&mut self, fdwire: &Measured, at_most: f64) {
        if let (Some(base), Some(bare)) = (self.row.without_passing(), self.row.bare_for(fdwire)) {
            let what = format!("{}: added CPU / {}", fdwire.name, bare.name);
            self.push(what, fdwire.adds_times(bare, base), Need::AtMost(at_most));
        }
    }

    fn cpu_times(&mut self, fdwire: &Measured, other: Option<&Measured>, at_most: f64) {
        if let Some(other) = other {
            let what = format!("{}: CPU / {}", fdwire.name, other.name);
            self.push(what, fdwire.cpu_times(other), Need::AtMost(at_most));
        }
    }

    fn times_bare(&mut self, fdwire: &Measured, at_most: f64) {
        self.times(fdwire, self.row.bare_for(fdwire), at_most);
    }

    fn faster_than(&mut self, fdwire: &Measured, other: Option<&Measured>, at_least: f64) {
        if let Some(other) = other {
            let what = format!("{}: rate / {}", fdwire.name, other.name);
            self.push(what, other.times(fdwire), Need::AtLeast(at_least));
        }
    }
}
