//! The x87 unit (SDM Vol. 1, "Programming with the x87 FPU").
//!
//! The registers are kept as an image has them, from the top of the stack on: when the top moves,
//! they do. `control` has the instructions that change how the unit works or tell what it is in,
//! `environment` those that move all of its state, `compute` all others, which `host` executes.

mod compute;
mod control;
mod environment;
mod host;

pub(crate) use compute::note_opcode;

use crate::core_state::Core;
use crate::form::Form;
use crate::op::Handler;
use crate::state::{FpuState, cr0};
use crate::trap::{Exception, Trap, vector};

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    control::select(form)
        .or_else(|| environment::select(form))
        .or_else(|| compute::select(form))
}

/// Bits of the control word that can be written, and one that is always set.
const CONTROL: u16 = 0x1f3f;
const CONTROL_ONES: u16 = 0x40;

/// Fields of the status word.
mod status {
    /// The exceptions' flags, and in the control word their masks.
    pub(super) const EXCEPTIONS: u16 = 0x3f;
    pub(super) const PRECISION: u16 = 1 << 5;
    pub(super) const STACK_FAULT: u16 = 1 << 6;
    /// Some unmasked exception's flag is set: ES, and B, which is the same.
    pub(super) const SUMMARY: u16 = 1 << 7 | 1 << 15;
    /// The top of the stack, three bits.
    pub(super) const TOP_SHIFT: u32 = 11;
    pub(super) const TOP: u16 = 7 << TOP_SHIFT;
}

/// What x87 and MMX instructions ask before they do anything: #NM if the unit is switched off (for
/// MMX CR0.EM is #UD, which comes before this), #MF if an unmasked exception waits.
///
/// #MF is raised whatever CR0.NE says. Without NE a processor signals FERR# and waits for the
/// interrupt that a chipset makes of it; under KVM on Intel's processors NE is always set in truth.
pub(crate) fn ready(core: &mut Core) -> Result<(), Trap> {
    require_unit(core)?;
    report_exception(core)
}

/// #NM if the unit is switched off.
fn require_unit(core: &mut Core) -> Result<(), Trap> {
    if core.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(core.device_not_available());
    }
    Ok(())
}

/// #MF if an unmasked exception waits.
fn report_exception(core: &mut Core) -> Result<(), Trap> {
    if !exception_waits(&core.vectors) {
        return Ok(());
    }
    Err(core.raise(Exception {
        vector: vector::MF,
        error_code: None,
        payload: None,
    }))
}

/// Whether an unmasked exception's flag is set, whatever the summary says.
fn exception_waits(state: &FpuState) -> bool {
    state.fsw & !state.fcw & status::EXCEPTIONS != 0
}

/// Gives the unit a control and a status word: of the one, bits that do not exist are dropped, of
/// the other, the summary is worked out anew, whatever it says.
pub(crate) fn set_words(state: &mut FpuState, control: u16, status: u16) {
    state.fcw = control & CONTROL | CONTROL_ONES;
    state.fsw = status & !status::SUMMARY;
    if exception_waits(state) {
        state.fsw |= status::SUMMARY;
    }
}

/// The register that is the top of the stack.
fn top(state: &FpuState) -> u16 {
    (state.fsw & status::TOP) >> status::TOP_SHIFT
}

/// What FNINIT does. The registers are empty, but keep what they hold.
fn initialise(state: &mut FpuState) {
    let top = top(state);
    state.st.rotate_right(top.into());
    *state = FpuState {
        mxcsr: state.mxcsr,
        st: state.st,
        xmm: state.xmm,
        ymm_high: state.ymm_high,
        ..FpuState::default()
    };
}
