//! The MMX registers, which are the significands of the x87 registers (SDM Vol. 3, "Intel MMX
//! Technology System Programming").
//!
//! What is computed from them is what the same instruction computes from the lower half of vector
//! registers. The handlers are with those of the other forms; here is where their operands are.
//!
//! Whatever uses an MMX register turns the x87 stack into registers: its top becomes 0, and every
//! register full. One that is written gets a sign and an exponent of ones.

use super::float::float_handler;
use super::operand::{Aligned, Lanes as _, Legacy, Low64, One, Shape, Source, VectorSrc};
use super::precision::Roundings;
use super::{host, moves::LOW64};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::op::{Handler, Op, Segmented};
use crate::state::cr0;
use crate::trap::Trap;
use crate::x87;
use iced_x86::Mnemonic as M;
use std::marker::PhantomData;

/// Sign and exponent of a register that was written.
const ONES: u128 = 0xffff << 64;
/// The top of the x87 stack in the status word.
const TOP_SHIFT: u32 = 11;
const TOP: u16 = 7 << TOP_SHIFT;

impl Core {
    /// Whether MMX instructions may be executed: #UD if the unit is emulated, #NM if it is switched
    /// off, #MF if an x87 exception waits.
    #[inline(always)]
    pub(super) fn require_mmx(&mut self) -> Result<(), Trap> {
        if self.cr0 & cr0::EM != 0 {
            return Err(self.invalid_opcode());
        }
        x87::ready(self)
    }

    /// Reads an MMX register.
    #[inline(always)]
    pub(super) fn mm(&self, register: u8) -> u64 {
        let top = (self.vectors.fsw & TOP) >> TOP_SHIFT;
        let place = u16::from(register).wrapping_sub(top) & 7;
        self.vectors.st[usize::from(place)] as u64
    }

    /// The x87 registers become MMX registers.
    #[inline(always)]
    pub(super) fn enter_mmx(&mut self) {
        let state = &mut self.vectors;
        let top = (state.fsw & TOP) >> TOP_SHIFT;
        if top != 0 {
            state.st.rotate_right(top.into());
            state.fsw &= !TOP;
        }
        state.ftw = 0xff;
    }

    /// Writes an MMX register.
    #[inline(always)]
    pub(super) fn set_mm(&mut self, register: u8, value: u64) {
        self.enter_mmx();
        self.vectors.st[usize::from(register & 7)] = ONES | u128::from(value);
    }
}

/// The MMX register that is the second operand.
pub(super) struct MmxSrc;

impl Source for MmxSrc {
    type Value = One;
    type General = Self;
    const IS_REGISTER: bool = true;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<One, Trap> {
        Ok([core.mm(op.src).into()])
    }
}

/// The destination is an MMX register, and the first source.
pub(super) struct Mmx<S>(PhantomData<S>);
/// The destination is a vector register, and the first source; the second is an MMX register.
pub(super) struct FromMmx;

impl<S: Source<Value = One>> Shape for Mmx<S> {
    type Value = One;
    type General = Mmx<S::General>;
    const IS_REGISTER: bool = S::IS_REGISTER;

    #[inline(always)]
    fn first(core: &Core, op: &Op) -> One {
        [core.mm(op.dst).into()]
    }
    #[inline(always)]
    fn second(core: &mut Core, op: &Op) -> Result<One, Trap> {
        core.require_mmx()?;
        S::read(core, op)
    }
    #[inline(always)]
    fn store(core: &mut Core, op: &Op, value: One) {
        core.set_mm(op.dst, value.low() as u64);
    }
}

impl Shape for FromMmx {
    type Value = One;
    type General = Self;
    const IS_REGISTER: bool = true;

    #[inline(always)]
    fn first(core: &Core, op: &Op) -> One {
        [core.xmm(op.dst)]
    }
    #[inline(always)]
    fn second(core: &mut Core, op: &Op) -> Result<One, Trap> {
        core.require_mmx()?;
        MmxSrc::read(core, op)
    }
    #[inline(always)]
    fn store(core: &mut Core, op: &Op, value: One) {
        core.enter_mmx();
        value.put(core, op.dst);
    }
}

/// Whether a form uses MMX registers and no vector register: it does not ask for CR4.OSFXSR.
pub(super) fn is_mmx_only(form: &Form) -> bool {
    let converts = matches!(
        form.mnemonic,
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi
    );
    form.mnemonic == M::Emms
        || form.kinds.contains(&Kind::Mm) && !form.kinds.contains(&Kind::Xmm) && !converts
}

/// A handler for a conversion between two integers in an MMX register or memory and floating point.
macro_rules! convert {
    ($form:expr, $register:ty, $memory:ty, $value:expr) => {
        match $form.kinds[1] {
            Kind::Mem => convert!(@ $memory, $value),
            _ => convert!(@ $register, $value),
        }
    };
    (@ $x:ty, $value:expr) => {{
        type X = $x;
        float_handler!(
            X,
            |a: <X as Shape>::Value, b: <X as Shape>::Value, _| a.zip(b, $value),
            |_, _| Roundings::default(),
            <X as Shape>::store
        )
    }};
}

/// The handler for an instruction that only the MMX unit has.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Emms => |core, _| {
            core.require_mmx()?;
            core.enter_mmx();
            core.vectors.ftw = 0;
            Ok(())
        },
        // With an operand in memory these have nothing to do with the MMX unit.
        M::Cvtpi2ps => convert!(form, FromMmx, Legacy<Low64<Segmented>>, |a, b| {
            a & !LOW64 | host::cvtdq2ps(b) & LOW64
        }),
        M::Cvtpi2pd => convert!(form, FromMmx, Legacy<Low64<Segmented>>, |_, b| {
            host::cvtdq2pd(b)
        }),
        // The upper half is not looked at.
        M::Cvtps2pi => convert!(form, Mmx<VectorSrc<One>>, Mmx<Low64<Segmented>>, |_, b| {
            host::cvtps2dq(b & LOW64)
        }),
        M::Cvttps2pi => convert!(form, Mmx<VectorSrc<One>>, Mmx<Low64<Segmented>>, |_, b| {
            host::cvttps2dq(b & LOW64)
        }),
        M::Cvtpd2pi => convert!(
            form,
            Mmx<VectorSrc<One>>,
            Mmx<Aligned<Segmented>>,
            |_, b| { host::cvtpd2dq(b) }
        ),
        M::Cvttpd2pi => convert!(
            form,
            Mmx<VectorSrc<One>>,
            Mmx<Aligned<Segmented>>,
            |_, b| { host::cvttpd2dq(b) }
        ),
        _ => return None,
    })
}

/// Two halves as one value: as if both operands of an instruction that works across lanes were one.
pub(super) fn joined(low: u128, high: u128) -> u128 {
    low & LOW64 | high << 64
}
