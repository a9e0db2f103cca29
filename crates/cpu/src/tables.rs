//! The registers that point to descriptor tables, and the instructions that look at descriptors
//! without loading them.

use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::mode::Mode;
use crate::op::{Address, Handler, Mem, Op, Place, Read, Segmented};
use crate::state::{Segment, TableRegister};
use crate::trap::{Trap, vector};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let long = form.mode.has(Mode::CODE64);
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
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
            let selector = core.readable_selector(core.ldt.selector)?;
            Mem::<Segmented>::write(core, op, selector)
        },
        // A register of 16 bits keeps its upper half.
        (M::Sldt, ..) => match form.width {
            2 => |core, op| {
                let selector = core.readable_selector(core.ldt.selector)?;
                core.set_reg(op.dst, selector);
                Ok(())
            },
            _ => |core, op| {
                let selector = core.readable_selector(core.ldt.selector)?;
                core.set_reg(op.dst, u64::from(selector));
                Ok(())
            },
        },
        (M::Str, Kind::Mem, _) => |core, op| {
            let selector = core.readable_selector(core.tr.selector)?;
            Mem::<Segmented>::write(core, op, selector)
        },
        // A register of 16 bits keeps its upper half.
        (M::Str, ..) => match form.width {
            2 => |core, op| {
                let selector = core.readable_selector(core.tr.selector)?;
                core.set_reg(op.dst, selector);
                Ok(())
            },
            _ => |core, op| {
                let selector = core.readable_selector(core.tr.selector)?;
                core.set_reg(op.dst, u64::from(selector));
                Ok(())
            },
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
                // Bits of the limit are undefined here on Intel's processors; AMD's have them.
                let rights = (low >> 32) as u32 & 0x00ff_ff00;
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
        _ => return None,
    })
}

/// Descriptor types that LAR accepts besides code and data, one bit each, in long mode and
/// otherwise.
const LAR_TYPES: (u16, u16) = (1 << 2 | 1 << 9 | 1 << 11 | 1 << 12, 0b0001_1010_0011_1110);
/// The same for LSL.
const LSL_TYPES: (u16, u16) = (1 << 2 | 1 << 9 | 1 << 11, 0b0000_1010_0000_1110);

impl Core {
    /// What SLDT or STR stores, if they may be executed.
    fn readable_selector(&mut self, selector: u16) -> Result<u16, Trap> {
        self.require_no_umip()?;
        self.require_protected()?;
        Ok(selector)
    }

    /// #UD in real and virtual-8086 mode.
    pub(crate) fn require_protected(&mut self) -> Result<(), Trap> {
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
            self.check_descriptor_half(selector)?;
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
