//! Medians and quartiles.

use std::time::Duration;

/// Returns the quartiles. Reorders the figures.
pub(crate) fn quartiles(figures: &mut [f64]) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    let at = |quarter: usize| figures[(figures.len() - 1) * quarter / 4];
    [at(1), at(2), at(3)]
}

pub(crate) fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let [_, median, _] = quartiles(&mut figures.into_iter().collect::<Vec<_>>());
    median
}

pub(crate) fn milliseconds(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Returns the median with the quartiles, as text.
pub(crate) fn in_milliseconds(figures: &[Duration]) -> String {
    let mut figures: Vec<_> = figures.iter().map(milliseconds).collect();
    let [low, median, high] = quartiles(&mut figures);
    format!("{median:.2} ms ({low:.2} to {high:.2})")
}
