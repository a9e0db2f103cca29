//! The Secure EPT as a format of the table engine, which walks it.

use super::entry::{LOCKED, SeptEntry, State};
use twofold_arch::{Hpa, Level};
use twofold_table::x86::ADDRESS_MASK;
use twofold_table::{Entry, Format, Height, Replacement};

/// Suppress #VE and the "ignore PAT" bit alone: part of no state's code.
const FROZEN: u64 = 1 << 63 | 1 << 6;
const HEIGHT_SHIFT: u32 = 3;
const HEIGHT_MASK: u64 = 7 << HEIGHT_SHIFT;

/// The Secure EPT. The engine only looks entries up in it; changing them is the module's business,
/// which locks entries one by one and tracks TLBs by epochs, so the engine's own frozen values and
/// lists of retired tables are never stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SecureEpt {}

impl Format for SecureEpt {
    const EMPTY: u64 = SeptEntry::FREE.raw();
    const FROZEN: u64 = FROZEN;
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_HEIGHT: Height = Height::new(5);
    const MAX_ROOT_PAGES: usize = 1;
    const REPLACEMENT: Replacement = Replacement::Direct;

    fn hardware_level(height: Height) -> i8 {
        height.get() as i8
    }

    fn may_map(height: Height) -> bool {
        Level::from_number(height.get()).is_some_and(Level::may_map)
    }

    fn decode(entry: u64, height: Height) -> Entry {
        if entry == Self::EMPTY {
            return Entry::Empty;
        }
        if entry & !(ADDRESS_MASK | HEIGHT_MASK) == FROZEN {
            return Entry::Frozen;
        }
        let entry = SeptEntry::from_raw(entry & !LOCKED);
        match entry.state() {
            Some(State::NonLeafMapped) if height != Height::LEAF => {
                Entry::Table(entry.page(height.get() - 1))
            }
            Some(state) if state.is_leaf() => Entry::Leaf,
            _ => Entry::Special,
        }
    }

    fn table_entry(child: Hpa) -> u64 {
        SeptEntry::table(child).raw()
    }

    fn leaf_address(entry: u64, height: Height) -> Hpa {
        SeptEntry::from_raw(entry).page(height.get() - 1)
    }

    fn link(next: Option<Hpa>, height: Height) -> u64 {
        FROZEN | next.map_or(0, Hpa::get) & ADDRESS_MASK | u64::from(height.get()) << HEIGHT_SHIFT
    }

    fn link_target(entry: u64) -> (Option<Hpa>, Height) {
        let address = entry & ADDRESS_MASK;
        let height = Height::new(((entry & HEIGHT_MASK) >> HEIGHT_SHIFT) as u8);
        ((address != 0).then(|| Hpa::new(address)), height)
    }
}
