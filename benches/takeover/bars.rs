//! The bars: figures that a takeover has to reach.

use std::fmt::Write as _;

/// A figure and its limit.
pub(crate) struct Bar {
    pub(crate) name: &'static str,
    pub(crate) figure: f64,
    pub(crate) unit: &'static str,
    pub(crate) need: Need,
}

#[derive(Clone, Copy)]
pub(crate) enum Need {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    /// Returns a table of bars, in Markdown.
    pub(crate) fn table(bars: &[Self]) -> String {
        let mut table = String::from("\n## Bars\n\n| | figure | need | |\n|---|---|---|---|\n");
        for Self { name, figure, unit, need } in bars {
            let (need, is_met) = match need {
                Need::AtMost(limit) => (format!("at most {limit}{unit}"), figure <= limit),
                Need::AtLeast(limit) => (format!("at least {limit}{unit}"), figure >= limit),
            };
            let verdict = if is_met { "met" } else { "MISSED" };
            let _ = writeln!(table, "| {name} | {figure:.2}{unit} | {need} | {verdict} |");
        }
        table
    }
}
