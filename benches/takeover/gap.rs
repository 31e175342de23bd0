//! The longest gap between two accepted connections, with a takeover and without.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    bars::{Bar, Need},
    figures::{in_milliseconds, median, milliseconds},
    load::{Load, longest_gap},
    processes::{Process, Result, free_address},
};

/// Short, so that little else than a takeover happens in it.
const WINDOW: Duration = Duration::from_millis(50);

pub(crate) fn measure(rounds: usize) -> Result<(String, Bar)> {
    let directory = tempfile::tempdir()?;
    let (path, address) = (directory.path().join("takeover"), free_address()?);
    let (mut serving, ..) = Process::serving(&path, address, 1)?;
    let load = Load::start(address);
    let [mut without, mut with] = [Vec::new(), Vec::new()];
    for _ in 0..3 * rounds {
        // The window without a takeover. The new process is there already, so that the takeover is
        // the only difference between the windows.
        let mut next = Process::server(&path, address, 1)?;
        next.report()?;
        sleep(2 * WINDOW); // its start has disturbed the others
        load.take();
        sleep(WINDOW);
        without.push(longest_gap(&load.take()));

        // The window with a takeover.
        let begin = Instant::now();
        next.go()?;
        next.report()?;
        sleep(WINDOW.saturating_sub(begin.elapsed()));
        with.push(longest_gap(&load.take()));
        serving = next; // the old one has accepted nothing since
    }
    load.stop()?;
    drop(serving);

    // Report the medians.
    let table = format!(
        "\n## The longest gap between two accepted connections\n\nIn windows of {} ms, with 4 \
         clients that connect again as soon as they are answered. No connection failed. The \
         clients keep all cores busy, so less is accepted while a takeover uses CPU.\n\n\
         | window | longest gap |\n|---|---|\n| without a takeover | {} |\n| with one | {} |\n",
        WINDOW.as_millis(),
        in_milliseconds(&without),
        in_milliseconds(&with),
    );
    let typical = |gaps: &[Duration]| median(gaps.iter().map(milliseconds));
    let figure = typical(&with) - typical(&without);
    let name = "longest gap with a takeover, beyond that without";
    Ok((table, Bar { name, figure, unit: " ms", need: Need::AtMost(1.0) }))
}
