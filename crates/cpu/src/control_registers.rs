//! Control and debug registers.

use crate::breakpoints::{dr6, dr7};
use crate::core_state::{Core, seg};
use crate::form::{Form, Kind};
use crate::mode::Mode;
use crate::op::{Handler, Mem, Op, Place, Read, Segmented};
use crate::state::{cr0, cr4, efer};
use crate::trap::{Exit, Trap};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Mov, Kind::Reg, Kind::Control) => read_control,
        (M::Mov, Kind::Control, Kind::Reg) => write_control,
        (M::Mov, Kind::Reg, Kind::Debug) => read_debug,
        (M::Mov, Kind::Debug, Kind::Reg) => write_debug,
        (M::Clts, ..) => |core, _| {
            core.require_ring_0()?;
            core.cr0 &= !cr0::TS;
            core.update_mode();
            Ok(())
        },
        (M::Smsw, Kind::Mem, _) => |core, op| {
            core.require_no_umip()?;
            let value = core.cr0 as u16;
            Mem::<Segmented>::write(core, op, value)
        },
        (M::Smsw, ..) => match form.width {
            2 => |core, op| {
                core.require_no_umip()?;
                core.set_reg(op.dst, core.cr0 as u16);
                Ok(())
            },
            4 => |core, op| {
                core.require_no_umip()?;
                core.set_reg(op.dst, core.cr0 as u32);
                Ok(())
            },
            _ => |core, op| {
                core.require_no_umip()?;
                core.set_reg(op.dst, core.cr0);
                Ok(())
            },
        },
        (M::Lmsw, Kind::Mem, _) => |core, op| {
            core.require_ring_0()?;
            let value = Mem::<Segmented>::read::<u16>(core, op)?;
            load_status_word(core, value)
        },
        (M::Lmsw, ..) => |core, op| {
            core.require_ring_0()?;
            let value = core.reg(op.dst);
            load_status_word(core, value)
        },
        _ => return None,
    })
}

/// Control bits of CR4 that this processor implements.
pub(crate) const CR4_BITS: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::LA57
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP
    | cr4::PKE;
/// Control bits of CR0 that there are.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// Bits of IA32_EFER that this processor implements.
const EFER_BITS: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

impl Core {
    /// Writes CR0 with the checks that the instruction makes.
    fn write_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.cr0;
        let value = value & CR0_BITS | cr0::ET;
        let paging = value & cr0::PG != 0;
        let enabling = paging && old & cr0::PG == 0;
        let disabling = !paging && old & cr0::PG != 0;
        let cs_long = self.segment[usize::from(seg::CS)].long;
        let long = self.efer & efer::LME != 0;
        if (paging && value & cr0::PE == 0)
            || (value & cr0::NW != 0 && value & cr0::CD == 0)
            || (enabling && long && (self.cr4 & cr4::PAE == 0 || cs_long))
            || (disabling && (self.code64() || self.cr4 & cr4::PCIDE != 0))
        {
            return Err(self.general_protection(0));
        }
        self.cr0 = value;
        if enabling && long {
            self.efer |= efer::LMA;
        } else if disabling {
            self.efer &= !efer::LMA;
        }
        if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE | cr0::CD | cr0::NW) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3. With process-context identifiers, bit 63 asks to keep what is cached; forgetting
    /// it all the same is always allowed, since a processor may drop translations at any time.
    fn write_cr3(&mut self, mut value: u64) -> Result<(), Trap> {
        const KEEP_CACHED: u64 = 1 << 63;
        if self.long_mode() {
            if self.cr4 & cr4::PCIDE != 0 {
                value &= !KEEP_CACHED;
            }
            let reserved = u64::MAX << self.physical_bits;
            if value & reserved != 0 {
                return Err(self.general_protection(0));
            }
        }
        self.cr3 = value;
        self.flush_tlb();
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Trap> {
        let changed = self.cr4 ^ value;
        // Identifiers are turned on in long mode while the current one is 0.
        let identifiers = changed & value & cr4::PCIDE != 0;
        if value & !self.cr4_allowed != 0
            || (identifiers && (!self.long_mode() || self.cr3 & 0xfff != 0))
            || (self.long_mode() && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0))
        {
            return Err(self.general_protection(0));
        }
        self.cr4 = value;
        if changed & cr4::DE != 0 {
            self.update_breakpoints();
        }
        const PAGING: u64 = cr4::PSE
            | cr4::PAE
            | cr4::PGE
            | cr4::PCIDE
            | cr4::SMEP
            | cr4::SMAP
            | cr4::LA57
            | cr4::PKE;
        if changed & PAGING != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    pub(crate) fn write_efer(&mut self, value: u64) -> Result<(), Trap> {
        let changed = self.efer ^ value;
        if value & !EFER_BITS != 0 || (changed & efer::LME != 0 && self.cr0 & cr0::PG != 0) {
            return Err(self.general_protection(0));
        }
        // LMA follows from LME and CR0.PG.
        self.efer = value & !efer::LMA | self.efer & efer::LMA;
        self.flush_tlb();
        self.update_mode();
        Ok(())
    }
}

/// Moves to and from control registers are as wide as the code allows, whatever the prefixes.
fn write_wide(core: &mut Core, register: u8, value: u64) {
    if core.mode.has(Mode::CODE64) {
        core.set_reg(register, value);
    } else {
        core.set_reg(register, value as u32);
    }
}

fn read_wide(core: &Core, register: u8) -> u64 {
    if core.mode.has(Mode::CODE64) {
        core.reg(register)
    } else {
        u64::from(core.reg::<u32>(register))
    }
}

fn read_control(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_ring_0()?;
    let value = match op.src {
        0 => core.cr0,
        2 => core.cr2,
        3 => core.cr3,
        4 => core.cr4,
        8 => core.cr8,
        _ => return Err(core.invalid_opcode()),
    };
    write_wide(core, op.dst, value);
    Ok(())
}

fn write_control(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_ring_0()?;
    let value = read_wide(core, op.src);
    core.stop = true;
    match op.dst {
        0 if value >> 32 != 0 => Err(core.general_protection(0)),
        0 => core.write_cr0(value),
        2 => {
            core.cr2 = value;
            Ok(())
        }
        3 => core.write_cr3(value),
        4 => core.write_cr4(value),
        8 if value > 15 => Err(core.general_protection(0)),
        8 => {
            let lowered = value < core.cr8;
            core.cr8 = value;
            core.attention = true;
            if lowered && core.cr8_leaves {
                return Err(core.leave(Exit::TaskPriority));
            }
            Ok(())
        }
        _ => Err(core.invalid_opcode()),
    }
}

fn load_status_word(core: &mut Core, value: u16) -> Result<(), Trap> {
    // PE can be set but not cleared.
    let low = u64::from(value) & 0xf | core.cr0 & cr0::PE;
    core.write_cr0(core.cr0 & !0xf | low)
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE says that they are not there.
fn debug_register(core: &mut Core, ip: u64, number: u8) -> Result<u8, Trap> {
    core.require_ring_0()?;
    let number = match number {
        4 | 5 if core.cr4 & cr4::DE != 0 => return Err(core.invalid_opcode()),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(core.invalid_opcode()),
    };
    core.general_detect(ip)?;
    Ok(number)
}

fn read_debug(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = match debug_register(core, op.ip, op.src)? {
        6 => core.debug.dr6,
        7 => core.debug.dr7,
        number => core.debug.db[usize::from(number & 3)],
    };
    write_wide(core, op.dst, value);
    Ok(())
}

fn write_debug(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let number = debug_register(core, op.ip, op.dst)?;
    let value = read_wide(core, op.src);
    match number {
        6 | 7 if value >> 32 != 0 => return Err(core.general_protection(0)),
        6 => core.debug.dr6 = value & dr6::WRITABLE | dr6::ONES,
        7 => core.debug.dr7 = value & dr7::WRITABLE | dr7::ONES,
        number => core.debug.db[usize::from(number & 3)] = value,
    }
    core.update_breakpoints();
    Ok(())
}
