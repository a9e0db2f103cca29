//! A processor that runs a TD (trust domain): TDCALL, and the instructions that a TD does not
//! execute by itself. They leave with [`Exit::Intercepted`] to the TDX module, which gives most of
//! them back to the guest as #VE (TDX Module Base Architecture Specification, "Virtualization
//! Exceptions").

use crate::core_state::{Core, Pending};
use crate::form::Form;
use crate::memory::reason;
use crate::op::{Handler, Op};
use crate::trap::{Exit, Trap};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    (form.mnemonic == M::Tdcall).then_some(tdcall as Handler)
}

/// TDCALL: #UD outside a TD.
fn tdcall(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if !core.td {
        return Err(core.invalid_opcode());
    }
    core.require_ring_0()?;
    if core.pending == Pending::Tdcall {
        core.pending = Pending::None;
        return Ok(());
    }
    core.pending_rip = op.ip;
    Err(core.leave(Exit::Tdcall))
}

impl Core {
    /// Leaves if a TD does not execute the instruction by itself.
    #[inline]
    pub(crate) fn td_intercepts(&mut self, op: &Op, reason: u32) -> Result<(), Trap> {
        if self.td {
            Err(self.intercepted(op, reason, 0))
        } else {
            Ok(())
        }
    }

    /// Leaves for an instruction that a TD does not execute by itself.
    #[cold]
    pub(crate) fn intercepted(&mut self, op: &Op, reason: u32, qualification: u64) -> Trap {
        self.leave(Exit::Intercepted {
            reason,
            qualification,
            length: op.len,
        })
    }

    /// Leaves if a TD does not execute port I/O by itself. The qualification is that of an exit for
    /// an I/O instruction (SDM Vol. 3, "Exit Qualification for I/O Instructions").
    #[inline]
    pub(crate) fn td_intercepts_io(&mut self, op: &Op, access: &PortAccess) -> Result<(), Trap> {
        if self.td {
            let qualification = access.qualification(op.repeat != 0);
            Err(self.intercepted(op, reason::IO, qualification))
        } else {
            Ok(())
        }
    }
}

/// What an instruction does at a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    /// Bytes: 1, 2 or 4.
    pub(crate) size: u64,
    /// IN or INS.
    pub(crate) input: bool,
    /// INS or OUTS.
    pub(crate) string: bool,
    /// The port is an immediate.
    pub(crate) immediate: bool,
}

impl PortAccess {
    fn qualification(&self, repeated: bool) -> u64 {
        (self.size - 1)
            | u64::from(self.input) << 3
            | u64::from(self.string) << 4
            | u64::from(self.string && repeated) << 5
            | u64::from(self.immediate) << 6
            | u64::from(self.port) << 16
    }
}
