//! The cost of a takeover: the time and CPU until the new process is ready, the gap that clients
//! see meanwhile, and the rate of accepted connections while old generations drain.
//!
//! ```text
//! cargo bench --bench takeover               # prints tables
//! cargo bench --bench takeover -- --report   # writes docs/BENCHMARKS_TAKEOVER.md as well
//! ```
//!
//! All servers are processes of their own. The lines of a table take turns, round after round.

mod accept_rate;
mod bars;
mod figures;
mod gap;
mod load;
mod processes;
mod until_ready;

use std::{env, error::Error, fmt::Write as _, fs, process::Command, thread};

use nix::sys::utsname::uname;

use crate::bars::Bar;

/// Rounds of each table: about 90 s in all.
const ROUNDS: usize = 31;

fn main() -> Result<(), Box<dyn Error>> {
    if let Ok(role) = env::var(processes::ROLE) {
        return processes::run(&role);
    }
    // `cargo test --benches` does not pass `--bench`: one round, which checks that it works.
    let (bench, arguments): (Vec<_>, Vec<_>) =
        env::args().skip(1).partition(|argument| argument == "--bench");
    let is_test = bench.is_empty() || arguments.iter().any(|argument| argument == "--test");
    let rounds = if is_test { 1 } else { ROUNDS };

    let mut report = format!("{HEAD}\n{}", machine(&arguments));
    let mut bars = Vec::new();
    for measure in [until_ready::measure, gap::measure, accept_rate::measure] {
        let (table, bar) = measure(rounds)?;
        print!("{table}");
        write!(report, "{table}")?;
        bars.push(bar);
    }
    let bars = Bar::table(&bars);
    print!("{bars}");
    write!(report, "{bars}")?;
    if arguments.iter().any(|argument| argument == "--report") {
        fs::write(REPORT, report)?;
        println!("written to {REPORT}");
    }
    Ok(())
}

/// Describes the machine and the run, a line each.
fn machine(arguments: &[String]) -> String {
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let kernel = uname().map(|it| it.release().display().to_string()).unwrap_or_default();
    let date = Command::new("date").args(["--utc", "+%Y-%m-%d"]).output();
    let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    format!(
        "- {cores} cores, Linux {kernel}\n- {}: `cargo bench --bench takeover -- {}`\n",
        date.unwrap_or_default(),
        arguments.join(" ")
    )
}

const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/BENCHMARKS_TAKEOVER.md");

const HEAD: &str = "\
# Benchmarks of a takeover

Written by `cargo bench --bench takeover -- --report`. Do not edit. The figures of other things
are in [BENCHMARKS.md](BENCHMARKS.md). A figure is the median of all rounds, with its quartiles. CPU
is the time that the kernel's scheduler gave to the processes.
";
