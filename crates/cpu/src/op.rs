//! Decoded operations and their operands.
//!
//! An [`Op`] is one instruction (or two that were fused) ready to run: a function and the operands
//! it needs. The functions are generic over the kinds of operands below, so that fetching a
//! register, an immediate or a memory operand costs what it must and nothing is asked at run time
//! that was known when the instruction was decoded.

use crate::core_state::{Core, Window, seg, slot};
use crate::int::Int;
use crate::mode::Mode;
use crate::trap::{Exception, Trap, vector};
use std::marker::PhantomData;

/// Executes an operation. On a [`Trap`] nothing has changed that the guest can see, except for
/// completed iterations of a repeated string instruction.
pub(crate) type Handler = fn(&mut Core, &Op) -> Result<(), Trap>;

/// One decoded instruction.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub(crate) run: Handler,
    /// Displacement of the memory operand. RIP-relative ones are already absolute.
    pub(crate) disp: u64,
    /// The immediate, sign-extended as the instruction wants it, or the target of a branch.
    pub(crate) imm: u64,
    /// Offset of the instruction in CS.
    pub(crate) ip: u64,
    /// Register slot of the memory operand's base.
    pub(crate) base: u8,
    /// Register slot of the memory operand's index.
    pub(crate) index: u8,
    /// log2 of the index's scale.
    pub(crate) scale: u8,
    /// Segment of the memory operand.
    pub(crate) seg: u8,
    /// The register that is the first operand.
    pub(crate) dst: u8,
    /// The register that is the second operand.
    pub(crate) src: u8,
    /// The register that is the third operand.
    pub(crate) aux: u8,
    /// Length of the instruction in bytes, 1 to 15.
    pub(crate) len: u8,
    /// Bits of the memory operand's offset: 16, 32 or 64.
    pub(crate) address_bits: u8,
    /// LOCK prefix (or XCHG with memory).
    pub(crate) lock: bool,
    /// REP or REPE (1), REPNE (2) or none (0).
    pub(crate) repeat: u8,
    /// Bytes of the first operand, for the few handlers that serve several widths.
    pub(crate) width: u8,
}

impl Op {
    /// Offset of the next instruction.
    #[inline(always)]
    pub(crate) fn next_ip(&self) -> u64 {
        self.ip.wrapping_add(u64::from(self.len))
    }

    /// Bits of an offset that count with this address size.
    #[inline(always)]
    pub(crate) fn address_mask(&self) -> u64 {
        u64::MAX >> (64 - u32::from(self.address_bits))
    }
}

/// Marks AH, CH, DH and BH in a register operand: the byte is taken from bit 8 up.
pub(crate) const HIGH_BYTE: u8 = 0x20;

impl Core {
    /// Reads a register.
    #[inline(always)]
    pub(crate) fn reg<T: Int>(&self, register: u8) -> T {
        let value = self.regs[usize::from(register) & (slot::COUNT - 1)];
        if T::BITS == 8 {
            T::truncate(value >> (register >> 2 & 8))
        } else {
            T::truncate(value)
        }
    }

    /// Writes a register: 32-bit writes clear the upper half, narrower ones keep the rest.
    #[inline(always)]
    pub(crate) fn set_reg<T: Int>(&mut self, register: u8, value: T) {
        let place = &mut self.regs[usize::from(register) & (slot::COUNT - 1)];
        *place = match T::BITS {
            8 => {
                let shift = register >> 2 & 8;
                *place & !(0xff << shift) | value.zero_extend() << shift
            }
            16 => *place & !0xffff | value.zero_extend(),
            _ => value.zero_extend(),
        };
    }

    /// The exception for an access outside a segment or to a non-canonical address: #SS(0) for the
    /// stack segment, #GP(0) for the others.
    #[cold]
    pub(crate) fn segment_fault(&mut self, segment: u8) -> Trap {
        let vector = if segment == seg::SS {
            vector::SS
        } else {
            vector::GP
        };
        self.raise(Exception {
            vector,
            error_code: Some(0),
            payload: None,
        })
    }

    /// The linear address of `size` bytes at `offset` in a segment, after checking the segment.
    #[inline(always)]
    pub(crate) fn linear(
        &mut self,
        segment: u8,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Trap> {
        let i = usize::from(segment & 7);
        let Window { low, high } = if write {
            self.writable[i]
        } else {
            self.readable[i]
        };
        let last = offset.wrapping_add(size - 1);
        if offset < low || last > high || (last < offset && !self.mode.has(Mode::CODE64)) {
            return Err(self.segment_fault(segment));
        }
        let linear = self.seg_base[i].wrapping_add(offset);
        Ok(if self.mode.has(Mode::CODE64) {
            linear
        } else {
            linear & 0xffff_ffff
        })
    }
}

/// How a memory operand's linear address is formed.
pub(crate) trait Address {
    /// Whether operations on this kind of address may carry a LOCK prefix.
    const MAY_LOCK: bool = false;

    /// Linear address for reading `size` bytes.
    fn for_read(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap>;
    /// Linear address for writing (or reading and writing) `size` bytes.
    fn for_write(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap>;
}

/// 64-bit, flat segment: base and displacement.
pub(crate) struct Based;
/// 64-bit, flat segment: base, index and displacement.
pub(crate) struct Scaled;
/// Anything else: segments with base and limit, 16- and 32-bit addresses, LOCK.
pub(crate) struct Segmented;

impl Address for Based {
    #[inline(always)]
    fn for_read(core: &mut Core, op: &Op, _size: u64) -> Result<u64, Trap> {
        Ok(core.regs[usize::from(op.base) & (slot::COUNT - 1)].wrapping_add(op.disp))
    }
    #[inline(always)]
    fn for_write(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap> {
        Self::for_read(core, op, size)
    }
}

impl Address for Scaled {
    #[inline(always)]
    fn for_read(core: &mut Core, op: &Op, _size: u64) -> Result<u64, Trap> {
        Ok(offset(core, op))
    }
    #[inline(always)]
    fn for_write(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap> {
        Self::for_read(core, op, size)
    }
}

impl Address for Segmented {
    const MAY_LOCK: bool = true;

    #[inline(always)]
    fn for_read(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap> {
        let offset = offset(core, op) & op.address_mask();
        core.linear(op.seg, offset, size, false)
    }
    #[inline(always)]
    fn for_write(core: &mut Core, op: &Op, size: u64) -> Result<u64, Trap> {
        let offset = offset(core, op) & op.address_mask();
        core.linear(op.seg, offset, size, true)
    }
}

/// Base, index and displacement of the memory operand, not yet cut to the address size.
#[inline(always)]
pub(crate) fn offset(core: &Core, op: &Op) -> u64 {
    let base = core.regs[usize::from(op.base) & (slot::COUNT - 1)];
    let index = core.regs[usize::from(op.index) & (slot::COUNT - 1)];
    base.wrapping_add(index << (op.scale & 3))
        .wrapping_add(op.disp)
}

/// An operand that can be read.
pub(crate) trait Read {
    /// Its value.
    fn read<T: Int>(core: &mut Core, op: &Op) -> Result<T, Trap>;
}

/// An operand that can be written, and changed in place.
pub(crate) trait Place: Read {
    /// Replaces its value.
    fn write<T: Int>(core: &mut Core, op: &Op, value: T) -> Result<(), Trap>;

    /// Replaces its value by what `f` makes of it. Returns the old and the new value.
    fn modify<T: Int>(core: &mut Core, op: &Op, f: impl Fn(T) -> T) -> Result<(T, T), Trap>;
}

/// The register that is the first operand.
pub(crate) struct Dst;
/// The register that is the second operand.
pub(crate) struct Src;
/// The register that is the third operand.
pub(crate) struct Aux;
/// The immediate operand.
pub(crate) struct Imm;
/// The memory operand.
pub(crate) struct Mem<A>(PhantomData<A>);

macro_rules! register_operand {
    ($kind:ident, $field:ident) => {
        impl Read for $kind {
            #[inline(always)]
            fn read<T: Int>(core: &mut Core, op: &Op) -> Result<T, Trap> {
                Ok(core.reg(op.$field))
            }
        }
        impl Place for $kind {
            #[inline(always)]
            fn write<T: Int>(core: &mut Core, op: &Op, value: T) -> Result<(), Trap> {
                core.set_reg(op.$field, value);
                Ok(())
            }
            #[inline(always)]
            fn modify<T: Int>(
                core: &mut Core,
                op: &Op,
                f: impl Fn(T) -> T,
            ) -> Result<(T, T), Trap> {
                let old = core.reg(op.$field);
                let new = f(old);
                core.set_reg(op.$field, new);
                Ok((old, new))
            }
        }
    };
}

register_operand!(Dst, dst);
register_operand!(Src, src);
register_operand!(Aux, aux);

impl Read for Imm {
    #[inline(always)]
    fn read<T: Int>(_core: &mut Core, op: &Op) -> Result<T, Trap> {
        Ok(T::truncate(op.imm))
    }
}

impl<A: Address> Read for Mem<A> {
    #[inline(always)]
    fn read<T: Int>(core: &mut Core, op: &Op) -> Result<T, Trap> {
        let linear = A::for_read(core, op, T::BYTES)?;
        core.load(linear)
    }
}

impl<A: Address> Place for Mem<A> {
    #[inline(always)]
    fn write<T: Int>(core: &mut Core, op: &Op, value: T) -> Result<(), Trap> {
        let linear = A::for_write(core, op, T::BYTES)?;
        core.store(linear, value)
    }
    #[inline(always)]
    fn modify<T: Int>(core: &mut Core, op: &Op, f: impl Fn(T) -> T) -> Result<(T, T), Trap> {
        let linear = A::for_write(core, op, T::BYTES)?;
        core.rmw(linear, A::MAY_LOCK && op.lock, f)
    }
}
