//! System instructions: control and debug registers, descriptor table registers, MSRs, flags,
//! SYSCALL and its kin, HLT, CPUID, the time stamp counter.

use crate::core_state::{Core, Pending, seg};
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::integer::nop;
use crate::mode::Mode;
use crate::op::{Address, Handler, Mem, Op, Place, Read, Segmented, offset};
use crate::segments::changeable_flags;
use crate::state::{Segment, TableRegister, cr0, cr4, efer, gpr, rflags};
use crate::trap::{Exception, Exit, Trap, vector};
use iced_x86::Mnemonic as M;

const RAX: u8 = gpr::RAX as u8;
const RBX: u8 = gpr::RBX as u8;
const RCX: u8 = gpr::RCX as u8;
const RDX: u8 = gpr::RDX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let long = form.mode.has(Mode::CODE64);
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Cpuid, ..) => cpuid,
        (M::Rdtsc, ..) => rdtsc,
        (M::Rdtscp, ..) => rdtscp,
        (M::Rdpid, ..) => |core, op| {
            core.set_reg(op.dst, core.msrs.tsc_aux);
            Ok(())
        },
        (M::Rdmsr, ..) => rdmsr,
        (M::Wrmsr, ..) => wrmsr,
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
        (M::Lgdt, ..) if long => |core, op| {
            core.gdt = load_table_register::<true>(core, op)?;
            Ok(())
        },
        (M::Lgdt, ..) => |core, op| {
            core.gdt = load_table_register::<false>(core, op)?;
            Ok(())
        },
        (M::Lidt, ..) if long => |core, op| {
            core.idt = load_table_register::<true>(core, op)?;
            Ok(())
        },
        (M::Lidt, ..) => |core, op| {
            core.idt = load_table_register::<false>(core, op)?;
            Ok(())
        },
        (M::Sgdt, ..) if long => |core, op| store_table_register::<true>(core, op, core.gdt),
        (M::Sgdt, ..) => |core, op| store_table_register::<false>(core, op, core.gdt),
        (M::Sidt, ..) if long => |core, op| store_table_register::<true>(core, op, core.idt),
        (M::Sidt, ..) => |core, op| store_table_register::<false>(core, op, core.idt),
        (M::Sldt, Kind::Mem, _) => |core, op| {
            core.require_no_umip()?;
            core.require_protected()?;
            Mem::<Segmented>::write(core, op, core.ldt.selector)
        },
        (M::Sldt, ..) => |core, op| {
            core.require_no_umip()?;
            core.require_protected()?;
            core.set_reg(op.dst, u64::from(core.ldt.selector));
            Ok(())
        },
        (M::Str, Kind::Mem, _) => |core, op| {
            core.require_no_umip()?;
            core.require_protected()?;
            Mem::<Segmented>::write(core, op, core.tr.selector)
        },
        (M::Str, ..) => |core, op| {
            core.require_no_umip()?;
            core.require_protected()?;
            core.set_reg(op.dst, u64::from(core.tr.selector));
            Ok(())
        },
        (M::Lldt, ..) => |core, op| {
            core.require_protected()?;
            core.require_ring_0()?;
            let selector = selector_operand(core, op)?;
            core.load_system_segment(selector, false)
        },
        (M::Ltr, ..) => |core, op| {
            core.require_protected()?;
            core.require_ring_0()?;
            let selector = selector_operand(core, op)?;
            core.load_system_segment(selector, true)
        },
        (M::Lar, ..) => |core, op| {
            core.require_protected()?;
            let selector = source_selector(core, op)?;
            let visible = core.visible_descriptor(selector, LAR_TYPES)?;
            if let Some(low) = visible {
                let rights = (low >> 32) as u32 & 0x00f0_ff00;
                match op.width {
                    2 => core.set_reg(op.dst, rights as u16),
                    _ => core.set_reg(op.dst, rights),
                }
            }
            core.flags.set_zf(visible.is_some());
            Ok(())
        },
        (M::Lsl, ..) => |core, op| {
            core.require_protected()?;
            let selector = source_selector(core, op)?;
            let visible = core.visible_descriptor(selector, LSL_TYPES)?;
            if let Some(low) = visible {
                let place = 0;
                let limit = crate::segments::Descriptor { low, place }
                    .segment(selector)
                    .limit;
                match op.width {
                    2 => core.set_reg(op.dst, limit as u16),
                    _ => core.set_reg(op.dst, limit),
                }
            }
            core.flags.set_zf(visible.is_some());
            Ok(())
        },
        (M::Verr, ..) => |core, op| verify(core, op, false),
        (M::Verw, ..) => |core, op| verify(core, op, true),
        (M::Invlpg, ..) => |core, op| {
            core.require_ring_0()?;
            let offset = offset(core, op) & op.address_mask();
            let linear = core.seg_base[usize::from(op.seg & 7)].wrapping_add(offset);
            core.flush_page(linear);
            core.stop = true;
            Ok(())
        },
        (M::Invd | M::Wbinvd | M::Wbnoinvd, ..) => |core, _| core.require_ring_0(),
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
        (M::Syscall, ..) => syscall,
        (M::Sysret, ..) => sysret::<false>,
        (M::Sysretq, ..) => sysret::<true>,
        (M::Sysenter, ..) => sysenter,
        (M::Sysexit, ..) => sysexit::<false>,
        (M::Sysexitq, ..) => sysexit::<true>,
        (M::Hlt, ..) => |core, _| {
            core.require_ring_0()?;
            Err(core.leave(Exit::Halt))
        },
        (M::Cli, ..) => cli,
        (M::Sti, ..) => sti,
        (M::Pushf, ..) => push_flags::<u16>,
        (M::Pushfd, ..) => push_flags::<u32>,
        (M::Pushfq, ..) => push_flags::<u64>,
        (M::Popf, ..) => pop_flags::<u16>,
        (M::Popfd, ..) => pop_flags::<u32>,
        (M::Popfq, ..) => pop_flags::<u64>,
        (M::Clac, ..) => |core, _| set_access_control(core, false),
        (M::Stac, ..) => |core, _| set_access_control(core, true),
        (M::Vmcall, ..) => |core, op| hypercall(core, op, true),
        (M::Vmmcall, ..) => |core, op| hypercall(core, op, false),
        // Each guest access is one host access in the host's order; only a store may still be
        // on its way when a later load is made.
        (M::Mfence, ..) => |_, _| {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        },
        (M::Lfence | M::Sfence, ..) => nop,
        (M::Clflush | M::Clflushopt | M::Clwb, ..) => |core, op| {
            Mem::<Segmented>::read::<u8>(core, op)?;
            Ok(())
        },
        (M::Xgetbv, ..) => xgetbv,
        (M::Xsetbv, ..) => xsetbv,
        (M::Bound, ..) => match form.width {
            2 => bound::<u16>,
            _ => bound::<u32>,
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
    | cr4::SMEP
    | cr4::SMAP;
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

/// Descriptor types that LAR accepts besides code and data, one bit each, in long mode and
/// otherwise.
const LAR_TYPES: (u16, u16) = (1 << 2 | 1 << 9 | 1 << 11 | 1 << 12, 0b0001_1010_0011_1110);
/// The same for LSL.
const LSL_TYPES: (u16, u16) = (1 << 2 | 1 << 9 | 1 << 11, 0b0000_1010_0000_1110);

impl Core {
    /// #GP(0) unless CPL is 0.
    #[inline]
    pub(crate) fn require_ring_0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.general_protection(0))
        }
    }

    /// #GP(0) if user-mode instruction prevention forbids the instruction.
    fn require_no_umip(&mut self) -> Result<(), Trap> {
        if self.cpl > 0 && self.cr4 & cr4::UMIP != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// #UD in real and virtual-8086 mode.
    fn require_protected(&mut self) -> Result<(), Trap> {
        if self.mode.has(Mode::PROTECTED) {
            Ok(())
        } else {
            Err(self.invalid_opcode())
        }
    }

    /// Loads LDTR or TR.
    fn load_system_segment(&mut self, selector: u16, task: bool) -> Result<(), Trap> {
        if selector & !3 == 0 {
            if task {
                return Err(self.general_protection(0));
            }
            self.ldt = Segment {
                selector,
                unusable: true,
                ..Segment::default()
            };
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let kind = descriptor.kind();
        let wanted = if !task {
            kind == 2
        } else if self.long_mode() {
            kind == 9
        } else {
            matches!(kind, 1 | 9)
        };
        if descriptor.is_code_or_data() || !wanted {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let mut segment = descriptor.segment(selector);
        if self.long_mode() {
            // The descriptor has 16 bytes; the second half holds the base's upper half.
            if u32::from(selector & !7) + 15 > u32::from(self.gdt.limit) {
                return Err(self.selector_fault(vector::GP, selector));
            }
            let high: u64 = self.load_sys(descriptor.place.wrapping_add(8))?;
            segment.base |= high << 32;
            if !self.is_canonical(segment.base) || high >> 40 & 0x1f != 0 {
                return Err(self.selector_fault(vector::GP, selector));
            }
        }
        if task {
            let place = descriptor.place.wrapping_add(5);
            let access: u8 = self.load_sys(place)?;
            self.store_sys(place, access | 2)?;
            segment.kind |= 2;
            self.tr = segment;
        } else {
            self.ldt = segment;
        }
        Ok(())
    }

    /// The low half of a descriptor that LAR, LSL, VERR and VERW may look at from this level.
    fn visible_descriptor(
        &mut self,
        selector: u16,
        types: (u16, u16),
    ) -> Result<Option<u64>, Trap> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let descriptor = match self.descriptor(selector, vector::GP) {
            Ok(descriptor) => descriptor,
            // Outside its table: not visible. Page faults are faults.
            Err(Trap::Exception) if self.fault.vector == vector::GP => return Ok(None),
            Err(trap) => return Err(trap),
        };
        let rpl = (selector & 3) as u8;
        let privileged = descriptor.is_conforming() || descriptor.dpl() >= rpl.max(self.cpl);
        let types = if self.long_mode() { types.0 } else { types.1 };
        let known = descriptor.is_code_or_data() || types >> descriptor.kind() & 1 != 0;
        Ok((privileged && known).then_some(descriptor.low))
    }

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
            || (disabling && self.code64())
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

    fn write_cr3(&mut self, value: u64) -> Result<(), Trap> {
        if self.long_mode() {
            let reserved = u64::MAX << self.machine.config().maxphyaddr;
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
        if value & !CR4_BITS != 0
            || (self.long_mode() && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0))
        {
            return Err(self.general_protection(0));
        }
        self.cr4 = value;
        if changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::LA57) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Trap> {
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

    fn canonical_or_fault(&mut self, value: u64) -> Result<u64, Trap> {
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
            msr::TSC => msrs.tsc(),
            msr::SYSENTER_CS => msrs.sysenter_cs,
            msr::SYSENTER_ESP => msrs.sysenter_esp,
            msr::SYSENTER_EIP => msrs.sysenter_eip,
            msr::PAT => msrs.pat,
            msr::EFER => self.efer,
            msr::STAR => msrs.star,
            msr::LSTAR => msrs.lstar,
            msr::CSTAR => msrs.cstar,
            msr::SFMASK => msrs.sfmask,
            msr::FS_BASE => self.segment[usize::from(seg::FS)].base,
            msr::GS_BASE => self.segment[usize::from(seg::GS)].base,
            msr::KERNEL_GS_BASE => msrs.kernel_gs_base,
            msr::TSC_AUX => msrs.tsc_aux,
            _ => return None,
        })
    }

    /// Writes one of the registers that the processor itself holds. `None`: it is not one.
    fn write_own_msr(&mut self, index: u32, value: u64) -> Option<Result<(), Trap>> {
        let result = match index {
            msr::TSC => {
                self.msrs.set_tsc(value);
                Ok(())
            }
            msr::SYSENTER_CS => {
                self.msrs.sysenter_cs = value & 0xffff_ffff;
                Ok(())
            }
            msr::SYSENTER_ESP => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.sysenter_esp = value),
            msr::SYSENTER_EIP => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.sysenter_eip = value),
            msr::PAT => {
                // Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
                let valid = |byte: &u8| matches!(byte, 0 | 1 | 4..=7);
                if value.to_le_bytes().iter().all(valid) {
                    self.msrs.pat = value;
                    Ok(())
                } else {
                    Err(self.general_protection(0))
                }
            }
            msr::EFER => self.write_efer(value),
            msr::STAR => {
                self.msrs.star = value;
                Ok(())
            }
            msr::LSTAR => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.lstar = value),
            msr::CSTAR => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.cstar = value),
            msr::SFMASK => {
                self.msrs.sfmask = value & 0xffff_ffff;
                Ok(())
            }
            msr::FS_BASE => self.set_base(seg::FS, value),
            msr::GS_BASE => self.set_base(seg::GS, value),
            msr::KERNEL_GS_BASE => self
                .canonical_or_fault(value)
                .map(|value| self.msrs.kernel_gs_base = value),
            msr::TSC_AUX => {
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

/// Numbers of MSRs that the processor itself holds.
mod msr {
    pub(super) const TSC: u32 = 0x10;
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

fn set_pair(core: &mut Core, value: u64) {
    core.set_reg(RAX, value as u32);
    core.set_reg(RDX, (value >> 32) as u32);
}

fn pair(core: &Core) -> u64 {
    u64::from(core.reg::<u32>(RDX)) << 32 | u64::from(core.reg::<u32>(RAX))
}

fn cpuid(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let [eax, ebx, ecx, edx] = core.cpuid_answer(core.reg(RAX), core.reg(RCX));
    core.set_reg(RAX, eax);
    core.set_reg(RBX, ebx);
    core.set_reg(RCX, ecx);
    core.set_reg(RDX, edx);
    Ok(())
}

fn check_time(core: &mut Core) -> Result<(), Trap> {
    if core.cr4 & cr4::TSD != 0 && core.cpl > 0 {
        return Err(core.general_protection(0));
    }
    Ok(())
}

fn rdtsc(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    check_time(core)?;
    let tsc = core.msrs.tsc();
    set_pair(core, tsc);
    Ok(())
}

fn rdtscp(core: &mut Core, op: &Op) -> Result<(), Trap> {
    rdtsc(core, op)?;
    core.set_reg(RCX, core.msrs.tsc_aux as u32);
    Ok(())
}

fn rdmsr(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_ring_0()?;
    let index: u32 = core.reg(RCX);
    if let Some(value) = core.own_msr(index) {
        set_pair(core, value);
        return Ok(());
    }
    if let Pending::Rdmsr {
        index: asked,
        answer: Some(answer),
    } = core.pending
        && asked == index
    {
        core.pending = Pending::None;
        return match answer {
            Some(value) => {
                set_pair(core, value);
                Ok(())
            }
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
    if let Some(result) = core.write_own_msr(index, value) {
        core.stop = true;
        return result;
    }
    if let Pending::Wrmsr {
        index: asked,
        answer: Some(accepted),
    } = core.pending
        && asked == index
    {
        core.pending = Pending::None;
        return if accepted {
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

fn hypercall(core: &mut Core, op: &Op, vmcall: bool) -> Result<(), Trap> {
    if let Pending::Hypercall {
        answer: Some(result),
    } = core.pending
    {
        core.pending = Pending::None;
        core.regs[gpr::RAX] = result;
        return Ok(());
    }
    core.pending = Pending::Hypercall { answer: None };
    core.pending_rip = op.ip;
    Err(core.leave(Exit::Hypercall { vmcall }))
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
            core.cr8 = value;
            core.attention = true;
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
fn debug_register(core: &mut Core, number: u8) -> Result<u8, Trap> {
    core.require_ring_0()?;
    match number {
        4 | 5 if core.cr4 & cr4::DE != 0 => Err(core.invalid_opcode()),
        4 | 5 => Ok(number + 2),
        0..=7 => Ok(number),
        _ => Err(core.invalid_opcode()),
    }
}

fn read_debug(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = match debug_register(core, op.src)? {
        6 => core.debug.dr6,
        7 => core.debug.dr7,
        number => core.debug.db[usize::from(number & 3)],
    };
    write_wide(core, op.dst, value);
    Ok(())
}

fn write_debug(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let number = debug_register(core, op.dst)?;
    let value = read_wide(core, op.src);
    match number {
        6 | 7 if value >> 32 != 0 => return Err(core.general_protection(0)),
        6 => core.debug.dr6 = value & 0x1_e00f | 0xfffe_0ff0,
        7 => core.debug.dr7 = value & 0xffff_2bff | 0x400,
        number => core.debug.db[usize::from(number & 3)] = value,
    }
    Ok(())
}

fn load_table_register<const LONG: bool>(core: &mut Core, op: &Op) -> Result<TableRegister, Trap> {
    core.require_ring_0()?;
    let size = if LONG { 10 } else { 6 };
    let linear = Segmented::for_read(core, op, size)?;
    let limit = core.load(linear)?;
    let at = linear.wrapping_add(2);
    let base = if LONG {
        let base = core.load::<u64>(at)?;
        core.canonical_or_fault(base)?
    } else {
        // With a 16-bit operand only 24 bits of the base count.
        let mask = if op.width == 2 {
            0xff_ffff
        } else {
            0xffff_ffff
        };
        u64::from(core.load::<u32>(at)?) & mask
    };
    Ok(TableRegister { base, limit })
}

fn store_table_register<const LONG: bool>(
    core: &mut Core,
    op: &Op,
    register: TableRegister,
) -> Result<(), Trap> {
    core.require_no_umip()?;
    let size = if LONG { 10 } else { 6 };
    let linear = Segmented::for_write(core, op, size)?;
    core.touch_write(linear, size)?;
    core.store(linear, register.limit)?;
    let at = linear.wrapping_add(2);
    if LONG {
        core.store(at, register.base)
    } else {
        core.store(at, register.base as u32)
    }
}

/// The selector that is the first operand.
fn selector_operand(core: &mut Core, op: &Op) -> Result<u16, Trap> {
    if op.dst == crate::core_state::slot::ZERO {
        Mem::<Segmented>::read(core, op)
    } else {
        Ok(core.reg(op.dst))
    }
}

/// The selector that is the second operand.
fn source_selector(core: &mut Core, op: &Op) -> Result<u16, Trap> {
    if op.src == crate::core_state::slot::ZERO {
        Mem::<Segmented>::read(core, op)
    } else {
        Ok(core.reg(op.src))
    }
}

fn verify(core: &mut Core, op: &Op, write: bool) -> Result<(), Trap> {
    core.require_protected()?;
    let selector = selector_operand(core, op)?;
    let visible = core.visible_descriptor(selector, (0, 0))?;
    let allowed = visible.is_some_and(|low| {
        let kind = low >> 40 & 15;
        let code = kind & 8 != 0;
        if write {
            !code && kind & 2 != 0
        } else {
            !code || kind & 2 != 0
        }
    });
    core.flags.set_zf(allowed);
    Ok(())
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

/// A flat code or data segment as SYSCALL and its kin load it, without looking at a descriptor.
fn flat_segment(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        kind: if code { 11 } else { 3 },
        dpl,
        code_or_data: true,
        present: true,
        available: false,
        long,
        big: !long,
        granular: true,
        unusable: false,
    }
}

impl Core {
    fn set_flat(&mut self, code: u16, stack: u16, long: bool, cpl: u8) {
        self.segment[usize::from(seg::CS)] = flat_segment(code, true, long, cpl);
        self.segment[usize::from(seg::SS)] = Segment {
            big: true,
            ..flat_segment(stack, false, false, cpl)
        };
        self.cpl = cpl;
    }
}

fn syscall(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if core.efer & efer::SCE == 0 || !core.mode.has(Mode::CODE64) {
        return Err(core.invalid_opcode());
    }
    let selector = (core.msrs.star >> 32) as u16 & !3;
    core.regs[gpr::RCX] = op.next_ip();
    core.regs[11] = core.flags.image() & !rflags::RF;
    let mask = core.msrs.sfmask | rflags::RF;
    core.flags.set_image(core.flags.image() & !mask);
    core.set_flat(selector, selector.wrapping_add(8), true, 0);
    core.rip = core.msrs.lstar;
    core.update_mode();
    Ok(())
}

fn sysret<const LONG: bool>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.efer & efer::SCE == 0 || !core.mode.has(Mode::CODE64) {
        return Err(core.invalid_opcode());
    }
    core.require_ring_0()?;
    let target = core.regs[gpr::RCX];
    if LONG && !core.is_canonical(target) {
        return Err(core.general_protection(0));
    }
    let selector = (core.msrs.star >> 48) as u16;
    let stack = selector.wrapping_add(8) | 3;
    let code = if LONG {
        selector.wrapping_add(16) | 3
    } else {
        selector | 3
    };
    let kept = rflags::RF | rflags::VM;
    core.flags.set_image(core.regs[11] & 0x3c_7fd7 & !kept);
    core.set_flat(code, stack, LONG, 3);
    core.rip = if LONG { target } else { target & 0xffff_ffff };
    core.attention = true;
    core.update_mode();
    Ok(())
}

fn sysenter(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.real_mode() || core.msrs.sysenter_cs & 0xfffc == 0 {
        return Err(core.general_protection(0));
    }
    let long = core.long_mode();
    let selector = core.msrs.sysenter_cs as u16 & !3;
    let cleared = rflags::VM | rflags::IF | rflags::RF;
    core.flags.set_system(core.flags.system() & !cleared);
    core.set_flat(selector, selector.wrapping_add(8), long, 0);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    core.regs[gpr::RSP] = core.msrs.sysenter_esp & mask;
    core.rip = core.msrs.sysenter_eip & mask;
    core.update_mode();
    Ok(())
}

fn sysexit<const LONG: bool>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.real_mode() || core.msrs.sysenter_cs & 0xfffc == 0 {
        return Err(core.general_protection(0));
    }
    core.require_ring_0()?;
    let (target, stack) = (core.regs[gpr::RDX], core.regs[gpr::RCX]);
    if LONG && !(core.is_canonical(target) && core.is_canonical(stack)) {
        return Err(core.general_protection(0));
    }
    let selector = core.msrs.sysenter_cs as u16;
    let code = selector.wrapping_add(if LONG { 32 } else { 16 }) | 3;
    core.set_flat(code, code.wrapping_add(8), LONG, 3);
    let mask = if LONG { u64::MAX } else { 0xffff_ffff };
    core.regs[gpr::RSP] = stack & mask;
    core.rip = target & mask;
    core.update_mode();
    Ok(())
}

/// Whether CPL may change RFLAGS.IF.
fn may_change_interrupts(core: &Core) -> bool {
    let iopl = ((core.flags.system() & rflags::IOPL) >> 12) as u8;
    core.real_mode() || core.cpl <= iopl
}

fn cli(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(core) {
        return Err(core.general_protection(0));
    }
    core.flags.set_system(core.flags.system() & !rflags::IF);
    Ok(())
}

fn sti(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(core) {
        return Err(core.general_protection(0));
    }
    if core.flags.system() & rflags::IF == 0 {
        core.flags.set_system(core.flags.system() | rflags::IF);
        core.events.sti_shadow = true;
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn push_flags<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.virtual_8086() && core.flags.system() & rflags::IOPL != rflags::IOPL {
        return Err(core.general_protection(0));
    }
    let image = core.flags.image() & !(rflags::VM | rflags::RF);
    core.push(T::truncate(image))
}

fn pop_flags<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.virtual_8086() && core.flags.system() & rflags::IOPL != rflags::IOPL {
        return Err(core.general_protection(0));
    }
    let image = core.peek::<T>(0)?.zero_extend();
    core.drop_stack(T::BYTES);
    let mask = changeable_flags::<T>(core);
    let before = core.flags.image();
    core.flags.set_image(before & !mask | image & mask);
    let changed = before ^ core.flags.image();
    if changed & (rflags::TF | rflags::AC) != 0 {
        core.update_mode();
    }
    if changed & (rflags::TF | rflags::IF) != 0 {
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn set_access_control(core: &mut Core, on: bool) -> Result<(), Trap> {
    if core.cpl > 0 {
        return Err(core.invalid_opcode());
    }
    let system = core.flags.system() & !rflags::AC;
    core.flags
        .set_system(if on { system | rflags::AC } else { system });
    core.update_rights();
    Ok(())
}

fn xgetbv(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.cr4 & cr4::OSXSAVE == 0 {
        return Err(core.invalid_opcode());
    }
    if core.reg::<u32>(RCX) != 0 {
        return Err(core.general_protection(0));
    }
    let value = core.msrs.xcr0;
    set_pair(core, value);
    Ok(())
}

fn xsetbv(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.cr4 & cr4::OSXSAVE == 0 {
        return Err(core.invalid_opcode());
    }
    core.require_ring_0()?;
    let value = pair(core);
    // x87 state is always enabled, SSE state may be.
    if core.reg::<u32>(RCX) != 0 || value & !3 != 0 || value & 1 == 0 {
        return Err(core.general_protection(0));
    }
    core.msrs.xcr0 = value;
    Ok(())
}

fn bound<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    // The bounds are two operands: the lower one is read before the address of the upper one is
    // checked against the segment.
    let linear = Segmented::for_read(core, op, T::BYTES)?;
    let low = core.load::<T>(linear)?.sign_extend() as i64;
    let mut upper = *op;
    upper.disp = upper.disp.wrapping_add(T::BYTES);
    let linear = Segmented::for_read(core, &upper, T::BYTES)?;
    let high = core.load::<T>(linear)?.sign_extend() as i64;
    let index = core.reg::<T>(op.dst).sign_extend() as i64;
    if index < low || index > high {
        return Err(core.raise(Exception {
            vector: vector::BR,
            error_code: None,
            payload: None,
        }));
    }
    Ok(())
}
