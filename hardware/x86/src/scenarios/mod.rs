//! What is shown, one line each.

mod faults;

use crate::host::tables_in_use;
use crate::processor::Virtualization;
use crate::vm::Failure;
use crate::{heap, println};

/// What a scenario came to.
pub enum Verdict {
    /// Everything was as it should be; what was seen, in a few words.
    Shown(&'static str),
    /// The processor cannot do that.
    NotHere(&'static str),
}

type Scenario = fn() -> Result<Verdict, Failure>;

/// Fails a scenario unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($explanation:tt)+) => {
        if !$condition {
            return Err(alloc::format!($($explanation)+));
        }
    };
}

/// Runs every scenario and prints a line for each. Returns whether none failed.
pub fn run<V: Virtualization>() -> bool {
    let scenarios: &[(&str, Scenario)] = &[("not-present fault", faults::not_present::<V>)];
    let (mut shown, mut failed, mut not_here) = (0, 0, 0);
    for (name, scenario) in scenarios {
        let heap_before = heap::used();
        let result = scenario().and_then(|verdict| {
            let (tables, heap) = (tables_in_use(), heap::used());
            ensure!(tables == 0, "{tables} table pages were not given back");
            ensure!(heap == heap_before, "{} bytes leaked", heap - heap_before);
            Ok(verdict)
        });
        match result {
            Ok(Verdict::Shown(what)) => {
                shown += 1;
                println!("= {name} | ok | {what}");
            }
            Ok(Verdict::NotHere(why)) => {
                not_here += 1;
                println!("= {name} | - | {why}");
            }
            Err(why) => {
                failed += 1;
                println!("= {name} | FAILED | {why}");
            }
        }
    }
    println!("{shown} shown, {failed} failed, {not_here} not on this processor");
    failed == 0
}
