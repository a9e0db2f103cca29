//! RDRAND and RDSEED, answered by the host's own.

use crate::core_state::Core;
use crate::form::Form;
use crate::int::Int;
use crate::op::{Handler, Op};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// Which of the two instructions the host has, and so this processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sources {
    pub(crate) rdrand: bool,
    pub(crate) rdseed: bool,
}

impl Sources {
    pub(crate) fn detected() -> Self {
        Self {
            rdrand: std::is_x86_feature_detected!("rdrand"),
            rdseed: std::is_x86_feature_detected!("rdseed"),
        }
    }
}

/// The handler for an instruction of this subject, if the host has it.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let Sources { rdrand, rdseed } = Sources::detected();
    Some(match (form.mnemonic, form.width) {
        (M::Rdrand, _) if !rdrand => return None,
        (M::Rdseed, _) if !rdseed => return None,
        (M::Rdrand, 2) => |core, op| deliver::<u16>(core, op, random()),
        (M::Rdrand, 4) => |core, op| deliver::<u32>(core, op, random()),
        (M::Rdrand, _) => |core, op| deliver::<u64>(core, op, random()),
        (M::Rdseed, 2) => |core, op| deliver::<u16>(core, op, seed()),
        (M::Rdseed, 4) => |core, op| deliver::<u32>(core, op, seed()),
        (M::Rdseed, _) => |core, op| deliver::<u64>(core, op, seed()),
        _ => return None,
    })
}

fn random() -> Option<u64> {
    #[target_feature(enable = "rdrand")]
    fn read() -> Option<u64> {
        let mut value = 0;
        (core::arch::x86_64::_rdrand64_step(&mut value) == 1).then_some(value)
    }
    #[expect(unsafe_code)]
    // UNSAFETY: the instruction has to be there.
    // SAFETY: `select` has looked.
    unsafe {
        read()
    }
}

fn seed() -> Option<u64> {
    #[target_feature(enable = "rdseed")]
    fn read() -> Option<u64> {
        let mut value = 0;
        (core::arch::x86_64::_rdseed64_step(&mut value) == 1).then_some(value)
    }
    #[expect(unsafe_code)]
    // UNSAFETY: the instruction has to be there.
    // SAFETY: `select` has looked.
    unsafe {
        read()
    }
}

/// CF says whether there was a value; without one the register is zero. The other flags are clear.
fn deliver<T: Int>(core: &mut Core, op: &Op, value: Option<u64>) -> Result<(), Trap> {
    core.set_reg(op.dst, T::truncate(value.unwrap_or(0)));
    let carry = u64::from(value.is_some()) * crate::state::rflags::CF;
    core.flags.set_arithmetic(carry);
    Ok(())
}
