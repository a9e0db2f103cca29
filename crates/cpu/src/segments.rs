//! Segment registers and the descriptors they are loaded from.

use crate::core_state::{Core, seg};
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Address, Handler, Op, Segmented};
use crate::state::{Segment, gpr};
use crate::trap::{Exception, Exit, Trap, UnknownInstruction, vector};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let bytes = form.instruction.stack_pointer_increment().unsigned_abs();
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Mov, Kind::Reg, Kind::Seg) => match form.width {
            2 => |core, op| {
                let selector = core.segment[usize::from(op.src)].selector;
                core.set_reg(op.dst, selector);
                Ok(())
            },
            _ => |core, op| {
                let selector = core.segment[usize::from(op.src)].selector;
                core.set_reg(op.dst, u64::from(selector));
                Ok(())
            },
        },
        (M::Mov, Kind::Mem, Kind::Seg) => |core, op| {
            let selector = core.segment[usize::from(op.src)].selector;
            let linear = Segmented::for_write(core, op, 2)?;
            core.store(linear, selector)
        },
        (M::Mov, Kind::Seg, Kind::Reg) => |core, op| {
            let selector = core.reg(op.src);
            move_to_segment(core, op.dst, selector)
        },
        (M::Mov, Kind::Seg, Kind::Mem) => |core, op| {
            let linear = Segmented::for_read(core, op, 2)?;
            let selector = core.load(linear)?;
            move_to_segment(core, op.dst, selector)
        },
        (M::Push, Kind::Seg, _) => match bytes {
            2 => push_segment::<u16>,
            4 => push_segment::<u32>,
            _ => push_segment::<u64>,
        },
        (M::Pop, Kind::Seg, _) => match bytes {
            2 => pop_segment::<u16>,
            4 => pop_segment::<u32>,
            _ => pop_segment::<u64>,
        },
        (M::Arpl, Kind::Mem, _) => |core, op| {
            core.require_protected()?;
            let linear = Segmented::for_read(core, op, 2)?;
            let selector: u16 = core.load(linear)?;
            if let Some(adjusted) = adjust_level(core, op, selector) {
                // Only what is changed has to be writable, on AMD's processors.
                let linear = Segmented::for_write(core, op, 2)?;
                core.store(linear, adjusted)?;
                core.flags.set_zf(true);
            }
            Ok(())
        },
        (M::Arpl, ..) => |core, op| {
            core.require_protected()?;
            let selector: u16 = core.reg(op.dst);
            if let Some(adjusted) = adjust_level(core, op, selector) {
                core.set_reg(op.dst, adjusted);
                core.flags.set_zf(true);
            }
            Ok(())
        },
        (M::Lds, ..) => select_far_pointer::<{ seg::DS }>(form),
        (M::Les, ..) => select_far_pointer::<{ seg::ES }>(form),
        (M::Lfs, ..) => select_far_pointer::<{ seg::FS }>(form),
        (M::Lgs, ..) => select_far_pointer::<{ seg::GS }>(form),
        (M::Lss, ..) => select_far_pointer::<{ seg::SS }>(form),
        _ => return None,
    })
}

/// A descriptor as it lies in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) low: u64,
    /// Linear address of its first byte.
    pub(crate) place: u64,
}

impl Descriptor {
    pub(crate) fn kind(self) -> u8 {
        (self.low >> 40 & 15) as u8
    }
    pub(crate) fn is_code_or_data(self) -> bool {
        self.low >> 44 & 1 != 0
    }
    pub(crate) fn is_code(self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }
    pub(crate) fn dpl(self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    pub(crate) fn present(self) -> bool {
        self.low >> 47 & 1 != 0
    }
    /// Code that may be entered from lower privilege without changing the level.
    pub(crate) fn is_conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    /// The segment register that holds this descriptor.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let low = self.low;
        let limit = (low & 0xffff | low >> 32 & 0xf_0000) as u32;
        let granular = low >> 55 & 1 != 0;
        Segment {
            selector,
            base: low >> 16 & 0xff_ffff | low >> 32 & 0xff00_0000,
            limit: if granular { limit << 12 | 0xfff } else { limit },
            kind: self.kind(),
            dpl: self.dpl(),
            code_or_data: self.is_code_or_data(),
            present: self.present(),
            available: low >> 52 & 1 != 0,
            long: low >> 53 & 1 != 0,
            big: low >> 54 & 1 != 0,
            granular,
            unusable: false,
        }
    }
}

impl Core {
    /// An exception whose error code names a selector.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16) -> Trap {
        let error_code = Some(u32::from(selector & 0xfffc));
        self.raise(Exception {
            vector,
            error_code,
            payload: None,
        })
    }

    /// Leaves because the instruction needs something that this processor does not do, such as a
    /// task switch.
    #[cold]
    pub(crate) fn unsupported(&mut self) -> Trap {
        self.leave(Exit::Unknown(UnknownInstruction {
            bytes: [0; 15],
            len: 0,
            mnemonic: M::INVALID,
        }))
    }

    /// Reads the descriptor that a selector names; `vector` with the selector if it is outside its
    /// table.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Trap> {
        let (base, limit) = if selector & 4 != 0 {
            if self.ldt.unusable || !self.ldt.present {
                return Err(self.selector_fault(vector, selector));
            }
            (self.ldt.base, self.ldt.limit)
        } else {
            (self.gdt.base, u32::from(self.gdt.limit))
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Err(self.selector_fault(vector, selector));
        }
        let place = base.wrapping_add(u64::from(offset));
        let place = if self.long_mode() {
            place
        } else {
            place & 0xffff_ffff
        };
        let low = self.load_sys(place)?;
        Ok(Descriptor { low, place })
    }

    /// The second half of a 16-byte descriptor lies in its table too: #GP with the selector if not.
    pub(crate) fn check_descriptor_half(&mut self, selector: u16) -> Result<(), Trap> {
        let limit = if selector & 4 != 0 {
            self.ldt.limit
        } else {
            u32::from(self.gdt.limit)
        };
        if u32::from(selector & !7) + 15 > limit {
            return Err(self.selector_fault(vector::GP, selector));
        }
        Ok(())
    }

    /// Sets the accessed bit of a code or data descriptor in its table.
    pub(crate) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Trap> {
        if descriptor.kind() & 1 == 0 {
            let place = descriptor.place.wrapping_add(5);
            let access: u8 = self.load_sys(place)?;
            self.store_sys(place, access | 1)?;
            descriptor.low |= 1 << 40;
        }
        Ok(())
    }

    /// Loads a segment register other than CS.
    pub(crate) fn load_segment(&mut self, register: u8, selector: u16) -> Result<(), Trap> {
        let i = usize::from(register & 7);
        if !self.mode.has(Mode::PROTECTED) {
            self.load_real_segment(i, selector);
            return Ok(());
        }
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            if register == seg::SS
                && !(self.mode.has(Mode::CODE64) && self.cpl < 3 && rpl == self.cpl)
            {
                return Err(self.general_protection(0));
            }
            self.segment[i] = null_segment(selector, self.cpl);
            self.update_segment(i);
            return Ok(());
        }
        let mut descriptor = self.descriptor(selector, vector::GP)?;
        let kind = descriptor.kind();
        let allowed = if register == seg::SS {
            let writable = !descriptor.is_code() && kind & 2 != 0;
            descriptor.is_code_or_data()
                && writable
                && rpl == self.cpl
                && descriptor.dpl() == self.cpl
        } else {
            let readable = !descriptor.is_code() || kind & 2 != 0;
            let privileged = descriptor.is_conforming() || descriptor.dpl() >= rpl.max(self.cpl);
            descriptor.is_code_or_data() && readable && privileged
        };
        if !allowed {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            let vector = if register == seg::SS {
                vector::SS
            } else {
                vector::NP
            };
            return Err(self.selector_fault(vector, selector));
        }
        self.mark_accessed(&mut descriptor)?;
        self.segment[i] = descriptor.segment(selector);
        if register == seg::SS {
            self.update_mode();
        } else {
            self.update_segment(i);
        }
        Ok(())
    }

    /// Real and virtual-8086 mode: the base follows from the selector, the limit stays.
    pub(crate) fn load_real_segment(&mut self, i: usize, selector: u16) {
        let limit = if self.virtual_8086() {
            0xffff
        } else {
            self.segment[i].limit
        };
        let big = !self.virtual_8086() && self.segment[i].big;
        self.segment[i] = Segment {
            selector,
            base: u64::from(selector) << 4,
            limit,
            big,
            kind: if i == usize::from(seg::CS) && !self.virtual_8086() {
                11
            } else {
                3
            },
            code_or_data: true,
            present: true,
            dpl: self.cpl,
            ..Segment::default()
        };
        if i == usize::from(seg::CS) {
            self.update_mode();
        } else {
            self.update_segment(i);
        }
    }
}

/// A segment register with a null selector.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        dpl,
        unusable: true,
        ..Segment::default()
    }
}

fn move_to_segment(core: &mut Core, register: u8, selector: u16) -> Result<(), Trap> {
    if register == seg::CS {
        return Err(core.invalid_opcode());
    }
    core.load_segment(register, selector)?;
    if register == seg::SS {
        core.events.mov_ss_shadow = true;
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn push_segment<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let selector = core.segment[usize::from(op.dst)].selector;
    if T::BYTES == 4 {
        // Recent processors move 16 bits and leave the rest of the place as it is (SDM Vol. 2,
        // "PUSH").
        let place = core.stack_place(T::BYTES.wrapping_neg(), 2, true)?;
        core.store(place, selector)?;
        core.drop_stack(T::BYTES.wrapping_neg());
        return Ok(());
    }
    core.push(T::truncate(u64::from(selector)))
}

fn pop_segment<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let selector: T = core.peek(0)?;
    // Popping SS may change how wide the stack pointer is; the old width counts.
    let before = core.regs[gpr::RSP];
    core.drop_stack(T::BYTES);
    if let Err(trap) = move_to_segment(core, op.dst, selector.zero_extend() as u16) {
        core.regs[gpr::RSP] = before;
        return Err(trap);
    }
    Ok(())
}

/// The selector with the source's requested level, if that is lower in privilege. ZF is clear if it
/// is not.
fn adjust_level(core: &mut Core, op: &Op, selector: u16) -> Option<u16> {
    let level = core.reg::<u16>(op.src) & 3;
    let lower = selector & 3 < level;
    if !lower {
        core.flags.set_zf(false);
    }
    lower.then_some(selector & !3 | level)
}

fn select_far_pointer<const SEGMENT: u8>(form: &Form) -> Handler {
    match form.width {
        2 => load_far_pointer::<u16, SEGMENT>,
        4 => load_far_pointer::<u32, SEGMENT>,
        _ => load_far_pointer::<u64, SEGMENT>,
    }
}

/// Reads an offset and the selector behind it.
pub(crate) fn far_pointer<T: Int>(core: &mut Core, op: &Op) -> Result<(u64, u16), Trap> {
    let linear = Segmented::for_read(core, op, T::BYTES + 2)?;
    let offset: T = core.load(linear)?;
    let selector = core.load(linear.wrapping_add(T::BYTES))?;
    Ok((offset.zero_extend(), selector))
}

fn load_far_pointer<T: Int, const SEGMENT: u8>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = far_pointer::<T>(core, op)?;
    core.load_segment(SEGMENT, selector)?;
    core.set_reg(op.dst, T::truncate(offset));
    if SEGMENT == seg::SS {
        core.stop = true;
    }
    Ok(())
}
