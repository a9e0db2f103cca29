//! Floating-point comparison into masks and into flags, and PTEST.

use super::float::{float_handler, float_immediate};
use super::host::{self, Ordering};
use super::operand::{Lanes as _, Shape, by_shape};
use super::precision::Roundings;
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::state::rflags;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler for a scalar comparison whose outcome goes to ZF, PF and CF.
macro_rules! ordering {
    ($form:expr, $memory:ident, $compare:expr) => {
        by_shape!(pair, $form, $memory, X => (float_handler!(
            X,
            |a: <X as Shape>::Value, b: <X as Shape>::Value, _| $compare(a.low(), b.low()),
            |_, _| Roundings::default(),
            |core: &mut Core, _: &Op, outcome| core.flags.set_arithmetic(image(outcome))
        )))
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Cmpps => float_immediate!(form, Aligned, host::cmpps),
        M::Cmppd => float_immediate!(form, Aligned, host::cmppd),
        M::Cmpss => float_immediate!(form, Low32, host::cmpss),
        M::Cmpsd => float_immediate!(form, Low64, host::cmpsd),
        M::Vcmpps => float_immediate!(form, Aligned, host::vcmpps),
        M::Vcmppd => float_immediate!(form, Aligned, host::vcmppd),
        M::Vcmpss => float_immediate!(form, Low32, host::vcmpss),
        M::Vcmpsd => float_immediate!(form, Low64, host::vcmpsd),
        M::Vtestps => by_shape!(pair, form, Aligned, X => test_signs::<X, 32>),
        M::Vtestpd => by_shape!(pair, form, Aligned, X => test_signs::<X, 64>),
        M::Comiss | M::Vcomiss => ordering!(form, Low32, host::comiss),
        M::Comisd | M::Vcomisd => ordering!(form, Low64, host::comisd),
        M::Ucomiss | M::Vucomiss => ordering!(form, Low32, host::ucomiss),
        M::Ucomisd | M::Vucomisd => ordering!(form, Low64, host::ucomisd),
        _ => return None,
    })
}

/// The arithmetic flags after a scalar comparison: OF, SF and AF are clear.
#[inline(always)]
fn image(outcome: Ordering) -> u64 {
    (u64::from(outcome.zf) * rflags::ZF)
        | (u64::from(outcome.pf) * rflags::PF)
        | (u64::from(outcome.cf) * rflags::CF)
}

/// PTEST: ZF if no bit is common to both, CF if the source has no bit that the destination lacks;
/// the other flags are clear.
pub(super) fn test<X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    test_bits::<X>(core, op, u128::MAX)
}

/// VTESTPS and VTESTPD: PTEST of the sign bits of lanes of `BITS` bits.
fn test_signs<X: Shape, const BITS: u32>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let signs = (0..128 / BITS).fold(0, |signs, i| signs | 1 << (BITS * (i + 1) - 1));
    test_bits::<X>(core, op, signs)
}

fn test_bits<X: Shape>(core: &mut Core, op: &Op, which: u128) -> Result<(), Trap> {
    let b = X::second(core, op)?;
    let a = X::first(core, op);
    let (common, lacking) = a.fold(b, (0, 0), |(common, lacking), a, b| {
        (common | a & b & which, lacking | !a & b & which)
    });
    core.flags.set_arithmetic(image(Ordering {
        zf: common == 0,
        pf: false,
        cf: lacking == 0,
    }));
    Ok(())
}
