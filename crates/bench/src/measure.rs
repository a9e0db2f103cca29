//! Measuring on a noisy machine: contenders take turns, medians are quoted, and ratios are formed
//! round by round, so that what slows both down cancels.
//!
//! [`Meter::Instructions`] runs the same rounds once each for `callgrind`, which counts only what
//! happens inside [`counted`].

use anyhow::{Context, Result, ensure};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Rounds of every measurement, after one that does not count.
const ROUNDS: usize = 21;

/// What a run finds out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Meter {
    /// Nanoseconds, over many rounds.
    Time,
    /// Instructions, over one round.
    Instructions,
}

impl Meter {
    /// Gigabytes of guest memory for rows about a guest too large for the caches. How many
    /// instructions a page takes does not depend on it, and `callgrind` is slow.
    pub(crate) const fn large_guest(self) -> u64 {
        match self {
            Self::Time => 64 << 30,
            Self::Instructions => 1 << 30,
        }
    }
}

/// Items of the last piece of work that [`per_item`] ran under the counter, 0 before.
static COUNTED_ITEMS: AtomicU64 = AtomicU64::new(0);

/// Pieces of work that ran under the counter, each of which has a file of counts.
static COUNTED: AtomicU64 = AtomicU64::new(0);

/// Whether [`per_item`] runs its work under the counter.
static UNDER_COUNTER: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// `callgrind` is told to count inside this function only (see `instructions.rs`).
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

/// Nanoseconds that `work` takes per item.
pub(crate) fn per_item(items: u64, work: impl FnOnce()) -> f64 {
    let mut work = Some(work);
    let mut work = || {
        if let Some(work) = work.take() {
            work();
        }
    };
    if UNDER_COUNTER.load(Ordering::Relaxed) {
        counted(&mut work);
        COUNTED.fetch_add(1, Ordering::Relaxed);
        COUNTED_ITEMS.store(items, Ordering::Relaxed);
        return f64::NAN;
    }
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / items as f64
}

/// Figures of one contender, one a round.
#[derive(Clone, Debug)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Figures measured elsewhere, one a round.
    pub(crate) fn of(figures: Vec<f64>) -> Self {
        Self(figures)
    }

    /// A single figure, measured elsewhere.
    pub(crate) fn one(figure: f64) -> Self {
        Self(vec![figure])
    }

    /// The figure below which the fraction `part` of all lies. Not a number if there are none.
    fn quantile(&self, part: f64) -> f64 {
        let mut figures = self.0.clone();
        figures.sort_by(f64::total_cmp);
        let last = figures.len().saturating_sub(1) as f64;
        figures
            .get((part * last).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// The median.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The middle half: first and third quartile.
    pub(crate) fn quartiles(&self) -> (f64, f64) {
        (self.quantile(0.25), self.quantile(0.75))
    }

    /// All figures in another unit.
    pub(crate) fn times(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|figure| figure * factor).collect())
    }

    /// `self / other`, round by round.
    pub(crate) fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }
}

/// What a contender is to the comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Ours,
    Peer(&'static str),
    Floor(&'static str),
}

type Round<'a> = Box<dyn FnMut() -> Result<f64> + 'a>;

/// Contenders that do the same work in turns.
pub(crate) struct Contest<'a> {
    what: &'static str,
    contenders: Vec<(Role, Round<'a>)>,
}

impl<'a> Contest<'a> {
    /// A contest without contenders yet.
    pub(crate) fn new(what: &'static str) -> Self {
        Self {
            what,
            contenders: Vec::new(),
        }
    }

    fn with(mut self, role: Role, round: impl FnMut() -> Result<f64> + 'a) -> Self {
        self.contenders.push((role, Box::new(round)));
        self
    }

    /// Our way of doing it. Each call of `round` is one round and returns its figure.
    pub(crate) fn ours(self, round: impl FnMut() -> Result<f64> + 'a) -> Self {
        self.with(Role::Ours, round)
    }

    /// Another crate's.
    pub(crate) fn peer(self, name: &'static str, round: impl FnMut() -> Result<f64> + 'a) -> Self {
        self.with(Role::Peer(name), round)
    }

    /// What cannot be undercut.
    pub(crate) fn floor(self, name: &'static str, round: impl FnMut() -> Result<f64> + 'a) -> Self {
        self.with(Role::Floor(name), round)
    }

    /// Lets them take turns.
    ///
    /// # Errors
    /// The first failure of a contender: its figures would mean nothing.
    pub(crate) fn run(mut self, meter: Meter) -> Result<Comparison> {
        let rounds = match meter {
            Meter::Time => ROUNDS,
            Meter::Instructions => 1,
        };
        let mut figures = vec![Vec::with_capacity(rounds); self.contenders.len()];
        for round in 0..=rounds {
            let under_counter = meter == Meter::Instructions && round > 0;
            UNDER_COUNTER.store(under_counter, Ordering::Relaxed);
            for ((role, contender), figures) in self.contenders.iter_mut().zip(&mut figures) {
                COUNTED_ITEMS.store(0, Ordering::Relaxed);
                let before = COUNTED.load(Ordering::Relaxed);
                let figure = contender().with_context(|| format!("{}: {role:?}", self.what))?;
                // Files of counts are told apart by their order alone.
                let pieces = COUNTED.load(Ordering::Relaxed) - before;
                ensure!(
                    pieces <= 1,
                    "{}: {role:?} measures {pieces} pieces of work in a round, and says one figure",
                    self.what
                );
                let items = COUNTED_ITEMS.load(Ordering::Relaxed);
                if items > 0 {
                    crate::instructions::announce(self.what, role.name(), items);
                }
                if round > 0 {
                    figures.push(figure);
                }
            }
        }
        UNDER_COUNTER.store(false, Ordering::Relaxed);
        let mut comparison = Comparison::of(Samples::one(f64::NAN));
        for ((role, _), figures) in self.contenders.iter().zip(figures) {
            let samples = Samples(figures);
            match *role {
                Role::Ours => comparison.ours = samples,
                Role::Peer(name) => comparison.peers.push((name, samples)),
                Role::Floor(name) => comparison.floor = Some((name, samples)),
            }
        }
        Ok(comparison)
    }
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => crate::instructions::OURS,
            Self::Peer(name) | Self::Floor(name) => name,
        }
    }
}

/// What a contest came to.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    /// Ours.
    pub(crate) ours: Samples,
    /// Other crates that can do the work.
    pub(crate) peers: Vec<(&'static str, Samples)>,
    /// What cannot be undercut.
    pub(crate) floor: Option<(&'static str, Samples)>,
}

impl Comparison {
    /// Ours alone.
    pub(crate) const fn of(ours: Samples) -> Self {
        Self {
            ours,
            peers: Vec::new(),
            floor: None,
        }
    }

    /// The peer with the smallest median.
    pub(crate) fn best_peer(&self) -> Option<&(&'static str, Samples)> {
        self.peers
            .iter()
            .min_by(|(_, a), (_, b)| a.median().total_cmp(&b.median()))
    }

    /// All figures in another unit.
    pub(crate) fn times(&self, factor: f64) -> Self {
        let scale = |(name, samples): &(&'static str, Samples)| (*name, samples.times(factor));
        Self {
            ours: self.ours.times(factor),
            peers: self.peers.iter().map(scale).collect(),
            floor: self.floor.as_ref().map(scale),
        }
    }
}
