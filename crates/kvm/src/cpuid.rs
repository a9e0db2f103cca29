//! The guest's processor as CPUID describes it.
//!
//! Every feature bit here is something that `twofold-cpu` executes, or a promise about memory that
//! the MMU keeps. The vendor follows the second stage: Intel's processor has EPT, AMD's has nested
//! paging.

use crate::second_stage::Kind;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Entries that one vCPU's table may have (`KVM_MAX_CPUID_ENTRIES`).
pub const MAX_ENTRIES: usize = 256;
/// Bits of a guest-physical address: what four levels of second-stage table translate.
pub const GUEST_ADDRESS_BITS: u32 = 48;

const fn bits(numbers: &[u32]) -> u32 {
    let mut value = 0;
    let mut index = 0;
    while index < numbers.len() {
        value |= 1 << numbers[index];
        index += 1;
    }
    value
}

/// FPU, DE, PSE, TSC, MSR, PAE, CX8, SEP, MTRR, PGE, CMOV, PAT, PSE36, CLFSH, FXSR, SSE, SSE2.
const LEAF_1_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 8, 11, 12, 13, 15, 16, 17, 19, 24, 25, 26]);
/// SSE3, SSSE3, CX16, SSE4.1, SSE4.2, x2APIC (which an in-kernel local APIC has), MOVBE, POPCNT, and
/// the bit that says "a virtual machine".
const LEAF_1_ECX: u32 = bits(&[0, 9, 13, 19, 20, 21, 22, 23, 31]);
/// FSGSBASE, TSC_ADJUST, SMEP, ERMS, SMAP.
const LEAF_7_EBX: u32 = bits(&[0, 1, 7, 9, 20]);
/// LAHF in 64-bit mode, PREFETCHW.
const LEAF_8000_0001_ECX: u32 = bits(&[0, 8]);
/// SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const LEAF_8000_0001_EDX: u32 = bits(&[11, 20, 26, 27, 29]);
/// What AMD repeats of leaf 1's EDX: all of it but SEP, SSE and SSE2.
const AMD_REPEATED: u32 = LEAF_1_EDX & !bits(&[11, 19, 25, 26]);
/// The time stamp counter runs at one speed in every power state.
const INVARIANT_TSC: u32 = 1 << 8;

/// What `KVM_GET_SUPPORTED_CPUID` answers.
pub fn supported(kind: Kind) -> Vec<kvm_cpuid_entry2> {
    let (vendor, signature) = match kind {
        Kind::Ept => (*b"GenuineIntel", 0x0002_06a7),
        Kind::Npt => (*b"AuthenticAMD", 0x0080_0f12),
    };
    let [b, d, c] = words(vendor);
    let mut table = vec![
        entry(0, 0xb, b, c, d),
        // EBX: CLFLUSH lines of 8 quadwords.
        entry(1, signature, 8 << 8, LEAF_1_ECX, LEAF_1_EDX),
        indexed(4, 0, 0, 0, 0, 0),
        indexed(7, 0, 0, LEAF_7_EBX, 0, 0),
        indexed(0xb, 0, 0, 0, 0, 0),
    ];
    let [kvm_b, kvm_c, kvm_d] = words(*b"KVMKVMKVM\0\0\0");
    table.push(entry(0x4000_0000, 0x4000_0001, kvm_b, kvm_c, kvm_d));
    // No paravirtual features: no kvmclock, no asynchronous page faults.
    table.push(entry(0x4000_0001, 0, 0, 0, 0));
    let (extended_edx, vendor_words) = match kind {
        Kind::Ept => (LEAF_8000_0001_EDX, [0; 3]),
        Kind::Npt => (LEAF_8000_0001_EDX | AMD_REPEATED, [b, c, d]),
    };
    let [b, c, d] = vendor_words;
    table.push(entry(0x8000_0000, 0x8000_0008, b, c, d));
    table.push(entry(0x8000_0001, 0, 0, LEAF_8000_0001_ECX, extended_edx));
    let brand = brand();
    for (index, chunk) in brand.chunks_exact(16).enumerate() {
        let [b, c, d] = words([
            chunk[4], chunk[5], chunk[6], chunk[7], chunk[8], chunk[9], chunk[10], chunk[11],
            chunk[12], chunk[13], chunk[14], chunk[15],
        ]);
        let a = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        table.push(entry(0x8000_0002 + index as u32, a, b, c, d));
    }
    table.push(entry(0x8000_0007, 0, 0, 0, INVARIANT_TSC));
    table.push(entry(0x8000_0008, 48 << 8 | GUEST_ADDRESS_BITS, 0, 0, 0));
    table
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

fn brand() -> [u8; 48] {
    let mut brand = [0; 48];
    let text = b"Twofold virtual processor";
    brand[..text.len()].copy_from_slice(text);
    brand
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn guest_addresses_have_48_bits_both_ways() {
        let table = supported(Kind::Ept);
        let leaf = find(&table, 0x8000_0008, 0).unwrap();
        assert_eq!(leaf.eax, 0x3030);
        assert!(is_possible(&table));
    }

    #[test]
    fn a_table_with_other_linear_address_sizes_is_refused() {
        assert!(!is_possible(&[entry(0x8000_0008, 32 << 8, 0, 0, 0)]));
        assert!(is_possible(&[entry(0x8000_0008, 57 << 8, 0, 0, 0)]));
        assert!(is_possible(&[]));
    }
}
