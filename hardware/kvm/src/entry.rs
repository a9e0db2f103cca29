//! What a value of an entry means, without the addresses in it.

use std::fmt;

/// Bits 51:12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bit 11: a table or a leaf, for KVM as for Twofold.
const PRESENT: u64 = 1 << 11;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const NO_EXECUTE: u64 = 1 << 63;
/// Nothing is mapped.
const EMPTY: u64 = 1 << 63;
/// Locked by whoever changes it.
const FROZEN: u64 = EMPTY | 0x5a0;
/// An address that no processor has: bit 51, on a machine with narrower addresses.
const MMIO_ADDRESS: u64 = 1 << 51;

/// The state of an entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum State {
    /// Nothing is mapped.
    Empty,
    /// Locked: nobody sees this for long.
    Frozen,
    /// A table, with every bit but its address.
    Table(u64),
    /// A mapping, with every bit but its address.
    Leaf(u64),
    /// There is no memory.
    NoMemory {
        /// The slots' generation when that was found out.
        generation: u64,
        /// Every other bit but those of the frame.
        bits: u64,
    },
}

impl State {
    /// Takes an entry at a level apart.
    pub const fn of(value: u64, level: u8) -> Self {
        if value & PRESENT != 0 {
            if level == 1 || value & LARGE != 0 {
                Self::Leaf(value & !ADDRESS)
            } else {
                Self::Table(value & !ADDRESS)
            }
        } else if value == EMPTY {
            Self::Empty
        } else if value == FROZEN {
            Self::Frozen
        } else {
            // Eight bits of the generation from bit 3 on and eleven from bit 52 on.
            const LOW: u64 = 0xff << 3;
            const HIGH: u64 = 0x7ff << 52;
            Self::NoMemory {
                generation: (value & LOW) >> 3 | (value & HIGH) >> 52 << 8,
                bits: value & !(LOW | HIGH | (ADDRESS & !MMIO_ADDRESS)),
            }
        }
    }

    /// The leaf as one of the leaves at `level` that it is split into. Small pages may be executed
    /// even where large ones may not.
    pub const fn part(self, level: u8) -> Self {
        match self {
            Self::Leaf(bits) if level == 1 => Self::Leaf(bits & !(LARGE | NO_EXECUTE)),
            other => other,
        }
    }

    /// The state without the bits that say whether the page was used: processors set them, and
    /// not every trace says when.
    pub const fn without_use(self) -> Self {
        match self {
            Self::Leaf(bits) => Self::Leaf(bits & !(ACCESSED | DIRTY)),
            other => other,
        }
    }

    /// Whether the host's page may be written.
    pub const fn is_host_writable(self) -> bool {
        matches!(self, Self::Leaf(bits) if bits & HOST_WRITABLE != 0)
    }

    /// Whether something is mapped, noted or linked here.
    pub const fn is_something(self) -> bool {
        !matches!(self, Self::Empty | Self::Frozen)
    }
}

/// Bits of nested paging's entries, and of the software's among them.
const BITS: [(u64, &str); 10] = [
    (1 << 0, "r"),
    (1 << 1, "w"),
    (1 << 2, "u"),
    (ACCESSED, " accessed"),
    (DIRTY, " dirty"),
    (LARGE, " large"),
    (HOST_WRITABLE, " host-writable"),
    (MMU_WRITABLE, " mmu-writable"),
    (PRESENT, ""),
    (NO_EXECUTE, " no-execute"),
];

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, bits) = match *self {
            Self::Empty => return f.write_str("empty"),
            Self::Frozen => return f.write_str("frozen"),
            Self::NoMemory { generation, bits } => {
                return write!(f, "no memory in generation {generation} ({bits:#x})");
            }
            Self::Table(bits) => ("table", bits),
            Self::Leaf(bits) => ("leaf", bits),
        };
        write!(f, "{name} ")?;
        let mut rest = bits;
        for (bit, text) in BITS {
            if bits & bit != 0 {
                f.write_str(text)?;
            }
            rest &= !bit;
        }
        if rest != 0 {
            write!(f, " and {rest:#x}")?;
        }
        Ok(())
    }
}
