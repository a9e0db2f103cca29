//! Roots by role.

use twofold_arch::{Hpa, Level};

/// What a root is for. Virtual processors with equal roles share a root.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct RootRole {
    /// Levels of the table, by the level of its root.
    pub level: Level,
    /// System management mode: selects the address space.
    pub smm: bool,
    /// The guest itself runs a guest.
    pub guest_mode: bool,
}

impl RootRole {
    /// Four levels, normal address space.
    pub const NORMAL: Self = Self {
        level: Level::L512G,
        smm: false,
        guest_mode: false,
    };

    /// The address space: 1 in system management mode, else 0.
    pub const fn as_id(self) -> u16 {
        self.smm as u16
    }
}

/// A counted reference to a root table.
#[derive(Debug)]
pub struct Root {
    _private: (),
}

impl Root {
    /// Where the root table is: what goes into EPTP or nCR3.
    pub fn hpa(&self) -> Hpa {
        unimplemented!()
    }

    /// What the root is for.
    pub fn role(&self) -> RootRole {
        unimplemented!()
    }

    /// Whether the MMU has dropped this root; a virtual processor must then load another.
    pub fn is_obsolete(&self) -> bool {
        unimplemented!()
    }
}
