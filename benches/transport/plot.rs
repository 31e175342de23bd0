//! The results as a picture: a panel for each of six rows, with a bar for each contender, on a
//! logarithmic scale.

use std::{error::Error, path::Path};

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::{
    report::{ratio, time},
    results::{Measured, Results, RowResult},
    rows::Role,
};

/// The panels: the row, the title, and whether it shows CPU time instead of elapsed time.
const PANELS: [(&str, &str, bool); 6] = [
    ("64B-batched", "64 B, 64 messages at a time: time per message", false),
    ("64B-fd-batched", "64 B + 1 descriptor, 64 at a time: time per message", false),
    ("64B-round-trip", "64 B there and back: time per round trip", false),
    ("64B-fd-round-trip", "64 B + 1 descriptor there and back: time per round trip", false),
    ("1MiB", "1 MiB: time per message", false),
    ("hand-off", "TCP connection accepted, passed, answered: CPU time", true),
];

// The measures of the picture in pixels: the whole, a panel, and in a panel the columns of names
// and bars and the height of a line.
const WIDTH: i32 = 1100;
const MARGIN: i32 = 20;
const HEAD: i32 = 98;
const PANEL: i32 = 520;
const NAMES: i32 = 178;
const BARS: i32 = 210;
const LINE: i32 = 20;

/// The scale, in units of fdwire's time.
const SCALE: (f64, f64) = (0.2, 40.0);
const TICKS: [(f64, &str); 5] =
    [(0.3, "0.3×"), (1.0, "1×"), (3.0, "3×"), (10.0, "10×"), (30.0, "30×")];

const INK: RGBColor = RGBColor(31, 41, 55);
const FAINT: RGBColor = RGBColor(209, 213, 219);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

fn color(role: Role) -> RGBColor {
    match role {
        Role::Fdwire => RGBColor(37, 99, 235),
        Role::Bare | Role::Acknowledged => RGBColor(156, 163, 175),
        Role::Peer => RGBColor(234, 138, 60),
        Role::ByHand => RGBColor(246, 200, 150),
        Role::Reference => RGBColor(110, 170, 130),
    }
}

pub(crate) fn draw(results: &Results, path: &Path) -> Drawn {
    // Rows that were not measured have no panel. Two panels stand side by side.
    let panels = PANELS
        .iter()
        .filter_map(|panel| Some((panel, Panel::new(results.row(panel.0)?, panel.2)?)));
    let panels = panels.collect::<Vec<_>>();
    let heights = panels
        .chunks(2)
        .map(|pair| pair.iter().map(|(_, panel)| panel.height()).max().unwrap_or(0));
    let heights = heights.collect::<Vec<_>>();
    let height = HEAD + heights.iter().sum::<i32>() + MARGIN / 2;

    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?; // legible on dark pages too
    draw_head(&area, results)?;
    let mut y = HEAD;
    for (pair, height) in panels.chunks(2).zip(heights) {
        for (column, ((_, title, _), panel)) in pair.iter().enumerate() {
            panel.draw(&area, title, (MARGIN + column as i32 * (PANEL + MARGIN), y))?;
        }
        y += height;
    }
    area.present()?;
    Ok(())
}

fn draw_head(area: &Area<'_>, results: &Results) -> Drawn {
    text(
        area,
        "fdwire and its peers, two processes on two cores",
        (MARGIN, 26),
        22,
        HPos::Left,
        true,
    )?;
    let machine = &results.machine;
    let under = format!(
        "shorter is better, logarithmic, 1× = fdwire SEQPACKET; {}, {}",
        machine.kernel, machine.date
    );
    text(area, &under, (MARGIN, 50), 14, HPos::Left, false)?;
    let legend = [
        (Role::Fdwire, "fdwire"),
        (Role::Bare, "bare sendmsg / recvmsg"),
        (Role::Peer, "other crates"),
        (Role::ByHand, "the fastest with batches put together by hand"),
        (Role::Reference, "without passing"),
    ];
    let mut x = MARGIN;
    for (role, name) in legend {
        area.draw(&Rectangle::new([(x, 67), (x + 12, 79)], color(role).filled()))?;
        text(area, name, (x + 18, 73), 14, HPos::Left, false)?;
        x += 48 + name.len() as i32 * 6;
    }
    Ok(())
}

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, align: HPos, bold: bool) -> Drawn {
    let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
    let font = ("Helvetica, Arial, sans-serif", size).into_font().style(style);
    let style = TextStyle::from(font).color(&INK).pos(Pos::new(align, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

struct Panel<'a> {
    bars: Vec<&'a Measured>,
    fdwire: &'a Measured,
    cpu: bool,
}

impl<'a> Panel<'a> {
    fn new(row: &'a RowResult, cpu: bool) -> Option<Self> {
        let of = |role| row.contenders.iter().filter(move |contender| contender.role == role);
        let fdwire = of(Role::Fdwire).next()?;
        let mut panel = Self { bars: Vec::new(), fdwire, cpu };
        // Of the peers used by hand, only the fastest is shown. Peers are sorted by their time.
        let mut peers =
            of(Role::Peer).chain(row.fastest(|it| it.role == Role::ByHand)).collect::<Vec<_>>();
        peers.sort_by(|a, b| panel.relative(a).total_cmp(&panel.relative(b)));
        panel.bars = of(Role::Reference)
            .chain(of(Role::Bare))
            .chain(of(Role::Acknowledged))
            .chain(of(Role::Fdwire))
            .chain(peers)
            .collect();
        Some(panel)
    }

    fn value(&self, contender: &Measured) -> f64 {
        if self.cpu { contender.median_cpu_ns() } else { contender.median_ns() }
    }

    /// Returns a contender's time in units of fdwire's.
    fn relative(&self, contender: &Measured) -> f64 {
        if self.cpu {
            contender.median_cpu_ns() / self.fdwire.median_cpu_ns()
        } else {
            contender.times(self.fdwire)
        }
    }

    fn height(&self) -> i32 {
        (self.bars.len() as i32 + 2) * LINE + 22
    }

    fn draw(&self, area: &Area<'_>, title: &str, (left, top): (i32, i32)) -> Drawn {
        // Bars begin behind the names, and their length is the logarithm of the ratio.
        let start = left + NAMES;
        let place = |relative: f64| {
            let share = (relative / SCALE.0).ln() / (SCALE.1 / SCALE.0).ln();
            start + (share.clamp(0.0, 1.0) * f64::from(BARS)) as i32
        };
        text(area, title, (left, top + LINE / 2), 15, HPos::Left, true)?;

        // The scale.
        let (first, last) = (top + LINE + 4, top + LINE + 4 + self.bars.len() as i32 * LINE);
        for (relative, name) in TICKS {
            let (x, line) = (place(relative), if relative == 1.0 { INK } else { FAINT });
            area.draw(&PathElement::new([(x, first), (x, last)], line))?;
            text(area, name, (x, last + 9), 12, HPos::Center, false)?;
        }

        // A line for each contender: its name, its bar, its time and its ratio.
        for (contender, y) in self.bars.iter().zip((first..).step_by(LINE as usize)) {
            let middle = y + LINE / 2;
            let relative = self.relative(contender);
            text(
                area,
                &contender.name,
                (start - 8, middle),
                14,
                HPos::Right,
                contender.role == Role::Fdwire,
            )?;
            let bar = [(start, y + 3), (place(relative), y + LINE - 3)];
            area.draw(&Rectangle::new(bar, color(contender.role).filled()))?;
            let right = start + BARS;
            text(area, &time(self.value(contender)), (right + 68, middle), 13, HPos::Right, false)?;
            text(
                area,
                &format!("{}×", ratio(relative)),
                (right + 124, middle),
                13,
                HPos::Right,
                false,
            )?;
        }
        Ok(())
    }
}
