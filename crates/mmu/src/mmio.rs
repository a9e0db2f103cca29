//! Entries that remember that there is no memory (SPEC 4.6).
//!
//! Such an entry makes the processor report the access in a way that says "MMIO" without a look
//! at the slots: a guaranteed misconfiguration in EPT, a reserved bit in NPT. It carries the low
//! 19 bits of the slots' generation and is stale as soon as the slots have changed.

use crate::format::MmuFormat;
use twofold_arch::Gfn;
use twofold_table::x86::{ADDRESS_MASK, MMU_PRESENT};

/// Bits of the generation that an entry can hold.
pub const GENERATION_BITS: u32 = 19;
/// The part of a generation that an entry can hold.
pub const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

const LOW_BITS: u32 = 8;
const LOW_SHIFT: u32 = 3;
const HIGH_SHIFT: u32 = 52;

/// How an access without memory is told from others: by what the entry there makes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MmioFault {
    /// A fault of its own kind: an EPT misconfiguration, or a reserved bit in NPT.
    #[default]
    Misconfiguration,
    /// An EPT violation that becomes #VE in the guest, since the entry alone of all does not
    /// suppress it: for a TD, whose instructions a hypervisor cannot read. Not in NPT.
    Violation,
}

/// How MMIO entries look in one VM, or that there can be none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MmioEncoding {
    value: u64,
    mask: u64,
}

impl MmioEncoding {
    /// The encoding of a format on a machine with this physical address width, or `None` where the
    /// format has no value that is sure to fault like this.
    pub fn new<F: MmuFormat>(maxphyaddr: u8, fault: MmioFault) -> Option<Self> {
        let (value, mask) = match fault {
            MmioFault::Misconfiguration => F::mmio_value(maxphyaddr)?,
            MmioFault::Violation => F::VIOLATING_MMIO?,
        };
        Some(Self { value, mask })
    }

    /// The entry for `gfn` under `generation`, of which the low 19 bits are kept.
    pub const fn encode(self, gfn: Gfn, generation: u64) -> u64 {
        let low = generation & ((1 << LOW_BITS) - 1);
        let high = (generation & GENERATION_MASK) >> LOW_BITS;
        self.value | gfn.address().get() & ADDRESS_MASK | low << LOW_SHIFT | high << HIGH_SHIFT
    }

    /// Whether `entry` is an MMIO entry, of whatever generation.
    pub const fn matches(self, entry: u64) -> bool {
        entry & (self.mask | MMU_PRESENT) == self.value
    }

    /// The 19 bits of generation that the MMIO entry `entry` holds.
    pub const fn generation(entry: u64) -> u64 {
        let low = entry >> LOW_SHIFT & ((1 << LOW_BITS) - 1);
        let high = entry >> HIGH_SHIFT & ((1 << (GENERATION_BITS - LOW_BITS)) - 1);
        high << LOW_BITS | low
    }

    /// Whether `entry` is an MMIO entry that is still true: made under `generation`, and the slots
    /// are not being changed.
    pub const fn is_fresh(self, entry: u64, generation: u64) -> bool {
        self.matches(entry)
            && generation & crate::slots::UPDATE_IN_PROGRESS == 0
            && Self::generation(entry) == generation & GENERATION_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Ept, Npt};
    use twofold_arch::ept::{self, EptCaps, EptEntry};
    use twofold_arch::npt::{self, NptCaps, NptEntry};
    use twofold_arch::{Level, Pferr};
    use twofold_table::{Entry, Height};

    fn generations() -> impl Iterator<Item = u64> {
        (0..GENERATION_BITS)
            .map(|bit| 1 << bit)
            .chain([0, GENERATION_MASK, 0x5_5555, 0x2_aaaa])
    }

    fn every_generation_survives<F: MmuFormat>(gfns: &[Gfn]) {
        let mmio = MmioEncoding::new::<F>(51, MmioFault::Misconfiguration).unwrap();
        for generation in generations() {
            for &gfn in gfns {
                let entry = mmio.encode(gfn, generation | 1 << 40);
                assert_eq!(F::decode(entry, Height::LEAF), Entry::Special, "{entry:#x}");
                assert!(mmio.matches(entry));
                assert_eq!(MmioEncoding::generation(entry), generation);
                assert!(mmio.is_fresh(entry, generation));
                assert!(!mmio.is_fresh(entry, generation + 1));
                assert!(!mmio.is_fresh(entry, generation | 1 << 63));
                assert!(
                    matches!(
                        ept::decode(entry, Level::L4K, EptCaps::full(51)),
                        EptEntry::Misconfig(_)
                    ) || matches!(
                        npt::decode(entry, Level::L4K, NptCaps::full(51)),
                        NptEntry::Reserved(_)
                    )
                );
            }
        }
        assert!(!mmio.matches(F::EMPTY));
        assert!(!mmio.matches(F::FROZEN));
        assert!(!mmio.matches(F::link(None, Height::LEAF)));
    }

    #[test]
    fn every_generation_survives_in_an_entry_and_the_processor_refuses_it() {
        let gfns = [0, 1, 0xfee00, (1 << 39) - 1].map(Gfn::new);
        every_generation_survives::<Ept>(&gfns);
        every_generation_survives::<Npt>(&gfns);
    }

    #[test]
    fn ept_entries_misconfigure_whatever_they_carry() {
        let mmio = MmioEncoding::new::<Ept>(52, MmioFault::Misconfiguration).unwrap();
        for generation in generations() {
            let entry = mmio.encode(Gfn::new((1 << 40) - 1), generation);
            assert!(matches!(
                ept::decode(entry, Level::L4K, EptCaps::full(52)),
                EptEntry::Misconfig(_)
            ));
        }
    }

    #[test]
    fn npt_has_no_mmio_entry_without_a_reserved_address_bit() {
        assert_eq!(
            MmioEncoding::new::<Npt>(52, MmioFault::Misconfiguration),
            None
        );
        assert!(MmioEncoding::new::<Npt>(51, MmioFault::Misconfiguration).is_some());
        // The flag that such a fault carries; SPEC 4.6.
        assert_eq!(Pferr::RSVD.bits(), 8);
    }
}
