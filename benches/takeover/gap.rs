//! The longest gap between two accepted connections, with a takeover and without.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    bars::{Bar, Need},
    figures::{in_milliseconds, milliseconds, quartiles},
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
        // Both windows have a second process, so only the takeover differs.
        let mut next = Process::server(&path, address, 1)?;
        next.report()?;
        sleep(2 * WINDOW); // it was started, which has disturbed the others
        load.take();
        sleep(WINDOW);
        without.push(longest_gap(&load.take()));

        let begin = Instant::now();
        next.go()?;
        next.report()?;
        sleep(WINDOW.saturating_sub(begin.elapsed()));
        with.push(longest_gap(&load.take()));
        serving = next; // the old one has accepted nothing since
    }
    load.stop()?;
    drop(serving);

    let table = format!(
        "\n## The longest gap between two accepted connections\n\nIn windows of {} ms, with 4 \
         clients that connect again as soon as they are answered. No connection failed.\n\n\
         | window | longest gap |\n|---|---|\n| without a takeover | {} |\n| with one | {} |\n",
        WINDOW.as_millis(),
        in_milliseconds(&without),
        in_milliseconds(&with),
    );
    // A usual window has a shorter gap than the upper quartile in three of four cases.
    let all = |gaps: &[Duration]| gaps.iter().map(milliseconds).collect::<Vec<_>>();
    let [_, with, _] = quartiles(&mut all(&with));
    let [.., without] = quartiles(&mut all(&without));
    let name = "median of the longest gaps with a takeover, in units of the upper quartile without";
    Ok((table, Bar { name, figure: with / without, unit: "", need: Need::AtMost(1.0) }))
}
