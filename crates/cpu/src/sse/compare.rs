//! Floating-point comparison into masks and into flags, and PTEST.

use super::float::{float_handler, float_immediate};
use super::host::{self, Ordering};
use super::operand::{Source, by_source};
use super::precision;
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::state::rflags;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler for a scalar comparison whose outcome goes to ZF, PF and CF.
macro_rules! ordering {
    ($form:expr, $memory:ident, $compare:expr) => {
        by_source!($form, $memory, S => (float_handler!(
            S,
            |a, b, _| $compare(a, b),
            precision::none,
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
        M::Comiss => ordering!(form, Low32, host::comiss),
        M::Comisd => ordering!(form, Low64, host::comisd),
        M::Ucomiss => ordering!(form, Low32, host::ucomiss),
        M::Ucomisd => ordering!(form, Low64, host::ucomisd),
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
pub(super) fn test<S: Source>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let a = core.xmm(op.dst);
    core.flags.set_arithmetic(image(Ordering {
        zf: a & b == 0,
        pf: false,
        cf: !a & b == 0,
    }));
    Ok(())
}
