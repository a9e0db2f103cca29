//! Model-specific registers, and the bases of FS and GS, which are among them.

use crate::core_state::{Core, Pending, seg};
use crate::form::Form;
use crate::memory::reason;
use crate::op::{Handler, Op};
use crate::state::{cr4, gpr};
use crate::system::{pair, set_pair};
use crate::trap::{Exit, Trap};
use iced_x86::Mnemonic as M;

const RCX: u8 = gpr::RCX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Rdmsr, ..) => rdmsr,
        (M::Wrmsr, ..) => wrmsr,
        (M::Swapgs, ..) => |core, _| {
            core.require_ring_0()?;
            let gs = usize::from(seg::GS);
            std::mem::swap(&mut core.segment[gs].base, &mut core.msrs.kernel_gs_base);
            core.update_segment(gs);
            Ok(())
        },
        (M::Rdfsbase, ..) => |core, op| read_base(core, op, seg::FS),
        (M::Rdgsbase, ..) => |core, op| read_base(core, op, seg::GS),
        (M::Wrfsbase, ..) => |core, op| write_base(core, op, seg::FS),
        (M::Wrgsbase, ..) => |core, op| write_base(core, op, seg::GS),
        _ => return None,
    })
}

/// Numbers of MSRs that the processor itself holds.
mod number {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
}

impl Core {
    pub(crate) fn canonical_or_fault(&mut self, value: u64) -> Result<u64, Trap> {
        if self.is_canonical(value) {
            Ok(value)
        } else {
            Err(self.general_protection(0))
        }
    }

    /// What RDMSR reads of the registers that the processor itself holds.
    fn own_msr(&self, index: u32) -> Option<u64> {
        let msrs = &self.msrs;
        Some(match index {
            number::TSC => msrs.tsc(),
            number::TSC_ADJUST => msrs.tsc_adjust,
            number::SYSENTER_CS => msrs.sysenter_cs,
            number::SYSENTER_ESP => msrs.sysenter_esp,
            number::SYSENTER_EIP => msrs.sysenter_eip,
            number::PAT => msrs.pat,
            number::EFER => self.efer,
            number::STAR => msrs.star,
            number::LSTAR => msrs.lstar,
            number::CSTAR => msrs.cstar,
            number::SFMASK => msrs.sfmask,
            number::FS_BASE => self.segment[usize::from(seg::FS)].base,
            number::GS_BASE => self.segment[usize::from(seg::GS)].base,
            number::KERNEL_GS_BASE => msrs.kernel_gs_base,
            number::TSC_AUX => msrs.tsc_aux,
            _ => return None,
        })
    }

    /// Writes one of the registers that the processor itself holds. `None`: it is not one.
    fn write_own_msr(&mut self, index: u32, value: u64) -> Option<Result<(), Trap>> {
        let result = match index {
            number::TSC => {
                self.msrs.write_tsc(value);
                Ok(())
            }
            number::TSC_ADJUST => {
                self.msrs.write_tsc_adjust(value);
                Ok(())
            }
            number::SYSENTER_CS => {
                self.msrs.sysenter_cs = value & 0xffff_ffff;
                Ok(())
            }
            number::SYSENTER_ESP => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.sysenter_esp = value),
            number::SYSENTER_EIP => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.sysenter_eip = value),
            number::PAT => {
                // Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
                let valid = |byte: &u8| matches!(byte, 0 | 1 | 4..=7);
                if value.to_le_bytes().iter().all(valid) {
                    self.msrs.pat = value;
                    Ok(())
                } else {
                    Err(self.general_protection(0))
                }
            }
            number::EFER => self.write_efer(value),
            number::STAR => {
                self.msrs.star = value;
                Ok(())
            }
            number::LSTAR => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.lstar = value),
            number::CSTAR => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.cstar = value),
            number::SFMASK => {
                self.msrs.sfmask = value & 0xffff_ffff;
                Ok(())
            }
            number::FS_BASE => self.set_base(seg::FS, value),
            number::GS_BASE => self.set_base(seg::GS, value),
            number::KERNEL_GS_BASE => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.kernel_gs_base = value),
            number::TSC_AUX => {
                self.msrs.tsc_aux = value & 0xffff_ffff;
                Ok(())
            }
            _ => return None,
        };
        Some(result)
    }

    fn set_base(&mut self, register: u8, value: u64) -> Result<(), Trap> {
        let value = self.canonical_or_fault(value)?;
        let i = usize::from(register);
        self.segment[i].base = value;
        self.update_segment(i);
        Ok(())
    }
}

/// The local APIC's registers that a TD reaches without asking anybody: task and processor priority,
/// end of interrupt, which interrupts there are, and interrupting itself.
const fn is_virtual_apic(index: u32) -> bool {
    matches!(index, 0x808 | 0x80a | 0x80b | 0x810..=0x827 | 0x83f)
}

fn rdmsr(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_ring_0()?;
    let index: u32 = core.reg(RCX);
    if core.td && index == number::TSC_ADJUST {
        return Err(core.intercepted(op, reason::RDMSR, 0));
    }
    if !core.msrs_leave
        && let Some(value) = core.own_msr(index)
    {
        set_pair(core, value);
        return Ok(());
    }
    if !is_virtual_apic(index) {
        core.td_intercepts(op, reason::RDMSR)?;
    }
    if let Pending::Rdmsr {
        index: asked,
        answer: Some(answer),
    } = core.pending
        && asked == index
    {
        return match answer {
            Some(value) => {
                core.pending = Pending::None;
                set_pair(core, value);
                Ok(())
            }
            // The answer is kept until the exception is delivered.
            None => Err(core.general_protection(0)),
        };
    }
    core.pending = Pending::Rdmsr {
        index,
        answer: None,
    };
    core.pending_rip = op.ip;
    Err(core.leave(Exit::Rdmsr { index }))
}

fn wrmsr(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_ring_0()?;
    let index: u32 = core.reg(RCX);
    let value = pair(core);
    // A TD's time is not its own to change.
    if core.td && matches!(index, number::TSC | number::TSC_ADJUST) {
        return Err(core.intercepted(op, reason::WRMSR, 0));
    }
    if !core.msrs_leave
        && let Some(result) = core.write_own_msr(index, value)
    {
        core.stop = true;
        return result;
    }
    if !is_virtual_apic(index) {
        core.td_intercepts(op, reason::WRMSR)?;
    }
    if let Pending::Wrmsr {
        index: asked,
        answer: Some(accepted),
    } = core.pending
        && asked == index
    {
        core.stop = true;
        return if accepted {
            core.pending = Pending::None;
            Ok(())
        } else {
            Err(core.general_protection(0))
        };
    }
    core.pending = Pending::Wrmsr {
        index,
        answer: None,
    };
    core.pending_rip = op.ip;
    Err(core.leave(Exit::Wrmsr { index, value }))
}

fn check_base_instructions(core: &mut Core) -> Result<(), Trap> {
    if core.cr4 & cr4::FSGSBASE == 0 {
        Err(core.invalid_opcode())
    } else {
        Ok(())
    }
}

fn read_base(core: &mut Core, op: &Op, register: u8) -> Result<(), Trap> {
    check_base_instructions(core)?;
    let base = core.segment[usize::from(register)].base;
    if op.width == 4 {
        core.set_reg(op.dst, base as u32);
    } else {
        core.set_reg(op.dst, base);
    }
    Ok(())
}

fn write_base(core: &mut Core, op: &Op, register: u8) -> Result<(), Trap> {
    check_base_instructions(core)?;
    let value = if op.width == 4 {
        u64::from(core.reg::<u32>(op.dst))
    } else {
        core.reg(op.dst)
    };
    core.set_base(register, value)
}
