//! The CPUID instruction and the table of what this processor offers.

use crate::control_registers::CR4_BITS;
use crate::core_state::Core;
use crate::machine::SecondStageKind;
use crate::random::Sources;
use crate::sse::Host;
use crate::state::{CpuidEntry, cr4};

/// Leaf 1, EDX.
mod leaf1_edx {
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
    pub(super) const FXSR: u32 = 1 << 24;
    pub(super) const SSE: u32 = 1 << 25;
    pub(super) const SSE2: u32 = 1 << 26;
}

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub(super) const SSE3: u32 = 1 << 0;
    pub(super) const PCLMULQDQ: u32 = 1 << 1;
    pub(super) const SSSE3: u32 = 1 << 9;
    pub(super) const CX16: u32 = 1 << 13;
    pub(super) const SSE41: u32 = 1 << 19;
    pub(super) const SSE42: u32 = 1 << 20;
    pub(super) const PCID: u32 = 1 << 17;
    pub(super) const MOVBE: u32 = 1 << 22;
    pub(super) const POPCNT: u32 = 1 << 23;
    pub(super) const AES: u32 = 1 << 25;
    pub(super) const XSAVE: u32 = 1 << 26;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const RDRAND: u32 = 1 << 30;
}

/// Leaf 7 subleaf 0, EBX.
mod leaf7_ebx {
    pub(super) const FSGSBASE: u32 = 1 << 0;
    pub(super) const TSC_ADJUST: u32 = 1 << 1;
    pub(super) const BMI1: u32 = 1 << 3;
    pub(super) const SMEP: u32 = 1 << 7;
    pub(super) const BMI2: u32 = 1 << 8;
    pub(super) const ERMS: u32 = 1 << 9;
    pub(super) const INVPCID: u32 = 1 << 10;
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
    pub(super) const LA57: u32 = 1 << 16;
    pub(super) const RDPID: u32 = 1 << 22;
}

/// Leaf 7 subleaf 0, EDX.
mod leaf7_edx {
    pub(super) const SERIALIZE: u32 = 1 << 14;
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
    let vector_extensions = [
        (host_has.sse3, leaf1_ecx::SSE3),
        (host_has.pclmulqdq, leaf1_ecx::PCLMULQDQ),
        (host_has.ssse3, leaf1_ecx::SSSE3),
        (host_has.sse41, leaf1_ecx::SSE41),
        (host_has.sse42, leaf1_ecx::SSE42),
        (host_has.aes, leaf1_ecx::AES),
    ]
    .into_iter()
    .fold(0, |bits, (has, bit)| if has { bits | bit } else { bits });
    let signature = match kind {
        // Family 6 model 85, and family 25 model 1.
        SecondStageKind::Ept => 0x0005_0654,
        SecondStageKind::Npt => 0x00a0_0f11,
    };
    let mut table = vec![
        entry(0, 7, ebx, ecx, edx),
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
                | if random.rdrand { leaf1_ecx::RDRAND } else { 0 },
            leaf1_edx::DE
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
                    | leaf7_ebx::SMEP
                    | leaf7_ebx::BMI2
                    | leaf7_ebx::ERMS
                    | leaf7_ebx::ADX
                    | leaf7_ebx::SMAP
                    | leaf7_ebx::CLFLUSHOPT
                    | leaf7_ebx::CLWB,
                leaf7_ecx::UMIP | leaf7_ecx::PKU | leaf7_ecx::LA57 | leaf7_ecx::RDPID,
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

impl Core {
    /// Takes over what the table says about physical addresses and CR4.
    pub(crate) fn update_features(&mut self) {
        let find = |leaf: u32| {
            let wanted = |entry: &&CpuidEntry| entry.leaf == leaf && entry.subleaf == 0;
            self.cpuid.iter().find(wanted).copied().unwrap_or_default()
        };
        let (one, seven) = (find(1), find(7));
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
        let [eax, ebx, mut ecx, edx] = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        if entry.leaf == 1 {
            ecx &= !leaf1_ecx::OSXSAVE;
            if self.cr4 & cr4::OSXSAVE != 0 {
                ecx |= leaf1_ecx::OSXSAVE;
            }
        } else if entry.leaf == 7 && subleaf == 0 {
            ecx &= !leaf7_ecx::OSPKE;
            if self.cr4 & cr4::PKE != 0 {
                ecx |= leaf7_ecx::OSPKE;
            }
        }
        Some([eax, ebx, ecx, edx])
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
                assert!(table[..i].iter().all(|other| other.leaf != entry.leaf));
                let highest = if entry.leaf >= 0x8000_0000 {
                    0x8000_0008
                } else {
                    7
                };
                assert!(entry.leaf <= highest);
            }
        }
    }
}
