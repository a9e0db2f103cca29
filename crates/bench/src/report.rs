//! The table that `make bench` prints.

use std::fmt;

/// What a figure has to satisfy.
#[derive(Clone, Copy)]
pub(crate) enum Reach {
    /// At most this much.
    AtMost(f64),
    /// At least this much.
    AtLeast(f64),
}

impl Reach {
    fn is_met_by(self, figure: f64) -> bool {
        match self {
            Self::AtMost(limit) => figure <= limit,
            Self::AtLeast(limit) => figure >= limit,
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
        }
    }
}

/// One line of the table.
pub(crate) struct Row {
    /// What was measured.
    pub(crate) what: &'static str,
    /// Ours; not a number if it could not be measured.
    pub(crate) ours: f64,
    /// The unit of all figures of the row.
    pub(crate) unit: &'static str,
    /// The goal.
    pub(crate) reach: Reach,
    /// What it is compared with, measured in the same run.
    pub(crate) compared: Vec<(String, f64)>,
}

/// Prints the table and says how many goals were reached.
pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:<52} {:>12} {:>10}  {:<12} compared with",
        "work", "ours", "reach", "verdict"
    );
    for row in rows {
        let verdict = match row.reach.is_met_by(row.ours) {
            true => "reached",
            false if row.ours.is_nan() => "not measured",
            false => "not reached",
        };
        let compared: Vec<_> = row
            .compared
            .iter()
            .map(|(name, figure)| format!("{name} {}", number(*figure)))
            .collect();
        println!(
            "{:<52} {:>9} {:<2} {:>10}  {:<12} {}",
            row.what,
            number(row.ours),
            row.unit,
            row.reach.to_string(),
            verdict,
            compared.join(", "),
        );
    }
    let reached = rows
        .iter()
        .filter(|row| row.reach.is_met_by(row.ours))
        .count();
    println!("{reached} of {} goals reached", rows.len());
}

fn number(figure: f64) -> String {
    if figure.is_nan() {
        "–".into()
    } else if figure < 100.0 {
        format!("{figure:.2}")
    } else {
        format!("{figure:.0}")
    }
}
