//! The results as tables, for the terminal and for `docs/BENCHMARKS.md`.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};

use crate::{
    bars::bars,
    results::{Machine, Measured, Results, RowResult},
};

pub(crate) fn print_machine(machine: &Machine) {
    println!("{}\n", machine.lines().join("\n").replace("**", "").replace('`', ""));
}

pub(crate) fn print_row(row: &RowResult) {
    println!("{}\n{}\n", row.title, table(&row_cells(row)));
}

pub(crate) fn print_bars(results: &Results) {
    println!("{}\n", table(&bar_cells(results)));
}

pub(crate) fn print_all(results: &Results) {
    print_machine(&results.machine);
    results.rows.iter().for_each(print_row);
    print_bars(results);
}

/// Returns the text of `docs/BENCHMARKS.md`.
pub(crate) fn markdown(results: &Results) -> String {
    let mut text = String::from(INTRODUCTION);
    for line in results.machine.lines() {
        let _ = writeln!(text, "- {line}");
    }
    let _ = write!(text, "\n{HOW_TO_READ}");
    for row in &results.rows {
        let _ = write!(text, "\n## {}\n\n{}\n", row.title, table(&row_cells(row)));
    }
    let _ = write!(text, "\n{BARS}\n{}\n", table(&bar_cells(results)));
    text
}

const INTRODUCTION: &str = "\
# Benchmarks

Written by `cargo bench --bench transport -- --report`. Do not edit.

![Time of fdwire and its peers](benchmarks.svg)

";

const HOW_TO_READ: &str = "\
Two processes, each on a core of its own, but for the rows of HTTP. All contenders of a row take
turns, round after round; a time is the median over the rounds with its quartiles, a ratio the
median of the ratios within a round. CPU is user and system time of both processes. Compare within a
row; between rows and machines only ratios mean something.

- *bare*: `sendmsg` and `recvmsg` on tokio's `AsyncFd`. What is flushed together goes in one call
  with all its descriptors, and the receiver does not take messages apart. It is the floor. The
  column *× bare* compares with it on the same kind of socket.
- *by hand*: the user puts all messages of a batch, and all their descriptors, into one call of the
  peer's, and takes them apart. Other rows of peers are what they do by themselves, message by
  message (`LengthDelimitedCodec`: fed and flushed like fdwire). *× fastest peer* compares with the
  fastest of those.
- Messages with a descriptor each start with one of their own, made by `dup`; the sender closes it
  after sending, and the receiver closes what it gets. ipc-channel can pass only handles of its own:
  it sends a sender, the same each time, without `dup`. It uses sockets of its own, with the
  system's default send buffer.
- On STREAM, a receiver that takes bytes takes all that is there: several messages, where they have
  no descriptors.
- From 64 KiB on each message is received whole into memory of its own. Contenders that are given
  memory to receive into get the same again for the next message, as from a pool. The shared memory
  of ipc-channel is mapped, and not read.
- On SEQPACKET, 16 MiB take several packets: of 1 MiB, a quarter of the send buffer, with fdwire and
  with bare calls, so that one is received while the next is sent; by tokio-seqpacket the largest
  that the socket takes.
- Tasks that share a socket send one message and let the others run. *mutex*: each locks, sends and
  flushes; *channel*: a task feeds what waits in a `tokio::sync::mpsc` and flushes; *shared*: all
  call `send` on one socket.
- A hand-off: a third process connects by TCP, one process accepts, passes the connection, and the
  worker writes 5 bytes and closes it. fdwire and bare calls send together what was accepted
  together. The client's CPU is not counted.
- HTTP: the same server everywhere (hyper, one request per connection). *one process* accepts and
  serves; *fdwire* is the hand-off layer (`Dispatcher::serve`, and `Incoming` with `next` or
  `next_batch`), with its promise that no connection is lost; *bare* accepts, sends each connection
  with a `sendmsg` and knows nothing of what becomes of it. *acknowledged* is bare, too, but the
  worker answers with one byte for each connection before it serves it (in one call for those that
  it received together), and the process that accepts keeps its copy until it has read that.
  Nothing else is checked: it is the floor of any hand-off that loses nothing when a worker dies.
  *added CPU* is what a contender takes beyond one process, *× bare's* and *× acknowledged's* what
  it adds in units of what those add, on the same kind of socket. One client waits for each answer
  before it connects again, so that every process sleeps between any two steps: all costs of waking
  up are there, and nothing is batched. Runtimes are as users have them, for one process and both
  ends of a hand-off alike: current-thread, which is what several workers are started for, and
  tokio's default, multi-thread; the loop that accepts is in `main`; no process is bound to a core.
";

const BARS: &str = "\
## Bars

The figures that fdwire has to reach. *time* is its time in units of the other's, *rate* its
messages a second.
";

/// Returns the table of a row, with its head. Rows with other crates have a column for the fastest
/// of them. Rows with a reference in one process have columns for the added CPU.
fn row_cells(row: &RowResult) -> Vec<Vec<String>> {
    let times = |contender: &Measured, other: Option<&Measured>| match other {
        Some(other) if other.name == contender.name => "1".to_owned(),
        Some(other) => ratio(contender.times(other)),
        None => String::new(),
    };

    // The head.
    let (unit, base) = (&row.unit, row.without_passing().filter(|_| row.fastest_peer().is_none()));
    let head =
        ["".to_owned(), format!("time / {unit}"), "quartiles".to_owned(), format!("{unit}s / s")];
    let head = head.into_iter().chain([format!("CPU / {unit}"), "× bare".to_owned()]);
    let last = match base {
        Some(_) => &["added CPU", "× bare's", "× acknowledged's"][..],
        None => &["× fastest peer"],
    };
    let mut cells =
        vec![head.chain(last.iter().map(|name| (*name).to_owned())).collect::<Vec<_>>()];

    // A line for each contender.
    for contender in &row.contenders {
        let (low, high) = contender.quartiles_ns();
        let mut line = vec![
            contender.name.clone(),
            time(contender.median_ns()),
            format!("{} – {}", time(low), time(high)),
            thousands(1e9 / contender.median_ns()),
            time(contender.median_cpu_ns()),
            times(contender, row.bare_for(contender)),
        ];
        match base {
            None => line.push(times(contender, row.fastest_peer())),
            Some(base) if base.name == contender.name => {
                line.extend([String::new(), String::new(), String::new()])
            }
            Some(base) => {
                line.push(time(contender.median_cpu_beyond(base)));
                for floor in [row.bare_for(contender), row.acknowledged_for(contender)] {
                    let times = |floor| ratio(contender.adds_times(floor, base));
                    line.push(floor.map_or_else(String::new, times));
                }
            }
        }
        cells.push(line);
    }
    cells
}

fn bar_cells(results: &Results) -> Vec<Vec<String>> {
    let mut cells = vec![["row", "figure", "bar", "is", ""].map(str::to_owned).to_vec()];
    for bar in bars(results) {
        cells.push(vec![
            bar.row.clone(),
            bar.what.clone(),
            bar.need(),
            ratio(bar.figure),
            bar.verdict().to_owned(),
        ]);
    }
    cells
}

/// Formats cells as a table; the first line is its head. Columns of figures are aligned to the
/// right.
fn table(cells: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(&cells[0]).add_rows(&cells[1..]);
    for column in table.column_iter_mut().skip(1) {
        let is_figure = |cell: &String| {
            cell.is_empty()
                || cell.starts_with(|first: char| first.is_ascii_digit() || first == '-')
        };
        if cells[1..].iter().all(|row| is_figure(&row[column.index])) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Formats a time with three significant digits and its unit.
pub(crate) fn time(ns: f64) -> String {
    let (value, unit) = match ns.abs() {
        ..1e3 => (ns, "ns"),
        ..1e6 => (ns / 1e3, "µs"),
        _ => (ns / 1e6, "ms"),
    };
    format!("{} {unit}", three_figures(value))
}

fn three_figures(value: f64) -> String {
    match value.abs() {
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

pub(crate) fn ratio(ratio: f64) -> String {
    three_figures(ratio)
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let parts =
        digits.as_bytes().rchunks(3).rev().map(|part| String::from_utf8_lossy(part).into_owned());
    parts.collect::<Vec<_>>().join(",")
}
