//! The CPUID instruction and the table of what this processor offers.

use crate::control_registers::CR4_BITS;
use crate::core_state::Core;
use crate::machine::SecondStageKind;
use crate::random::Sources;
use crate::simd::Host;
use crate::state::{CpuidEntry, cr4, xcr0};
use crate::xsave;

/// Leaf 1, EDX.
mod leaf1_edx {
    pub(super) const FPU: u32 = 1 << 0;
    pub(super) const DE: u32 = 1 << 2;
    pub(super) const PSE: u32 = 1 << 3;
    pub(super) const TSC: u32 = 1 << 4;
    pub(super) const MSR: u32 = 1 << 5;
    pub(super) const PAE: u32 = 1 << 6;
    pub(super) const CX8: u32 = 1 << 8;
    pub(super) const SEP: u32 = 1 << 11;
    pub(super) const PGE: u32 = 1 << 13;
    pub(super) const CMOV: u32 = 1 << 15;
    pub(super) const PAT: u32 = 1 << 16;
    pub(super) const PSE36: u32 = 1 << 17;
    pub(super) const CLFLUSH: u32 = 1 << 19;
    pub(super) const MMX: u32 = 1 << 23;
    pub(super) const FXSR: u32 = 1 << 24;
    pub(super) const SSE: u32 = 1 << 25;
    pub(super) const SSE2: u32 = 1 << 26;
}

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub(super) const SSE3: u32 = 1 << 0;
    pub(super) const PCLMULQDQ: u32 = 1 << 1;
    pub(super) const SSSE3: u32 = 1 << 9;
    pub(super) const FMA: u32 = 1 << 12;
    pub(super) const CX16: u32 = 1 << 13;
    pub(super) const SSE41: u32 = 1 << 19;
    pub(super) const SSE42: u32 = 1 << 20;
    pub(super) const PCID: u32 = 1 << 17;
    pub(super) const MOVBE: u32 = 1 << 22;
    pub(super) const POPCNT: u32 = 1 << 23;
    pub(super) const AES: u32 = 1 << 25;
    pub(super) const XSAVE: u32 = 1 << 26;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const AVX: u32 = 1 << 28;
    pub(super) const F16C: u32 = 1 << 29;
    pub(super) const RDRAND: u32 = 1 << 30;
}

/// Leaf 7 subleaf 0, EBX.
mod leaf7_ebx {
    pub(super) const FSGSBASE: u32 = 1 << 0;
    pub(super) const TSC_ADJUST: u32 = 1 << 1;
    pub(super) const BMI1: u32 = 1 << 3;
    pub(super) const AVX2: u32 = 1 << 5;
    pub(super) const SMEP: u32 = 1 << 7;
    pub(super) const BMI2: u32 = 1 << 8;
    pub(super) const ERMS: u32 = 1 << 9;
    pub(super) const INVPCID: u32 = 1 << 10;
    /// The x87 unit stores no selectors.
    pub(super) const NO_FCS_FDS: u32 = 1 << 13;
    pub(super) const RDSEED: u32 = 1 << 18;
    pub(super) const ADX: u32 = 1 << 19;
    pub(super) const SMAP: u32 = 1 << 20;
    pub(super) const CLFLUSHOPT: u32 = 1 << 23;
    pub(super) const CLWB: u32 = 1 << 24;
}

/// Leaf 7 subleaf 0, ECX.
mod leaf7_ecx {
    pub(super) const UMIP: u32 = 1 << 2;
    pub(super) const PKU: u32 = 1 << 3;
    pub(super) const OSPKE: u32 = 1 << 4;
    pub(super) const VAES: u32 = 1 << 9;
    pub(super) const VPCLMULQDQ: u32 = 1 << 10;
    pub(super) const LA57: u32 = 1 << 16;
    pub(super) const RDPID: u32 = 1 << 22;
}

/// Leaf 7 subleaf 0, EDX.
mod leaf7_edx {
    pub(super) const SERIALIZE: u32 = 1 << 14;
}

/// Leaf 0xD: state components.
mod leaf_d {
    /// The leaf.
    pub(super) const LEAF: u32 = 0xd;
    /// Subleaf 1, EAX.
    pub(super) const XSAVEOPT: u32 = 1 << 0;
    pub(super) const XSAVEC: u32 = 1 << 1;
    pub(super) const XGETBV_ECX_1: u32 = 1 << 2;
}

/// Leaf 0x80000001.
mod extended {
    pub(super) const ECX_LAHF: u32 = 1 << 0;
    pub(super) const ECX_LZCNT: u32 = 1 << 5;
    pub(super) const ECX_PREFETCHW: u32 = 1 << 8;
    pub(super) const EDX_SYSCALL: u32 = 1 << 11;
    pub(super) const EDX_NX: u32 = 1 << 20;
    pub(super) const EDX_1G: u32 = 1 << 26;
    pub(super) const EDX_RDTSCP: u32 = 1 << 27;
    pub(super) const EDX_LM: u32 = 1 << 29;
}

/// What the processor offers: the leaves that describe the processor itself. A hypervisor adds
/// its own (0x40000000), the topology and the APIC.
///
/// Every feature in it is executed, and no feature is executed that is not in it and that this
/// table could name, except where a program is never told to look.
///
/// `physical_bits` is MAXPHYADDR as the guest sees it.
pub fn supported(kind: SecondStageKind, physical_bits: u8) -> Vec<CpuidEntry> {
    let vendor: &[u8; 12] = match kind {
        SecondStageKind::Ept => b"GenuineIntel",
        SecondStageKind::Npt => b"AuthenticAMD",
    };
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
    };
    let [ebx, edx, ecx] = [
        word(&vendor[0..4]),
        word(&vendor[4..8]),
        word(&vendor[8..12]),
    ];
    let entry = |leaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    };
    let host_has = Host::detected();
    let random = Sources::detected();
    let vector_extensions = bits_of(&[
        (host_has.sse3, leaf1_ecx::SSE3),
        (host_has.pclmulqdq, leaf1_ecx::PCLMULQDQ),
        (host_has.ssse3, leaf1_ecx::SSSE3),
        (host_has.sse41, leaf1_ecx::SSE41),
        (host_has.sse42, leaf1_ecx::SSE42),
        (host_has.aes, leaf1_ecx::AES),
        (host_has.avx, leaf1_ecx::AVX),
        (host_has.f16c, leaf1_ecx::F16C),
        (host_has.fma, leaf1_ecx::FMA),
    ]);
    let avx2 = bits_of(&[(host_has.avx2, leaf7_ebx::AVX2)]);
    let wide_crypto = bits_of(&[
        (host_has.vaes, leaf7_ecx::VAES),
        (host_has.vpclmulqdq, leaf7_ecx::VPCLMULQDQ),
    ]);
    let signature = match kind {
        // Family 6 model 85, and family 25 model 1.
        SecondStageKind::Ept => 0x0005_0654,
        SecondStageKind::Npt => 0x00a0_0f11,
    };
    let mut table = vec![
        entry(0, leaf_d::LEAF, ebx, ecx, edx),
        entry(
            1,
            signature,
            // CLFLUSH lines of 64 bytes.
            8 << 8,
            vector_extensions
                | leaf1_ecx::CX16
                | leaf1_ecx::PCID
                | leaf1_ecx::MOVBE
                | leaf1_ecx::POPCNT
                | leaf1_ecx::XSAVE
                | if random.rdrand { leaf1_ecx::RDRAND } else { 0 },
            leaf1_edx::FPU
                | leaf1_edx::DE
                | leaf1_edx::PSE
                | leaf1_edx::TSC
                | leaf1_edx::MSR
                | leaf1_edx::PAE
                | leaf1_edx::CX8
                | leaf1_edx::SEP
                | leaf1_edx::PGE
                | leaf1_edx::CMOV
                | leaf1_edx::PAT
                | leaf1_edx::PSE36
                | leaf1_edx::CLFLUSH
                | leaf1_edx::MMX
                | leaf1_edx::FXSR
                | leaf1_edx::SSE
                | leaf1_edx::SSE2,
        ),
        CpuidEntry {
            has_subleaf: true,
            ..entry(
                7,
                0,
                leaf7_ebx::FSGSBASE
                    | leaf7_ebx::TSC_ADJUST
                    | leaf7_ebx::INVPCID
                    | if random.rdseed { leaf7_ebx::RDSEED } else { 0 }
                    | leaf7_ebx::BMI1
                    | leaf7_ebx::NO_FCS_FDS
                    | leaf7_ebx::SMEP
                    | leaf7_ebx::BMI2
                    | leaf7_ebx::ERMS
                    | leaf7_ebx::ADX
                    | leaf7_ebx::SMAP
                    | leaf7_ebx::CLFLUSHOPT
                    | leaf7_ebx::CLWB
                    | avx2,
                wide_crypto | leaf7_ecx::UMIP | leaf7_ecx::PKU | leaf7_ecx::LA57 | leaf7_ecx::RDPID,
                leaf7_edx::SERIALIZE,
            )
        },
        entry(0x8000_0000, 0x8000_0008, 0, 0, 0),
        entry(
            0x8000_0001,
            signature,
            0,
            extended::ECX_LAHF | extended::ECX_LZCNT | extended::ECX_PREFETCHW,
            extended::EDX_SYSCALL
                | extended::EDX_NX
                | extended::EDX_1G
                | extended::EDX_RDTSCP
                | extended::EDX_LM,
        ),
    ];
    table.extend(state_components());
    let brand = b"Twofold software processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for (leaf, part) in (0x8000_0002..=0x8000_0004).zip(brand.chunks(16)) {
        let [a, b, c, d] = [0, 4, 8, 12].map(|at| word(part.get(at..at + 4).unwrap_or_default()));
        table.push(entry(leaf, a, b, c, d));
    }
    // The time stamp counter is invariant.
    table.push(entry(0x8000_0007, 0, 0, 0, 1 << 8));
    let linear_bits = 57;
    table.push(entry(
        0x8000_0008,
        linear_bits << 8 | u32::from(physical_bits),
        0,
        0,
        0,
    ));
    table
}

/// The bits of what is there.
fn bits_of(features: &[(bool, u32)]) -> u32 {
    features
        .iter()
        .filter(|(there, _)| *there)
        .fold(0, |bits, (_, bit)| bits | bit)
}

/// Leaf 0xD: the components of XCR0, how large an area is, and where each component lies in it.
fn state_components() -> Vec<CpuidEntry> {
    let components = xsave::components();
    let subleaf = |subleaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf: leaf_d::LEAF,
        subleaf,
        has_subleaf: true,
        eax,
        ebx,
        ecx,
        edx,
    };
    // EBX of the first two depends on XCR0 and is filled in when the guest asks.
    let most = xsave::standard_bytes(components) as u32;
    let compacted = xsave::compacted_bytes(components) as u32;
    let mut table = vec![
        subleaf(0, components as u32, most, most, (components >> 32) as u32),
        subleaf(
            1,
            leaf_d::XSAVEOPT | leaf_d::XSAVEC | leaf_d::XGETBV_ECX_1,
            compacted,
            0,
            0,
        ),
    ];
    let behind_header = [
        (xcr0::AVX, xsave::AVX_PLACE),
        (xcr0::PKRU, xsave::pkru_place()),
    ];
    for (component, place) in behind_header {
        if components & component != 0 {
            table.push(subleaf(
                component.trailing_zeros(),
                place.size,
                place.offset,
                0,
                0,
            ));
        }
    }
    table
}

impl Core {
    /// Takes over what the table says about physical addresses and CR4.
    pub(crate) fn update_features(&mut self) {
        let find = |leaf: u32| {
            let wanted = |entry: &&CpuidEntry| entry.leaf == leaf && entry.subleaf == 0;
            self.cpuid.iter().find(wanted).copied().unwrap_or_default()
        };
        let (one, seven, state) = (find(1), find(7), find(leaf_d::LEAF));
        let gates = [
            (one.ecx, leaf1_ecx::PCID, cr4::PCIDE),
            (one.ecx, leaf1_ecx::XSAVE, cr4::OSXSAVE),
            (seven.ebx, leaf7_ebx::FSGSBASE, cr4::FSGSBASE),
            (seven.ebx, leaf7_ebx::SMEP, cr4::SMEP),
            (seven.ebx, leaf7_ebx::SMAP, cr4::SMAP),
            (seven.ecx, leaf7_ecx::UMIP, cr4::UMIP),
            (seven.ecx, leaf7_ecx::PKU, cr4::PKE),
            (seven.ecx, leaf7_ecx::LA57, cr4::LA57),
        ];
        let absent = |&(word, bit, _): &(u32, u32, u64)| word & bit == 0;
        let forbidden = gates.iter().filter(|gate| absent(gate));
        self.cr4_allowed = CR4_BITS & !forbidden.fold(0, |bits, gate| bits | gate.2);
        let named = u64::from(state.edx) << 32 | u64::from(state.eax);
        self.xcr0_allowed = xsave::components() & (named | xcr0::X87);
        // A TD's shared bit may be the highest that an address can have, whatever the host's
        // addresses have.
        let widest = match self.td {
            true => 52,
            false => self.machine.config().maxphyaddr,
        };
        let bits = match find(0x8000_0008).eax as u8 {
            // Nothing is said.
            0 => widest,
            bits => bits,
        };
        self.physical_bits = bits.clamp(32, widest.max(32));
        self.flush_tlb();
    }

    /// EAX, EBX, ECX and EDX for a leaf and subleaf.
    pub(crate) fn cpuid_answer(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        let find = |leaf: u32, subleaf: u32| {
            self.cpuid.iter().find(|entry| {
                entry.leaf == leaf && (!entry.has_subleaf || entry.subleaf == subleaf)
            })
        };
        let found = find(leaf, subleaf).or_else(|| {
            // Intel's processors answer a basic leaf that is too large with their largest one.
            let zero = find(0, 0)?;
            let intel = zero.ebx == u32::from_le_bytes(*b"Genu");
            let basic = leaf & 0xffff_0000 == 0;
            (intel && basic && leaf > zero.eax)
                .then(|| find(zero.eax, subleaf))
                .flatten()
        });
        let entry = found?;
        let CpuidEntry {
            eax, ebx, ecx, edx, ..
        } = self.current_cpuid(*entry);
        Some([eax, ebx, ecx, edx])
    }

    /// An entry with the parts that follow CR4 and XCR0.
    pub(crate) fn current_cpuid(&self, mut entry: CpuidEntry) -> CpuidEntry {
        let copy = |word: &mut u32, bit: u32, on: bool| {
            *word = *word & !bit | if on { bit } else { 0 };
        };
        let osxsave = self.cr4 & cr4::OSXSAVE != 0;
        let xcr0 = self.msrs.xcr0;
        match (entry.leaf, entry.subleaf) {
            (1, _) => copy(&mut entry.ecx, leaf1_ecx::OSXSAVE, osxsave),
            (7, 0) => copy(&mut entry.ecx, leaf7_ecx::OSPKE, self.cr4 & cr4::PKE != 0),
            (leaf_d::LEAF, 0) => entry.ebx = xsave::standard_bytes(xcr0) as u32,
            (leaf_d::LEAF, 1) if entry.eax & leaf_d::XSAVEC != 0 => {
                entry.ebx = xsave::compacted_bytes(xcr0) as u32;
            }
            _ => {}
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_appears_once_and_within_the_announced_range() {
        for kind in [SecondStageKind::Ept, SecondStageKind::Npt] {
            let table = supported(kind, 48);
            for (i, entry) in table.iter().enumerate() {
                let same =
                    |other: &CpuidEntry| (other.leaf, other.subleaf) == (entry.leaf, entry.subleaf);
                assert!(!table[..i].iter().any(same));
                let highest = if entry.leaf >= 0x8000_0000 {
                    0x8000_0008
                } else {
                    0xd
                };
                assert!(entry.leaf <= highest);
            }
        }
    }
}
