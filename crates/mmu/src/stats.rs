//! Counters, as KVM publishes them for a VM.

use crate::reader::ReaderStats;

/// A snapshot of the counters of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// 4K leaves mapped now.
    pub pages_4k: u64,
    /// 2M leaves mapped now.
    pub pages_2m: u64,
    /// 1G leaves mapped now.
    pub pages_1g: u64,
    /// Tables that only the NX-huge-page mitigation keeps from being huge leaves.
    pub nx_lpage_splits: u64,
    /// TLB flushes of all virtual processors asked of the host.
    pub remote_tlb_flush: u64,
    /// Table pages given up by zaps.
    pub tables_zapped: u64,
    /// The faults of every reader that exists or existed.
    pub faults: ReaderStats,
    /// The slots' generation of each address space, without the in-progress bit.
    pub slots_generation: [u64; crate::region::ADDRESS_SPACES],
}
