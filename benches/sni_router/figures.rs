//! Medians and quartiles.

/// The median of some figures, and their quartiles `low` and `high`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Figures {
    /// # Panics
    /// Panics if there is no figure.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut figures = Vec::from_iter(figures);
        figures.sort_by(f64::total_cmp);
        let at = |quarter: usize| figures[(figures.len() - 1) * quarter / 4];
        Self { low: at(1), median: at(2), high: at(3) }
    }
}
