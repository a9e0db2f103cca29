//! The guest's processor as CPUID describes it.
//!
//! Every feature bit here is something that `twofold-cpu` executes, or a promise about memory that
//! the MMU keeps. The vendor follows the second stage: Intel's processor has EPT, AMD's has nested
//! paging.

use crate::second_stage::Kind;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use twofold_cpu::state::xcr0;
use twofold_cpu::{CpuidEntry, xsave};

/// Entries that one vCPU's table may have (`KVM_MAX_CPUID_ENTRIES`).
pub const MAX_ENTRIES: usize = 256;
/// Bits of a guest-physical address: what four levels of second-stage table translate.
pub const GUEST_ADDRESS_BITS: u32 = 48;

/// What KVM adds to the processor's own table.
mod added {
    /// Leaf 1, EDX: machine checks (two bits), the local APIC, which is the program's where KVM has
    /// none, and memory type range registers.
    pub(super) const LEAF_1_EDX: u32 = 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14;
    /// Leaf 1, ECX: x2APIC, which an in-kernel local APIC has, and the bit that says "a virtual
    /// machine".
    pub(super) const LEAF_1_ECX: u32 = 1 << 21 | 1 << 31;
    /// What AMD repeats of leaf 1's EDX in 0x80000001: all of it but SEP, SSE and SSE2.
    pub(super) const AMD_REPEATED: u32 = !(1 << 11 | 1 << 19 | 1 << 25 | 1 << 26);
}

/// The leaf that names what KVM offers its guests.
pub(crate) const KVM_FEATURES: u32 = 0x4000_0001;

/// Bits of EAX of [`KVM_FEATURES`] (`KVM_FEATURE_*` of `linux/kvm_para.h`).
pub(crate) mod feature {
    /// kvmclock by its old registers, and by those that others do not use.
    pub(crate) const CLOCK: u32 = 1 << 0;
    /// Ports need no time.
    const NO_DELAY: u32 = 1 << 1;
    pub(crate) const CLOCK_2: u32 = 1 << 3;
    pub(crate) const STEAL_TIME: u32 = 1 << 5;
    /// A vCPU that halts can be woken without an interrupt.
    pub(crate) const UNHALT: u32 = 1 << 7;
    pub(crate) const SEND_IPI: u32 = 1 << 11;
    pub(crate) const YIELD: u32 = 1 << 13;
    /// The clock may say of itself that all vCPUs see the same.
    const CLOCK_STABLE: u32 = 1 << 24;
    pub(super) const OFFERED: u32 =
        CLOCK | NO_DELAY | CLOCK_2 | STEAL_TIME | UNHALT | SEND_IPI | YIELD | CLOCK_STABLE;
}

/// Takes the promise to wake vCPUs that halt from a table: where HLT is the guest's own.
pub(crate) fn forget_unhalt(table: &mut [kvm_cpuid_entry2]) {
    for leaf in table
        .iter_mut()
        .filter(|leaf| leaf.function == KVM_FEATURES)
    {
        leaf.eax &= !feature::UNHALT;
    }
}

/// State components and XSAVE.
const XSAVE: u32 = 0xd;
/// Topology.
const TOPOLOGY: u32 = 0xb;

/// What `KVM_GET_SUPPORTED_CPUID` answers: [`supported`], without protection keys where the host has
/// none. Programs such as QEMU, for `-cpu host`, take the layout of XSAVE from the host's CPUID
/// instruction and pass it on to the guest, with a hole in it where the host lacks a component.
pub fn offered(kind: Kind) -> Vec<kvm_cpuid_entry2> {
    let mut table = supported(kind);
    if !xsave::host_has_pkru() {
        hide_protection_keys(&mut table);
    }
    table
}

/// The bits of XCR0 that go with [`offered`].
pub fn offered_components() -> u64 {
    if xsave::host_has_pkru() {
        xsave::components()
    } else {
        xsave::components() & !xcr0::PKRU
    }
}

/// Takes protection keys out of a table: the feature, and its component of XSAVE.
fn hide_protection_keys(table: &mut Vec<kvm_cpuid_entry2>) {
    const PKU: u32 = 1 << 3;
    let component = xcr0::PKRU.trailing_zeros();
    let left = xsave::components() & !xcr0::PKRU;
    table.retain(|leaf| (leaf.function, leaf.index) != (XSAVE, component));
    for leaf in table {
        match (leaf.function, leaf.index) {
            (7, 0) => leaf.ecx &= !PKU,
            (XSAVE, 0) => {
                leaf.eax = left as u32;
                leaf.ecx = xsave::standard_bytes(left) as u32;
                leaf.ebx = leaf.ecx;
            }
            (XSAVE, 1) => leaf.ebx = xsave::compacted_bytes(left) as u32,
            _ => {}
        }
    }
}

/// The processor's own table, with what belongs to the rest of a machine.
pub fn supported(kind: Kind) -> Vec<kvm_cpuid_entry2> {
    let processor = kind.machine_config().second_stage;
    let mut table: Vec<_> = twofold_cpu::cpuid::supported(processor, GUEST_ADDRESS_BITS as u8)
        .iter()
        .map(from_processor)
        .collect();
    let vendor = find(&table, 0, 0).copied().unwrap_or_default();
    let common = find(&table, 1, 0).map_or(0, |leaf| leaf.edx) | added::LEAF_1_EDX;
    for leaf in &mut table {
        match leaf.function {
            1 => {
                leaf.ecx |= added::LEAF_1_ECX;
                leaf.edx = common;
            }
            0x8000_0000 if kind == Kind::Npt => {
                (leaf.ebx, leaf.ecx, leaf.edx) = (vendor.ebx, vendor.ecx, vendor.edx);
            }
            0x8000_0001 if kind == Kind::Npt => leaf.edx |= common & added::AMD_REPEATED,
            _ => {}
        }
    }
    table.push(indexed(4, 0, 0, 0, 0, 0));
    table.push(indexed(TOPOLOGY, 0, 0, 0, 0, 0));
    let [kvm_b, kvm_c, kvm_d] = words(*b"KVMKVMKVM\0\0\0");
    table.push(entry(0x4000_0000, 0x4000_0001, kvm_b, kvm_c, kvm_d));
    table.push(entry(KVM_FEATURES, feature::OFFERED, 0, 0, 0));
    table.sort_by_key(|leaf| (leaf.function, leaf.index));
    table
}

/// An entry of the program's table as the processor takes it.
pub(crate) fn to_processor(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: entry.function,
        subleaf: entry.index,
        has_subleaf: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

pub(crate) fn from_processor(leaf: &CpuidEntry) -> kvm_cpuid_entry2 {
    let plain = entry(leaf.leaf, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx);
    if leaf.has_subleaf {
        kvm_cpuid_entry2 {
            index: leaf.subleaf,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..plain
        }
    } else {
        plain
    }
}

/// What `KVM_GET_EMULATED_CPUID` answers: features that are emulated although no processor
/// executes them. There is none, so the table holds only the leaves' frame.
pub fn emulated() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 7, 0, 0, 0),
        entry(1, 0, 0, 0, 0),
        indexed(7, 0, 0, 0, 0, 0),
    ]
}

/// Whether a table may describe a vCPU: linear addresses have 48 or 57 bits, where leaf
/// 0x80000008 says anything.
pub(crate) fn is_possible(table: &[kvm_cpuid_entry2]) -> bool {
    find(table, 0x8000_0008, 0).is_none_or(|leaf| matches!(leaf.eax >> 8 & 0xff, 0 | 48 | 57))
}

/// Bits of a guest-physical address for a vCPU with this table; 36 where it says nothing, as
/// processors without the leaf have it.
pub(crate) fn guest_address_bits(table: &[kvm_cpuid_entry2]) -> u32 {
    find(table, 0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff)
}

/// Whether the guest is told that it can run guests of its own: by VMX, or by SVM.
pub(crate) fn is_nested(table: &[kvm_cpuid_entry2]) -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let has = |leaf, bit| find(table, leaf, 0).is_some_and(|found| found.ecx & bit != 0);
    has(1, VMX) || has(0x8000_0001, SVM)
}

/// The entry for a leaf and subleaf.
pub(crate) fn find(
    table: &[kvm_cpuid_entry2],
    leaf: u32,
    subleaf: u32,
) -> Option<&kvm_cpuid_entry2> {
    table.iter().find(|entry| {
        entry.function == leaf
            && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == subleaf)
    })
}

fn entry(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn indexed(function: u32, index: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..entry(function, eax, ebx, ecx, edx)
    }
}

fn words(text: [u8; 12]) -> [u32; 3] {
    let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    [word(0), word(4), word(8)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_the_processors_or_one_that_kvm_adds() {
        for kind in [Kind::Ept, Kind::Npt] {
            let own = twofold_cpu::cpuid::supported(kind.machine_config().second_stage, 48);
            let table = supported(kind);
            assert!(
                table
                    .windows(2)
                    .all(|pair| (pair[0].function, pair[0].index)
                        < (pair[1].function, pair[1].index))
            );
            let own = |number| own.iter().find(|leaf| leaf.leaf == number).unwrap();
            let leaf = |number| find(&table, number, 0).unwrap();
            assert_eq!(leaf(1).ecx & !own(1).ecx, added::LEAF_1_ECX);
            assert_eq!(leaf(1).edx & !own(1).edx, added::LEAF_1_EDX);
            assert_eq!(leaf(7).ebx, own(7).ebx);
            assert_eq!(leaf(7).ecx, own(7).ecx);
            assert_eq!(leaf(0x8000_0001).ecx, own(0x8000_0001).ecx);
        }
    }

    #[test]
    fn without_protection_keys_no_leaf_speaks_of_them() {
        let mut table = supported(Kind::Ept);
        hide_protection_keys(&mut table);
        let leaf = |function, index| {
            let found = |leaf: &&kvm_cpuid_entry2| (leaf.function, leaf.index) == (function, index);
            table.iter().find(found)
        };
        assert_eq!(leaf(7, 0).unwrap().ecx & 1 << 3, 0);
        assert_eq!(leaf(XSAVE, 0).unwrap().eax & 1 << 9, 0);
        assert!(leaf(XSAVE, 9).is_none());
        let last = leaf(XSAVE, 2).map_or(576, |avx| avx.ebx + avx.eax);
        assert_eq!(leaf(XSAVE, 0).unwrap().ecx, last);
        assert_eq!(leaf(XSAVE, 1).unwrap().ebx, last);
    }

    #[test]
    fn the_vendor_is_spelled_in_ebx_edx_ecx() {
        for (kind, vendor) in [(Kind::Ept, b"GenuineIntel"), (Kind::Npt, b"AuthenticAMD")] {
            let table = supported(kind);
            let leaf = find(&table, 0, 0).unwrap();
            let spelled: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
                .iter()
                .flat_map(|w| w.to_le_bytes())
                .collect();
            assert_eq!(spelled, vendor);
        }
    }

    #[test]
    fn guest_physical_addresses_have_48_bits() {
        let table = supported(Kind::Ept);
        let leaf = find(&table, 0x8000_0008, 0).unwrap();
        assert_eq!(leaf.eax & 0xff, 48);
        assert!(is_possible(&table));
    }

    #[test]
    fn a_table_with_other_linear_address_sizes_is_refused() {
        assert!(!is_possible(&[entry(0x8000_0008, 32 << 8, 0, 0, 0)]));
        assert!(is_possible(&[entry(0x8000_0008, 57 << 8, 0, 0, 0)]));
        assert!(is_possible(&[]));
    }
}
