//! What CPUID says in a TD.
//!
//! The module answers CPUID itself, with the processor's own values, except for the bits that the
//! program configures by `INIT_VM`. Leaves that it does not know raise #VE in the guest, which asks
//! KVM by hypercall and gets what `KVM_SET_CPUID2` says.

use crate::cpuid;
use crate::second_stage::Kind;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, EBX: the APIC's id and how many there are.
const TOPOLOGY: u32 = 0xffff_0000;
/// Leaf 7, EBX: instructions that a program may want to hide (BMI1, AVX2, BMI2, ERMS, RDSEED, ADX,
/// SHA). What page tables mean is not among them.
const INSTRUCTIONS: u32 = 1 << 3 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 18 | 1 << 19 | 1 << 29;
/// Leaf 0x80000008, EAX: guest-physical address bits, by which the program chooses where the shared
/// bit is.
const GUEST_ADDRESS_BITS: u32 = 0xff << 16;
/// And the physical address bits below it: what a guest's page tables may hold.
const PHYSICAL_ADDRESS_BITS: u32 = 0xff;
/// Leaves from here to 0x400000ff describe the hypervisor, not the processor.
const HYPERVISOR: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;

const LEAF_1: u32 = 1;
const LEAF_7: u32 = 7;
const TOPOLOGY_LEAVES: [u32; 2] = [4, 0xb];
const ADDRESS_BITS_LEAF: u32 = 0x8000_0008;

/// The leaves of which a program may configure something, with the bits that it may set.
pub(super) fn configurable() -> Vec<kvm_cpuid_entry2> {
    native()
        .filter_map(|leaf| configurable_bits(&leaf))
        .collect()
}

fn native() -> impl Iterator<Item = kvm_cpuid_entry2> {
    cpuid::supported(Kind::Ept)
        .into_iter()
        .filter(|leaf| !HYPERVISOR.contains(&leaf.function))
}

fn configurable_bits(leaf: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let bits = |eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    match leaf.function {
        LEAF_1 => Some(bits(u32::MAX, TOPOLOGY, 0, 0)),
        LEAF_7 if leaf.index == 0 => Some(bits(0, leaf.ebx & INSTRUCTIONS, 0, 0)),
        ADDRESS_BITS_LEAF => Some(bits(GUEST_ADDRESS_BITS, 0, 0, 0)),
        function if TOPOLOGY_LEAVES.contains(&function) => {
            Some(bits(u32::MAX, u32::MAX, u32::MAX, u32::MAX))
        }
        _ => None,
    }
}

/// Why a configuration is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It names a leaf that cannot be configured, or no width of addresses that there is.
    Leaf,
    /// It sets a bit that cannot be configured: the module's answer, `OPERAND_INVALID`.
    Bit,
}

/// Bits of a guest-physical address that a configuration asks for: 48 or 52.
pub(super) fn address_width(table: &[kvm_cpuid_entry2]) -> Option<u8> {
    let leaf = exact(table, ADDRESS_BITS_LEAF, 0)?;
    match (leaf.eax & GUEST_ADDRESS_BITS) >> 16 {
        width @ (48 | 52) => Some(width as u8),
        _ => None,
    }
}

/// The entry for exactly this leaf and subleaf, as KVM looks for them here.
fn exact(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    table
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == index)
}

/// What CPUID says in a TD that was configured like this.
pub(super) fn table(
    configured: &[kvm_cpuid_entry2],
    width: u8,
) -> Result<Vec<kvm_cpuid_entry2>, Refused> {
    let mut used = 0;
    let mut table = Vec::new();
    for mut leaf in native() {
        if let Some(bits) = configurable_bits(&leaf) {
            let wanted = exact(configured, leaf.function, leaf.index);
            used += usize::from(wanted.is_some());
            let wanted = wanted.copied().unwrap_or_default();
            for (value, wanted, bits) in [
                (&mut leaf.eax, wanted.eax, bits.eax),
                (&mut leaf.ebx, wanted.ebx, bits.ebx),
                (&mut leaf.ecx, wanted.ecx, bits.ecx),
                (&mut leaf.edx, wanted.edx, bits.edx),
            ] {
                if wanted & !bits != 0 {
                    return Err(Refused::Bit);
                }
                *value = *value & !bits | wanted & bits;
            }
        }
        if leaf.function == ADDRESS_BITS_LEAF {
            leaf.eax = leaf.eax & !(GUEST_ADDRESS_BITS | PHYSICAL_ADDRESS_BITS)
                | u32::from(width) << 16
                | 52;
        }
        leaf.flags &= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        table.push(leaf);
    }
    // As KVM counts them: an entry that was not used may be one too many or one twice.
    if used == configured.len() {
        Ok(table)
    } else {
        Err(Refused::Leaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        }
    }

    #[test]
    fn a_program_chooses_the_address_width_and_nothing_that_does_not_exist() {
        for width in [48, 52] {
            let configured = [entry(ADDRESS_BITS_LEAF, width << 16)];
            assert_eq!(address_width(&configured), Some(width as u8));
            let table = table(&configured, width as u8).unwrap();
            let leaf = exact(&table, ADDRESS_BITS_LEAF, 0).unwrap();
            assert_eq!(leaf.eax >> 16 & 0xff, width);
        }
        for width in [0, 47, 49, 57] {
            assert_eq!(
                address_width(&[entry(ADDRESS_BITS_LEAF, width << 16)]),
                None
            );
        }
        assert_eq!(address_width(&[]), None);
        let twice = [entry(1, 0), entry(1, 0)];
        assert_eq!(table(&twice, 48), Err(Refused::Leaf));
        assert_eq!(table(&[entry(0x1234, 0)], 48), Err(Refused::Leaf));
        let unknown = kvm_cpuid_entry2 {
            ebx: 1 << 12, // PQM
            ..entry(7, 0)
        };
        assert_eq!(table(&[unknown], 48), Err(Refused::Bit));
    }

    #[test]
    fn bits_that_cannot_be_configured_are_the_processors_own() {
        let table = table(&[], 48).unwrap();
        let native: Vec<_> = native().collect();
        assert_eq!(table.len(), native.len());
        for (leaf, native) in table.iter().zip(&native) {
            if configurable_bits(native).is_none() {
                assert_eq!(leaf, native);
            }
        }
        assert_eq!(
            exact(&table, 1, 0).unwrap().ecx,
            exact(&native, 1, 0).unwrap().ecx
        );
        assert!(
            table
                .iter()
                .all(|leaf| !HYPERVISOR.contains(&leaf.function))
        );
    }
}
