//! What the MMU does to the entries of its tables, as log messages (`--log twofold_mmu=trace`).
//!
//! Where KVM has the trace events of `kvmmmu`, and most of all `kvm_tdp_mmu_spte_changed`.

use tracing::level_filters::LevelFilter;
use twofold_mmu::{Change, Tracer};

/// What such messages are called in a filter, whichever crate they come from.
pub(crate) const TARGET: &str = "twofold_mmu";

/// Writes a message for each change of an entry.
#[derive(Debug)]
struct Changes;

impl Tracer for Changes {
    fn changed(&self, change: Change) {
        tracing::trace!(
            target: TARGET,
            gfn = format_args!("{:#x}", change.gpa.frame().get()),
            level = change.height.get(),
            old = format_args!("{:#x}", change.old),
            new = format_args!("{:#x}", change.new),
            "entry changed"
        );
    }
}

/// Who is told of changed entries: nobody, as long as no filter lets messages of this kind pass.
#[inline(always)]
pub(crate) fn changes() -> Option<&'static dyn Tracer> {
    match LevelFilter::current() {
        LevelFilter::TRACE => Some(&Changes),
        _ => None,
    }
}
