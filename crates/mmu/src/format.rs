//! The formats that the MMU can write, and the bits of each that it needs.

use twofold_arch::ept::{EptFlags, MemoryType};
use twofold_arch::npt::NptFlags;
use twofold_table::Format;
pub use twofold_table::x86::{Ept, Npt};

/// A second-stage format with the bits, the processor's and the software's, that the MMU sets.
pub trait MmuFormat: Format {
    /// In every leaf: readable, cacheable, violations exit.
    const LEAF: u64;
    /// Writes are allowed.
    const WRITE: u64;
    /// In a leaf that allows fetches.
    const EXECUTE: u64;
    /// In a leaf that does not.
    const NO_EXECUTE: u64;
    /// The page was used.
    const ACCESSED: u64;
    /// The page was written.
    const DIRTY: u64;
    /// A leaf above the last level.
    const LARGE: u64;
    /// Writes that W forbids are looked up in the sub-page permission table, in a leaf of 4K; 0 if
    /// processors of this format have none.
    const SUB_PAGE_WRITE: u64;
    /// Software: the host's page is writable.
    const HOST_WRITABLE: u64;
    /// Software: the MMU allows writes; W may be given back without asking anyone.
    const MMU_WRITABLE: u64;
    /// Reads are allowed.
    const READ: u64;
    /// The permissions that access tracking takes away where processors do not set accessed bits;
    /// 0 if processors of this format always do (SPEC 4.3).
    const TRACKED: u64;
    /// Whether processors of this format can record the frames that they write.
    const HAS_PML: bool;

    /// The bits that make an MMIO entry on a machine with this physical address width, and the mask
    /// under which they are compared; `None` if no value is sure to fault there.
    fn mmio_value(maxphyaddr: u8) -> Option<(u64, u64)>;

    /// The same for an entry whose violation becomes an exception in the guest, if the format has
    /// such (SPEC 4.6: all of RWX clear, and violations not suppressed).
    const VIOLATING_MMIO: Option<(u64, u64)>;
}

impl MmuFormat for Ept {
    const LEAF: u64 = EptFlags::READ.bits()
        | EptFlags::SUPPRESS_VE.bits()
        | EptFlags::IGNORE_PAT.bits()
        | MemoryType::WriteBack.entry_bits();
    const WRITE: u64 = EptFlags::WRITE.bits();
    const EXECUTE: u64 = EptFlags::EXECUTE.bits();
    const NO_EXECUTE: u64 = 0;
    const ACCESSED: u64 = EptFlags::ACCESSED.bits();
    const DIRTY: u64 = EptFlags::DIRTY.bits();
    const LARGE: u64 = EptFlags::LARGE.bits();
    const SUB_PAGE_WRITE: u64 = EptFlags::SUB_PAGE_WRITE.bits();
    const HOST_WRITABLE: u64 = 1 << 57;
    const MMU_WRITABLE: u64 = 1 << 58;
    const READ: u64 = EptFlags::READ.bits();
    const TRACKED: u64 = EptFlags::RWX.bits();
    const HAS_PML: bool = true;

    fn mmio_value(_maxphyaddr: u8) -> Option<(u64, u64)> {
        let value = EptFlags::WRITE | EptFlags::EXECUTE;
        Some((value.bits(), (EptFlags::RWX | EptFlags::SUPPRESS_VE).bits()))
    }

    const VIOLATING_MMIO: Option<(u64, u64)> =
        Some((0, EptFlags::RWX.bits() | EptFlags::SUPPRESS_VE.bits()));
}

impl MmuFormat for Npt {
    const LEAF: u64 = NptFlags::PRESENT.bits() | NptFlags::USER.bits();
    const WRITE: u64 = NptFlags::WRITE.bits();
    const EXECUTE: u64 = 0;
    const NO_EXECUTE: u64 = NptFlags::NO_EXECUTE.bits();
    const ACCESSED: u64 = NptFlags::ACCESSED.bits();
    const DIRTY: u64 = NptFlags::DIRTY.bits();
    const LARGE: u64 = NptFlags::LARGE.bits();
    const SUB_PAGE_WRITE: u64 = 0;
    const HOST_WRITABLE: u64 = 1 << 9;
    const MMU_WRITABLE: u64 = 1 << 10;
    const READ: u64 = NptFlags::PRESENT.bits();
    const TRACKED: u64 = 0;
    const HAS_PML: bool = false;

    fn mmio_value(maxphyaddr: u8) -> Option<(u64, u64)> {
        let value = (NptFlags::PRESENT | NptFlags::WRITE | NptFlags::USER).bits() | 1 << 51;
        (maxphyaddr < 52).then_some((value, value))
    }

    const VIOLATING_MMIO: Option<(u64, u64)> = None;
}
