//! Faults on purpose: a module that finds its locks taken and is interrupted, so that whoever has
//! to call again can be seen to do so.
//!
//! The environment variable `TWOFOLD_TDX_INJECT` is a list of `POINT=N`, separated by commas: every
//! Nth time the module comes to that point it fails there.
//!
//! | point | what fails |
//! |---|---|
//! | `td` | locking the TD: `OPERAND_BUSY`, operand TDR |
//! | `tree` | locking the Secure EPT: `OPERAND_BUSY`, operand SEPT_TREE |
//! | `entry` | locking one of its entries: `OPERAND_BUSY`, operand SEPT_ENTRY |
//! | `epoch` | beginning a TLB epoch, or entering one: `OPERAND_BUSY`, operand TD_EPOCH |
//! | `busy` | all four |
//! | `interrupt` | ACCEPT of a 2 MiB page, after any of its pieces: the guest executes it again |
//!
//! With `seed=S` as well, a point fails one time in N on average, at times that look random and are
//! the same for the same seed. The count of each point is one for the whole process.

use std::sync::atomic::{AtomicU64, Ordering};
use twofold_tdx::Point;

const VARIABLE: &str = "TWOFOLD_TDX_INJECT";

/// When each point fails.
#[derive(Debug, Default)]
pub(super) struct Injection {
    td: Schedule,
    tree: Schedule,
    entry: Schedule,
    epoch: Schedule,
    interrupt: Schedule,
    seed: Option<u64>,
}

/// When one point fails: every `period`th time, or never if that is 0.
#[derive(Debug, Default)]
struct Schedule {
    period: u64,
    /// How often it was passed.
    passed: AtomicU64,
}

impl Schedule {
    fn fails(&self, seed: Option<u64>) -> bool {
        if self.period == 0 {
            return false;
        }
        let number = self.passed.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        match seed {
            None => number.is_multiple_of(self.period),
            Some(seed) => scatter(seed ^ scatter(number)).is_multiple_of(self.period),
        }
    }
}

/// A number that looks unlike its neighbours (the finaliser of SplitMix64).
const fn scatter(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

impl Injection {
    /// What `TWOFOLD_TDX_INJECT` asks for. A part that is not understood is named in a log line and
    /// left out.
    pub(super) fn from_environment() -> Self {
        Self::parse(&std::env::var(VARIABLE).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mut injection = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let number = part
                .split_once('=')
                .and_then(|(name, number)| Some((name.trim(), number.trim().parse().ok()?)));
            let understood = number.is_some_and(|(name, number)| injection.set(name, number));
            if !understood {
                tracing::warn!(
                    variable = VARIABLE,
                    part,
                    "not one of td=N, tree=N, entry=N, epoch=N, busy=N, interrupt=N, seed=S"
                );
            }
        }
        injection
    }

    fn set(&mut self, name: &str, number: u64) -> bool {
        match name {
            "td" => self.td.period = number,
            "tree" => self.tree.period = number,
            "entry" => self.entry.period = number,
            "epoch" => self.epoch.period = number,
            "busy" => {
                for point in [
                    &mut self.td,
                    &mut self.tree,
                    &mut self.entry,
                    &mut self.epoch,
                ] {
                    point.period = number;
                }
            }
            "interrupt" => self.interrupt.period = number,
            "seed" => self.seed = Some(number),
            _ => return false,
        }
        true
    }

    /// Whether a lock shall be found taken.
    pub(super) fn busy(&self, point: Point) -> bool {
        let schedule = match point {
            Point::Td => &self.td,
            Point::SeptTree => &self.tree,
            Point::SeptEntry => &self.entry,
            Point::TdEpoch => &self.epoch,
        };
        schedule.fails(self.seed)
    }

    /// Whether an interrupt shall be pending.
    pub(super) fn interrupt(&self) -> bool {
        self.interrupt.fails(self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str, point: Point) -> Vec<bool> {
        let injection = Injection::parse(text);
        (0..12).map(|_| injection.busy(point)).collect()
    }

    #[test]
    fn every_nth_time_fails_at_the_points_that_were_named() {
        let every_third: Vec<bool> = (1..=12).map(|number| number % 3 == 0).collect();
        assert_eq!(pattern("tree=3", Point::SeptTree), every_third);
        assert_eq!(pattern("tree=3", Point::Td), [false; 12]);
        for point in [Point::Td, Point::SeptTree, Point::SeptEntry, Point::TdEpoch] {
            assert_eq!(pattern("busy=3", point), every_third);
            assert_eq!(pattern("", point), [false; 12]);
        }
        let injection = Injection::parse("interrupt=2");
        assert!(!injection.interrupt());
        assert!(injection.interrupt());
    }

    #[test]
    fn a_seed_scatters_the_failures_in_the_same_way_each_time() {
        let one = pattern("busy=2,seed=7", Point::Td);
        assert_eq!(one, pattern("busy=2,seed=7", Point::Td));
        assert_ne!(one, pattern("busy=2,seed=8", Point::Td));
        assert!(one.contains(&true) && one.contains(&false));
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        let injection = Injection::parse("tree=3,nothing=4,td,epoch=x,entry=0");
        assert_eq!(injection.tree.period, 3);
        for schedule in [&injection.td, &injection.epoch, &injection.entry] {
            assert_eq!(schedule.period, 0);
        }
    }
}
