//! The cost of a takeover: until the new process is ready, the clients meanwhile, and everybody
//! while old generations drain.
//!
//! ```text
//! cargo bench --bench takeover               # prints tables
//! cargo bench --bench takeover -- --report   # writes docs/BENCHMARKS_TAKEOVER.md as well
//! ```
//!
//! All servers are processes of their own. Contenders of a table take turns, round after round.

mod load;
mod processes;
mod rows;

use std::{env, error::Error, fmt::Write as _, fs};

fn main() -> Result<(), Box<dyn Error>> {
    if let Ok(role) = env::var(processes::ROLE) {
        return processes::run(&role);
    }
    let arguments: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    // `cargo test --benches` runs it shortly, to see that it works.
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let rounds = if is_test { 1 } else { 15 };

    let mut report = String::from(HEAD);
    for table in [rows::until_ready(rounds)?, rows::gap(rounds)?, rows::accept_rate(rounds)?] {
        print!("{table}");
        write!(report, "{table}")?;
    }
    if arguments.iter().any(|argument| argument == "--report") {
        fs::write(REPORT, report)?;
        println!("written to {REPORT}");
    }
    Ok(())
}

const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/BENCHMARKS_TAKEOVER.md");

const HEAD: &str = "\
# Benchmarks of a takeover

Written by `cargo bench --bench takeover -- --report`. Do not edit. Figures of other things are in
[BENCHMARKS.md](BENCHMARKS.md). A figure is the median of all rounds, with its quartiles. CPU is the
time that the kernel's scheduler gave to the processes.
";
