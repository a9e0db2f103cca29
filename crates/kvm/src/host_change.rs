//! The program changes its own memory: KVM's MMU notifier.
//!
//! Before the real call, every mapping of the range is taken from every guest, and none can be made
//! again until the call has returned. So no vCPU ever writes into memory that has become
//! something else.

use crate::mappings;
use crate::vm::{self, Vm};
use std::sync::Arc;
use twofold_mmu::PendingChange;

/// A change of the program's memory in progress. Dropping it lets guests reach the range again,
/// as it is then.
#[must_use = "the range stays unreachable for guests until this is dropped"]
pub struct HostChange(Vec<(Arc<Vm>, Option<PendingChange>)>);

impl HostChange {
    /// Begins a change of `length` bytes at `address`, rounded to whole pages.
    pub(crate) fn begin(address: usize, length: usize) -> Option<Self> {
        if !vm::any() {
            return None;
        }
        mappings::forget_sizes();
        let start = address as u64 & !0xfff;
        let end = (address as u64)
            .saturating_add(length as u64)
            .checked_next_multiple_of(4096);
        let end = end.unwrap_or(u64::MAX);
        let changes = vm::all()
            .into_iter()
            .map(|vm| {
                let change = vm.tables().begin_host_change(start..end);
                (vm, Some(change))
            })
            .collect();
        Some(Self(changes))
    }
}

impl Drop for HostChange {
    fn drop(&mut self) {
        for (vm, change) in &mut self.0 {
            if let Some(change) = change.take() {
                vm.tables().end_host_change(change);
            }
        }
    }
}
