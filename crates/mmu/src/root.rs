//! Roots by role.

use crate::spte::AdBits;
use crate::sync::atomic::{AtomicBool, Ordering};
use alloc::sync::Arc;
use twofold_arch::{Hpa, Level};
use twofold_table::RootTable;

/// What a root is for. Virtual processors with equal roles share a root.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct RootRole {
    /// Levels of the table, by the level of its root.
    pub level: Level,
    /// System management mode: selects the address space.
    pub smm: bool,
    /// The guest itself runs a guest.
    pub guest_mode: bool,
    /// A mirror of external tables, which no processor walks
    /// ([`load_td_roots`](crate::Mmu::load_td_roots)).
    pub mirror: bool,
}

impl RootRole {
    /// Four levels, normal address space.
    pub const NORMAL: Self = Self {
        level: Level::L512G,
        smm: false,
        guest_mode: false,
        mirror: false,
    };

    /// The address space: 1 in system management mode, else 0.
    pub const fn as_id(self) -> u16 {
        self.smm as u16
    }
}

/// A root table. The MMU holds one reference, each [`Root`] another; the page is given back when
/// the root is obsolete and only the MMU's is left.
#[derive(Debug)]
pub(crate) struct RootState {
    pub(crate) table: RootTable,
    pub(crate) role: RootRole,
    /// Where address 0 is in the table: the shared bit for a TD's shared half, else 0.
    pub(crate) base: u64,
    /// How the leaves below tell what is used.
    pub(crate) ad: AdBits,
    obsolete: AtomicBool,
}

impl RootState {
    pub(crate) fn new(table: RootTable, role: RootRole, base: u64, ad: AdBits) -> Self {
        Self {
            table,
            role,
            base,
            ad,
            obsolete: AtomicBool::new(false),
        }
    }

    pub(crate) fn make_obsolete(&self) {
        self.obsolete.store(true, Ordering::SeqCst);
    }

    #[inline(always)]
    pub(crate) fn is_obsolete(&self) -> bool {
        self.obsolete.load(Ordering::Acquire)
    }
}

/// A counted reference to a root table. To be kept as long as a virtual processor has the root
/// loaded or may hold translations made through it.
#[derive(Clone, Debug)]
pub struct Root {
    pub(crate) state: Arc<RootState>,
}

impl Root {
    /// Where the root table is: what goes into EPTP or nCR3.
    pub fn hpa(&self) -> Hpa {
        self.state.table.page.hpa()
    }

    /// What the root is for.
    pub fn role(&self) -> RootRole {
        self.state.role
    }

    /// Whether the MMU has dropped this root; a virtual processor must then load another.
    pub fn is_obsolete(&self) -> bool {
        self.state.is_obsolete()
    }
}
