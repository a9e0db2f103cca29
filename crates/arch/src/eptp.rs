//! The EPT pointer and the capability MSR that says which pointers are allowed.

use crate::addr::Hpa;
use crate::ept::{ADDRESS_MASK, MemoryType};
use crate::level::Level;
use bitflags::bitflags;

bitflags! {
    /// `IA32_VMX_EPT_VPID_CAP`, MSR 0x48c, the EPT half (SDM appendix A.10).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct EptVpidCap: u64 {
        /// Entries may allow fetches without reads.
        const EXECUTE_ONLY = 1 << 0;
        /// A page-walk length of 4 is supported.
        const WALK_LENGTH_4 = 1 << 6;
        /// A page-walk length of 5 is supported.
        const WALK_LENGTH_5 = 1 << 7;
        /// EPT structures may be read as UC.
        const MEMORY_TYPE_UC = 1 << 8;
        /// EPT structures may be read as WB.
        const MEMORY_TYPE_WB = 1 << 14;
        /// 2M leaves.
        const PAGE_2M = 1 << 16;
        /// 1G leaves.
        const PAGE_1G = 1 << 17;
        /// The INVEPT instruction.
        const INVEPT = 1 << 20;
        /// Accessed and dirty flags.
        const ACCESSED_DIRTY = 1 << 21;
        /// Advanced exit information for EPT violations.
        const ADVANCED_EXIT_INFO = 1 << 22;
        /// Supervisor shadow-stack control.
        const SUPERVISOR_SHADOW_STACK = 1 << 23;
        /// INVEPT of a single context.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT of all contexts.
        const INVEPT_ALL = 1 << 26;
    }
}

/// An EPT pointer: where the root table is and how it is walked (SDM, "Extended-Page-Table
/// Pointer (EPTP)").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Eptp {
    /// The root table's address, 4 KiB aligned.
    pub root: Hpa,
    /// The level of the root: [`Level::L512G`] (4-level) or [`Level::L256T`] (5-level).
    pub level: Level,
    /// How the processor reads the tables: UC or WB.
    pub memory_type: MemoryType,
    /// Whether the processor writes accessed and dirty flags.
    pub accessed_dirty: bool,
    /// Whether bit 60 of leaves is honoured.
    pub supervisor_shadow_stack: bool,
}

/// Why VM entry refuses an EPT pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptpError {
    /// The memory type is neither UC nor WB, or the processor does not support it.
    MemoryType,
    /// The page-walk length is not 4 or 5, or the processor does not support it.
    WalkLength,
    /// Accessed and dirty flags are enabled and the processor has none.
    AccessedDirty,
    /// A reserved bit is set, or an address bit beyond the physical address width.
    Reserved,
}

impl Eptp {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const SUPERVISOR_SHADOW_STACK: u64 = 1 << 7;

    /// A pointer to `root` as hypervisors use it: WB, no supervisor shadow-stack control.
    pub const fn new(root: Hpa, level: Level, accessed_dirty: bool) -> Self {
        Self {
            root,
            level,
            memory_type: MemoryType::WriteBack,
            accessed_dirty,
            supervisor_shadow_stack: false,
        }
    }

    /// The VMCS field's value.
    pub const fn encode(self) -> u64 {
        (self.root.get() & ADDRESS_MASK)
            | self.memory_type as u64
            | (self.level.number() as u64 - 1) << 3
            | if self.accessed_dirty {
                Self::ACCESSED_DIRTY
            } else {
                0
            }
            | if self.supervisor_shadow_stack {
                Self::SUPERVISOR_SHADOW_STACK
            } else {
                0
            }
    }

    /// The pointer that a VMCS field's value stands for, checked as VM entry checks it.
    ///
    /// # Errors
    /// [`EptpError`] names the first rule that is broken.
    pub const fn decode(value: u64, caps: EptVpidCap, maxphyaddr: u8) -> Result<Self, EptpError> {
        let memory_type = match value & 7 {
            0 if caps.contains(EptVpidCap::MEMORY_TYPE_UC) => MemoryType::Uncacheable,
            6 if caps.contains(EptVpidCap::MEMORY_TYPE_WB) => MemoryType::WriteBack,
            _ => return Err(EptpError::MemoryType),
        };
        let level = match value >> 3 & 7 {
            3 if caps.contains(EptVpidCap::WALK_LENGTH_4) => Level::L512G,
            4 if caps.contains(EptVpidCap::WALK_LENGTH_5) => Level::L256T,
            _ => return Err(EptpError::WalkLength),
        };
        let accessed_dirty = value & Self::ACCESSED_DIRTY != 0;
        if accessed_dirty && !caps.contains(EptVpidCap::ACCESSED_DIRTY) {
            return Err(EptpError::AccessedDirty);
        }
        let supervisor_shadow_stack = value & Self::SUPERVISOR_SHADOW_STACK != 0;
        let width = if maxphyaddr < 64 {
            (1 << maxphyaddr) - 1
        } else {
            u64::MAX
        };
        if supervisor_shadow_stack && !caps.contains(EptVpidCap::SUPERVISOR_SHADOW_STACK)
            || value & (0b1111 << 8) != 0
            || value & !0xfff & !(ADDRESS_MASK & width) != 0
        {
            return Err(EptpError::Reserved);
        }
        Ok(Self {
            root: Hpa::new(value & ADDRESS_MASK),
            level,
            memory_type,
            accessed_dirty,
            supervisor_shadow_stack,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_four_level_write_back_pointer_has_the_known_value() {
        let pointer = Eptp::new(Hpa::new(0x1234_5000), Level::L512G, true);
        assert_eq!(pointer.encode(), 0x1234_505e);
        let pointer = Eptp::new(Hpa::new(0x1234_5000), Level::L256T, false);
        assert_eq!(pointer.encode(), 0x1234_5026);
    }

    #[test]
    fn every_low_value_is_accepted_or_refused_as_vm_entry_does() {
        let all = EptVpidCap::all();
        for caps in [
            all,
            EptVpidCap::empty(),
            all - EptVpidCap::WALK_LENGTH_5,
            all - EptVpidCap::MEMORY_TYPE_UC,
            all - EptVpidCap::ACCESSED_DIRTY,
            all - EptVpidCap::SUPERVISOR_SHADOW_STACK,
        ] {
            let has = |bit: u32| caps.bits() >> bit & 1 == 1;
            for low in 0..1u64 << 12 {
                for (high, high_ok) in [
                    (0x7_0000_1000, true),
                    (1 << 46, false),
                    (1 << 52, false),
                    (1 << 63, false),
                ] {
                    let value = low | high;
                    let ok = high_ok
                        && match low & 7 {
                            0 => has(8),
                            6 => has(14),
                            _ => false,
                        }
                        && match low >> 3 & 7 {
                            3 => has(6),
                            4 => has(7),
                            _ => false,
                        }
                        && (low & 0x40 == 0 || has(21))
                        && (low & 0x80 == 0 || has(23))
                        && low & 0xf00 == 0;
                    let decoded = Eptp::decode(value, caps, 46);
                    assert_eq!(decoded.is_ok(), ok, "{value:#x}");
                    if let Ok(pointer) = decoded {
                        assert_eq!(pointer.encode(), value);
                    }
                }
            }
        }
    }
}
