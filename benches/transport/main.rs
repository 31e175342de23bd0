//! fdwire against bare `sendmsg` and `recvmsg`, and against other crates: messages one way,
//! messages there and back, messages from many tasks, and connections handed over. In the last
//! rows, this crate's hand-off layer (`Dispatcher` and `Incoming`) hands them to a whole HTTP
//! server.
//!
//! ```text
//! cargo bench --bench transport               # everything, in some minutes
//! cargo bench --bench transport -- --list     # the names of rows and contenders
//! cargo bench --bench transport -- --report   # write docs/BENCHMARKS.md and docs/benchmarks.svg
//! cargo bench --bench transport -- --from FILE --report  # the same from the results of a run
//!
//! # Only rows and contenders whose name contains one of the words:
//! cargo bench --bench transport -- 64B-fd anchovy fdwire
//! ```
//!
//! Contenders of a row do the same work, under the same conditions:
//!
//! - The ends are two processes, each on a core of its own. Each has a current-thread runtime;
//!   synchronous contenders block. The rows of HTTP have the runtimes that they name, on any core.
//!   The time of a sample ends when the receiver has reported that it has everything.
//! - They take turns, round after round. A figure is the median over the rounds, and a ratio is the
//!   median of the ratios within a round. Times carry their unit (ns, µs or ms); rates are a
//!   second. CPU time is user and system time of both processes.
//! - A message with a descriptor starts with an `OwnedFd` of its own, made by `dup`, which is
//!   closed after it was sent. The receiver closes what it gets; in a round trip it sends it back.
//! - A receiver ends up with each long message whole in memory of its own.
//! - Each run checks the number and length of messages, and the number of descriptors.

mod acknowledged;
mod bars;
mod contenders;
mod ends;
mod handoff;
mod haproxy;
mod http;
mod machine;
mod measure;
mod plot;
mod processes;
mod report;
mod results;
mod reuse_port;
mod rows;
mod tasks;

use std::{
    error::Error,
    fs,
    io::IsTerminal,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;
use measure::Effort;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use results::{Machine, Results};

use crate::processes::Control;

#[derive(Parser)]
#[command(about = "fdwire against bare calls and other crates")]
struct Args {
    /// Measure only the rows and contenders whose name contains one of these words. If no word is
    /// part of a row's name, all rows are measured, and likewise for contenders
    words: Vec<String>,

    /// Rounds in which all contenders of a row take turns
    #[arg(long, default_value_t = 15)]
    rounds: usize,

    /// Time of one contender in one round, in milliseconds
    #[arg(long, default_value_t = 120)]
    sample: u64,

    /// Run everything once with few messages, to check that it works
    #[arg(long, alias = "quick")]
    test: bool,

    /// Print the names of rows and contenders
    #[arg(long)]
    list: bool,

    /// Write docs/BENCHMARKS.md and docs/benchmarks.svg
    #[arg(long, conflicts_with = "test")]
    report: bool,

    /// Measure nothing, and read the results of an earlier run
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,

    /// `cargo bench` passes this to every bench. Without it (`cargo test --benches`), `--test` is
    /// meant
    #[arg(long, hide = true)]
    bench: bool,

    /// Run as the other process: the far end of a contender of this row
    #[arg(long, hide = true, requires = "contender")]
    far_end: Option<String>,

    #[arg(long, hide = true)]
    contender: Option<String>,

    /// Run as the other process: a client that connects to this address
    #[arg(long, hide = true)]
    client: Option<SocketAddr>,

    /// Connections that the client keeps open
    #[arg(long, hide = true, default_value_t = 1)]
    window: usize,

    /// The bytes that the client sends first
    #[arg(long, hide = true, default_value = "")]
    request: String,

    /// The cores of the other process
    #[arg(long, hide = true, value_delimiter = ',')]
    cores: Vec<String>,
}

/// Cargo runs a bench in the directory of its package, which is not that of the documents.
const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.far_end.is_some() || args.client.is_some() {
        return run_other_process(&args);
    }
    if args.list {
        for row in rows::all() {
            println!("{}: {}", row.id, row.title);
            row.contenders.iter().for_each(|contender| println!("    {}", contender.name));
        }
        return Ok(());
    }
    let results = match &args.from {
        Some(path) => {
            let results = serde_json::from_slice(&fs::read(path)?)?;
            report::print_all(&results);
            results
        }
        None => measure(&args)?,
    };
    if args.report {
        let directory = Path::new(DOCS);
        fs::write(directory.join("BENCHMARKS.md"), report::markdown(&results))?;
        plot::draw(&results, &directory.join("benchmarks.svg"))?;
        println!("written to {}", directory.display());
    }
    Ok(())
}

/// Measures the chosen rows and prints each when it is done.
fn measure(args: &Args) -> Result<Results, Box<dyn Error>> {
    allow_many_fds()?;
    let effort = match args.test || !args.bench {
        true => Effort::Test,
        false => Effort::Rounds(args.rounds.max(1), Duration::from_millis(args.sample)),
    };
    let mut results = Results { machine: Machine::this(), rows: Vec::new() };
    report::print_machine(&results.machine);

    // A word chooses rows, contenders, or both.
    let rows = rows::all();
    let is_row = |word: &String| rows.iter().any(|row| row.id.contains(word.as_str()));
    let is_contender = |word: &String| {
        rows.iter().flat_map(|row| &row.contenders).any(|it| it.name.contains(word))
    };
    if let Some(word) = args.words.iter().find(|word| !is_row(word) && !is_contender(word)) {
        return Err(format!("no row and no contender has {word:?} in its name; see --list").into());
    }
    let (any_row, any_contender) =
        (!args.words.iter().any(is_row), !args.words.iter().any(is_contender));
    let chosen = |name: &str| args.words.iter().any(|word| name.contains(word.as_str()));

    // Measure row by row.
    for row in rows.iter().filter(|row| any_row || chosen(row.id)) {
        let contenders = row
            .contenders
            .iter()
            .filter(|it| any_contender || chosen(&it.name))
            .collect::<Vec<_>>();
        if std::io::stderr().is_terminal() {
            eprintln!("{} ...", row.title);
        }
        let result = measure::measure(row, &contenders, effort);
        match effort {
            Effort::Test => println!("{}: {} contenders, ok", row.title, contenders.len()),
            Effort::Rounds(..) => report::print_row(&result),
        }
        results.rows.push(result);
    }

    // Keep every sample for `--from`.
    if let Effort::Rounds(..) = effort {
        report::print_bars(&results);
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("transport.json");
        fs::write(&path, serde_json::to_vec_pretty(&results)?)?;
        println!("every sample is in {}", path.display());
    }
    Ok(results)
}

fn run_other_process(args: &Args) -> Result<(), Box<dyn Error>> {
    allow_many_fds()?;
    let cores = args.cores.iter().filter_map(|core| core.parse().ok()).collect::<Vec<usize>>();
    if !cores.is_empty() {
        processes::bind(&cores);
    }
    if let Some(address) = args.client {
        handoff::run_client(address, args.window, &args.request, Control::from_stdout());
        return Ok(());
    }
    let row = rows::all()
        .into_iter()
        .find(|row| Some(row.id) == args.far_end.as_deref())
        .ok_or("no such row")?;
    let contender = row.contenders.iter().find(|it| Some(&it.name) == args.contender.as_ref());
    measure::run_far_end(&row, contender.ok_or("no such contender")?);
    Ok(())
}

/// Raises the soft limit to the hard one: unless the sender is root, its descriptors in flight may
/// not exceed its `RLIMIT_NOFILE`.
fn allow_many_fds() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}
