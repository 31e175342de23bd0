//! The cost of a router that chooses the worker by the server name of a TLS connection: handing the
//! connection over, as the example `sni_router` does, against passing all bytes on, by
//! `copy_bidirectional` and by haproxy. The text of the report explains the columns.
//!
//! ```text
//! cargo bench --bench sni_router               # prints tables
//! cargo bench --bench sni_router -- --report   # writes docs/BENCHMARKS_SNI_ROUTER.md as well
//! ```
//!
//! Routers and workers are processes of their own with one thread each. They run the code of the
//! example: [`router`] and [`hello`] find the worker, and [`worker`] serves the connections of all
//! contenders. The clients are in the process that measures; their CPU time does not count. The
//! contenders of a table take turns, round after round.

mod client;
mod figures;
mod servers;

#[path = "../../examples/services/sni_router/clients.rs"]
mod clients;
#[path = "../../examples/services/sni_router/hello.rs"]
mod hello;
#[path = "../../examples/services/sni_router/router.rs"]
#[allow(dead_code, reason = "the routers of the bench are killed, and do not drain")]
mod router;
#[path = "../../examples/services/sni_router/worker.rs"]
#[allow(dead_code, reason = "the workers of the bench have answers of their own")]
mod worker;

use std::{env, error::Error, fmt::Write as _, fs, path::Path, time::Duration};

use clap::Parser;
use client::{Client, Sample};
use figures::Figures;
use servers::{CONTENDERS, Contender, Servers};
use tokio::runtime::Builder;

#[derive(Parser)]
#[command(about = "Handing connections over by server name, against passing bytes on")]
struct Args {
    /// Rounds in which all contenders of a table take turns
    #[arg(long, default_value_t = 10)]
    rounds: usize,

    /// Time of one contender in one round, in milliseconds
    #[arg(long, default_value_t = 300)]
    sample: u64,

    /// Run one short round, to check that everything works
    #[arg(long)]
    test: bool,

    /// Write docs/BENCHMARKS_SNI_ROUTER.md
    #[arg(long, conflicts_with = "test")]
    report: bool,

    /// `cargo bench` passes this to every bench. Without it (`cargo test --benches`), `--test` is
    /// meant
    #[arg(long, hide = true)]
    bench: bool,
}

/// The behaviour of the clients of a table.
#[derive(Debug, Clone, Copy)]
struct Load {
    title: &'static str,
    /// Whether a connection carries many requests. If not, each request has its own.
    keep_alive: bool,
    answer_bytes: usize,
}

const LOADS: [Load; 3] = [
    Load {
        title: "A connection for each request, answers of 100 bytes",
        keep_alive: false,
        answer_bytes: 100,
    },
    Load { title: "Keep-alive, answers of 100 bytes", keep_alive: true, answer_bytes: 100 },
    Load { title: "Keep-alive, answers of 256 KiB", keep_alive: true, answer_bytes: 256 << 10 },
];

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    if let Ok(role) = env::var(servers::ROLE) {
        return servers::run(&role);
    }
    let args = Args::parse();
    let (rounds, window) = if args.test || !args.bench {
        (1, Duration::from_millis(20))
    } else {
        (args.rounds.max(1), Duration::from_millis(args.sample))
    };

    let directory = tempfile::tempdir()?;
    let mut report = String::from(HEAD);
    let servers = start(directory.path())?;
    for load in LOADS {
        let table = measure(load, &servers, rounds, window)?;
        print!("{table}");
        report += &table;
    }
    if args.report {
        fs::write(REPORT, report)?;
        println!("written to {REPORT}");
    }
    Ok(())
}

/// Starts every contender that is installed, with one certificate for all.
fn start(directory: &Path) -> Result<Vec<Servers>, Box<dyn Error + Send + Sync>> {
    servers::write_certificate(directory)?;
    let mut running = Vec::new();
    for contender in CONTENDERS {
        match Servers::start(contender, directory)? {
            Some(servers) => running.push(servers),
            None => eprintln!("{}: not installed; leaving it out", contender.name()),
        }
    }
    Ok(running)
}

/// Measures one load, and returns its table.
fn measure(
    load: Load,
    servers: &[Servers],
    rounds: usize,
    window: Duration,
) -> Result<String, Box<dyn Error + Send + Sync>> {
    // All contenders take turns, and each round begins with another one.
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut samples = vec![Vec::new(); servers.len()];
    for round in 0..=rounds {
        for turn in 0..servers.len() {
            let turn = (round + turn) % servers.len();
            let client = Client::new(&servers[turn], load);
            let sample = runtime.block_on(client.run(window))?;
            // The first round warms up.
            if round > 0 {
                samples[turn].push(sample);
            }
        }
    }

    // Report the medians. Differences and ratios are taken within a round.
    let mut table = format!(
        "\n## {}\n\n| | requests / s | quartiles | CPU / request | beyond no router | × fdwire |\n\
         |---|---:|---:|---:|---:|---:|\n",
        load.title
    );
    let by_name = |name: Contender| servers.iter().position(|it| it.contender == name);
    let base = &samples[by_name(Contender::NoRouter).ok_or("it is always there")?];
    let fdwire = &samples[by_name(Contender::Fdwire).ok_or("it is always there")?];
    for (servers, samples) in servers.iter().zip(&samples) {
        let name = servers.contender.name();
        let Figures { low, median, high } = Figures::of(samples.iter().map(Sample::rate));
        let cpu = samples.iter().map(Sample::cpu);
        let beyond = cpu.clone().zip(base).map(|(cpu, base)| cpu - base.cpu());
        let ratio = cpu.clone().zip(fdwire).map(|(cpu, fdwire)| cpu / fdwire.cpu());
        let [cpu, beyond, ratio] =
            [Figures::of(cpu), Figures::of(beyond), Figures::of(ratio)].map(|it| it.median);
        writeln!(
            table,
            "| {name} | {median:.0} | {low:.0} – {high:.0} | {cpu:.1} µs | {beyond:.1} µs | \
             {ratio:.2} |",
        )?;
    }
    Ok(table)
}

const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/BENCHMARKS_SNI_ROUTER.md");

const HEAD: &str = "\
# Benchmarks of a router by server name

Written by `cargo bench --bench sni_router -- --report`. Do not edit. Figures of other things are in
[BENCHMARKS.md](BENCHMARKS.md).

Clients open TLS connections (1.3, without resumption) and send HTTP/1.1 requests, 16 at a time. A
router finds the worker by the name in the ClientHello. The worker is the same everywhere: rustls
and hyper, with one thread, as each router has one.

- *no router*: the worker accepts by itself.
- *fdwire*: the example `sni_router`. It hands the connection to the worker, which then speaks with
  the client alone.
- *copy_bidirectional*: finds the worker in the same way, connects to it over a Unix socket, and
  passes all bytes on.
- *haproxy*: TCP mode, `req.ssl_sni`, over a Unix socket too; with its defaults, and with
  `option splice-auto`.

A figure is the median of all rounds. CPU is the time that the kernel's scheduler gave to router and
worker, without the clients. *beyond no router* is the difference to *no router* in the same round;
*× fdwire* is the CPU in units of that of *fdwire* in the same round. All processes and the clients
share the machine's cores.
";
