//! The tables that `make bench` prints, for a terminal or as Markdown.

use crate::measure::{Comparison, Samples};
use std::borrow::Cow;
use std::fmt;

/// What a figure has to satisfy.
#[derive(Clone, Copy)]
pub(crate) enum Reach {
    /// At most this much.
    AtMost(f64),
    /// At least this much.
    AtLeast(f64),
    /// Nothing: the figure is for information.
    Anything,
}

impl Reach {
    fn is_met_by(self, figure: f64) -> bool {
        match self {
            Self::AtMost(limit) => figure <= limit,
            Self::AtLeast(limit) => figure >= limit,
            Self::Anything => true,
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::Anything => Ok(()),
        }
    }
}

/// One line of the table.
pub(crate) struct Row {
    /// What was measured.
    pub(crate) what: &'static str,
    /// The unit of all figures of the row.
    pub(crate) unit: &'static str,
    /// The goal.
    pub(crate) reach: Reach,
    /// The figures, all of the same run.
    pub(crate) figures: Comparison,
    /// What stands in the way, printed if the goal is not reached.
    pub(crate) obstacle: Cow<'static, str>,
}

impl Row {
    fn ours(&self) -> f64 {
        self.figures.ours.median()
    }

    fn has_goal(&self) -> bool {
        !matches!(self.reach, Reach::Anything)
    }

    fn is_reached(&self) -> bool {
        self.reach.is_met_by(self.ours())
    }

    /// Whether the floor of the same run misses the goal: then the machine does, today.
    fn is_beyond_the_floor(&self) -> bool {
        let floor = self.figures.floor.as_ref();
        floor.is_some_and(|(_, floor)| !self.reach.is_met_by(floor.median()))
    }

    fn verdict(&self) -> &'static str {
        if self.ours().is_nan() {
            "not measured"
        } else if !self.has_goal() {
            ""
        } else if self.is_reached() {
            "reached"
        } else {
            "not reached"
        }
    }

    /// Median and middle half, which says how far the machine let itself be measured.
    fn spread(&self) -> String {
        let (low, high) = self.figures.ours.quartiles();
        format!("{}–{}", number(low), number(high))
    }

    fn cells(&self) -> [String; 8] {
        let named = |contender: Option<&(&'static str, Samples)>| {
            contender.map_or_else(String::new, |(name, samples)| {
                format!("{} {name}", number(samples.median()))
            })
        };
        let ratio = self
            .figures
            .best_peer()
            .map_or_else(String::new, |(_, peer)| {
                format!("{}×", number(self.figures.ours.over(peer).median()))
            });
        [
            self.what.to_owned(),
            format!("{} {}", number(self.ours()), self.unit)
                .trim_end()
                .to_owned(),
            self.spread(),
            named(self.figures.best_peer()),
            ratio,
            named(self.figures.floor.as_ref()),
            self.reach.to_string(),
            self.verdict().to_owned(),
        ]
    }
}

const HEADINGS: [&str; 8] = [
    "work",
    "ours",
    "middle half",
    "best peer",
    "ours / peer",
    "floor",
    "reach",
    "verdict",
];

/// How a table is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// In columns, for a terminal.
    Terminal,
    /// For `docs/performance.md`.
    Markdown,
}

impl Style {
    /// Prints a table.
    pub(crate) fn print_table<const N: usize>(self, headings: [&str; N], lines: &[[String; N]]) {
        let headings = headings.map(str::to_owned);
        match self {
            Self::Markdown => {
                println!("| {} |", headings.join(" | "));
                println!("|{}", "---|".repeat(N));
                for line in lines {
                    println!("| {} |", line.join(" | "));
                }
            }
            Self::Terminal => {
                let width = |column: usize| {
                    let cells = lines.iter().chain([&headings]);
                    cells.map(|line| line[column].chars().count()).max()
                };
                let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
                for line in [&headings].into_iter().chain(lines) {
                    let padded: Vec<_> = line
                        .iter()
                        .zip(widths)
                        .map(|(cell, width)| format!("{cell:width$}"))
                        .collect();
                    println!("{}", padded.join("  ").trim_end());
                }
            }
        }
    }
}

/// Prints the table, what stands in the way of goals that are not reached, and each peer's figures.
pub(crate) fn print(rows: &[Row], style: Style) {
    let lines: Vec<_> = rows.iter().map(Row::cells).collect();
    style.print_table(HEADINGS, &lines);
    let goals: Vec<_> = rows.iter().filter(|row| row.has_goal()).collect();
    let reached = goals.iter().filter(|row| row.is_reached()).count();
    println!("\n{reached} of {} goals reached", goals.len());
    for row in rows.iter().filter(|row| !row.is_reached()) {
        let floor = match row.is_beyond_the_floor() {
            true => "; in this run the floor alone misses the goal",
            false => "",
        };
        println!("- {}, {}: {}{floor}", row.what, row.verdict(), row.obstacle);
    }
    println!("\nEvery peer that can do the work:\n");
    let lines: Vec<_> = rows
        .iter()
        .filter(|row| !row.figures.peers.is_empty())
        .map(|row| {
            let peers: Vec<_> = row
                .figures
                .peers
                .iter()
                .map(|(name, samples)| format!("{name} {}", number(samples.median())))
                .collect();
            [
                row.what.to_owned(),
                row.unit.to_owned(),
                number(row.ours()),
                peers.join(", "),
            ]
        })
        .collect();
    style.print_table(["work", "unit", "ours", "peers"], &lines);
}

/// A figure with as many digits as it deserves.
pub(crate) fn number(figure: f64) -> String {
    match figure {
        _ if figure.is_nan() => "–".into(),
        _ if figure == 0.0 || figure.abs() >= 100.0 => format!("{figure:.0}"),
        _ if figure.abs() >= 10.0 => format!("{figure:.1}"),
        _ if figure.abs() >= 0.1 => format!("{figure:.2}"),
        _ => format!("{figure:.4}"),
    }
}
