//! System instructions that are few of a kind: CPUID, the time stamp counter, HLT, hypercalls,
//! cache and translation control, fences, BOUND. The larger families have files of their own.

use crate::core_state::{Core, Pending};
use crate::form::Form;
use crate::int::Int;
use crate::integer::nop;
use crate::memory::reason;
use crate::op::{Address, Handler, Mem, Op, Read, Segmented, offset};
use crate::state::{cr4, gpr};
use crate::trap::{Exception, Exit, Trap, vector};
use iced_x86::Mnemonic as M;

const RAX: u8 = gpr::RAX as u8;
const RBX: u8 = gpr::RBX as u8;
const RCX: u8 = gpr::RCX as u8;
const RDX: u8 = gpr::RDX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Cpuid, ..) => cpuid,
        (M::Rdtsc, ..) => rdtsc,
        (M::Rdtscp, ..) => rdtscp,
        (M::Rdpid, ..) => |core, op| {
            core.set_reg(op.dst, core.msrs.tsc_aux);
            Ok(())
        },
        (M::Invlpg, ..) => |core, op| {
            core.require_ring_0()?;
            let offset = offset(core, op) & op.address_mask();
            let linear = core.seg_base[usize::from(op.seg & 7)].wrapping_add(offset);
            core.flush_page(linear);
            core.stop = true;
            Ok(())
        },
        (M::Invpcid, ..) => invpcid,
        (M::Invd, ..) => |core, op| {
            core.require_ring_0()?;
            core.td_intercepts(op, reason::INVD)
        },
        (M::Wbinvd | M::Wbnoinvd, ..) => |core, op| {
            core.require_ring_0()?;
            core.td_intercepts(op, reason::WBINVD)
        },
        // No address is watched: MWAIT always finds a reason to go on.
        (M::Monitor, ..) => |core, op| wait_hint(core, op, reason::MONITOR, 0),
        (M::Mwait, ..) => |core, op| wait_hint(core, op, reason::MWAIT, MWAIT_BREAK_ON_INTERRUPT),
        // There are no counters.
        (M::Rdpmc, ..) => |core, _| Err(core.general_protection(0)),
        (M::Serialize, ..) => |core, _| {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            core.stop = true;
            Ok(())
        },
        (M::Hlt, ..) => |core, op| {
            core.require_ring_0()?;
            core.td_intercepts(op, reason::HLT)?;
            Err(core.leave(Exit::Halt))
        },
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
        (M::Bound, ..) => match form.width {
            2 => bound::<u16>,
            _ => bound::<u32>,
        },
        _ => return None,
    })
}

impl Core {
    pub(crate) fn require_ring_0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.general_protection(0))
        }
    }

    /// #GP(0) if user-mode instruction prevention forbids the instruction.
    pub(crate) fn require_no_umip(&mut self) -> Result<(), Trap> {
        if self.cpl > 0 && self.cr4 & cr4::UMIP != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }
}

pub(crate) fn set_pair(core: &mut Core, value: u64) {
    core.set_reg(RAX, value as u32);
    core.set_reg(RDX, (value >> 32) as u32);
}

pub(crate) fn pair(core: &Core) -> u64 {
    u64::from(core.reg::<u32>(RDX)) << 32 | u64::from(core.reg::<u32>(RAX))
}

fn cpuid(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let answer = core.cpuid_answer(core.reg(RAX), core.reg(RCX));
    if answer.is_none() {
        core.td_intercepts(op, reason::CPUID)?;
    }
    let [eax, ebx, ecx, edx] = answer.unwrap_or_default();
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

fn hypercall(core: &mut Core, op: &Op, vmcall: bool) -> Result<(), Trap> {
    if core.td && !vmcall {
        return Err(core.invalid_opcode());
    }
    core.td_intercepts(op, reason::VMCALL)?;
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

/// The extension bit of MWAIT that there is.
const MWAIT_BREAK_ON_INTERRUPT: u32 = 1;

/// MONITOR and MWAIT: #UD outside ring 0, #GP for extensions in ECX that are not there.
fn wait_hint(core: &mut Core, op: &Op, reason: u32, extensions: u32) -> Result<(), Trap> {
    if core.cpl > 0 {
        return Err(core.invalid_opcode());
    }
    core.td_intercepts(op, reason)?;
    if core.reg::<u32>(RCX) & !extensions != 0 {
        return Err(core.general_protection(0));
    }
    Ok(())
}

/// INVPCID: the descriptor holds an identifier and a linear address.
fn invpcid(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if core.cpl > 0 {
        return Err(core.general_protection(0));
    }
    let kind = if core.mode.has(crate::mode::Mode::CODE64) {
        core.reg::<u64>(op.dst)
    } else {
        u64::from(core.reg::<u32>(op.dst))
    };
    let place = Segmented::for_read(core, op, 16)?;
    let identifier: u64 = core.load(place)?;
    let linear: u64 = core.load(place.wrapping_add(8))?;
    let identified = matches!(kind, 0 | 1);
    if kind > 3
        || identifier >> 12 != 0
        || (identified && identifier != 0 && core.cr4 & cr4::PCIDE == 0)
        || (kind == 0 && !core.is_canonical(linear))
    {
        return Err(core.general_protection(0));
    }
    let current = if core.cr4 & cr4::PCIDE != 0 {
        core.cr3 & 0xfff
    } else {
        0
    };
    // Only the current identifier's translations are cached.
    match kind {
        0 if identifier == current => core.flush_page(linear),
        0 | 1 if identifier != current => {}
        _ => core.flush_tlb(),
    }
    core.stop = true;
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
