//! Timing that survives a noisy machine: contenders take turns, medians are quoted.

use std::time::Instant;

/// Rounds of every measurement.
pub(crate) const ROUNDS: usize = 11;

/// Nanoseconds that `work` takes per item.
pub(crate) fn nanoseconds_per_item(items: u64, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / items as f64
}

/// The median of `figures`. Not a number if there are none.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Medians of contenders that take turns for [`ROUNDS`] rounds, after one that does not count:
/// when the machine's speed drifts, it drifts for all of them.
pub(crate) fn in_turns<const N: usize>(mut contenders: [&mut dyn FnMut() -> f64; N]) -> [f64; N] {
    let mut figures = [const { Vec::new() }; N];
    for round in 0..=ROUNDS {
        for (contender, figures) in contenders.iter_mut().zip(&mut figures) {
            let figure = contender();
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    figures.map(median)
}
