//! Call gates: far jumps and calls to a code segment that a gate names (SDM Vol. 3, "Call Gates").
//!
//! A call may lead to an inner level; then the stack comes from the task state segment and, in 32-
//! and 16-bit gates, parameters are copied to it.

use crate::core_state::{Core, seg};
use crate::events::Source;
use crate::mode::Mode;
use crate::segments::{Descriptor, null_segment};
use crate::state::{Segment, gpr};
use crate::trap::{Trap, vector};

/// Types of system descriptors.
mod kind {
    pub(super) const AVAILABLE_TASK16: u8 = 1;
    pub(super) const CALL_GATE16: u8 = 4;
    pub(super) const TASK_GATE: u8 = 5;
    pub(super) const AVAILABLE_TASK32: u8 = 9;
    pub(super) const CALL_GATE: u8 = 12;
}

/// A call gate that may be used, and the code that it leads to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// Offset in the code segment.
    target: u64,
    selector: u16,
    code: Descriptor,
    /// Bytes of what is pushed: 2, 4 or 8.
    size: u64,
    /// Parameters to copy, of `size` bytes.
    parameters: u64,
}

impl Core {
    /// The gate that a system descriptor is. Task gates and task segments end in an emulation
    /// error: task switches are not executed.
    pub(crate) fn call_gate(
        &mut self,
        descriptor: Descriptor,
        selector: u16,
    ) -> Result<Gate, Trap> {
        let long = self.long_mode();
        let (size, wide) = match descriptor.kind() {
            kind::CALL_GATE if long => (8, true),
            kind::CALL_GATE => (4, true),
            kind::CALL_GATE16 if !long => (2, false),
            kind::AVAILABLE_TASK16 | kind::AVAILABLE_TASK32 | kind::TASK_GATE if !long => {
                return Err(self.unsupported());
            }
            _ => return Err(self.selector_fault(vector::GP, selector)),
        };
        if descriptor.dpl() < self.cpl.max((selector & 3) as u8) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let low = descriptor.low;
        let mut target = low & 0xffff | if wide { low >> 32 & 0xffff_0000 } else { 0 };
        let mut parameters = low >> 32 & 0x1f;
        if long {
            // The second half holds the offset's upper half; its type field is zero.
            self.check_descriptor_half(selector)?;
            let high: u64 = self.load_sys(descriptor.place.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(self.selector_fault(vector::GP, selector));
            }
            target |= high << 32;
            parameters = 0;
        }
        let code_selector = (low >> 16) as u16;
        if code_selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let code = self.descriptor(code_selector, vector::GP)?;
        let is_64 = code.low >> 53 & 3 == 1;
        if !code.is_code() || code.dpl() > self.cpl || (long && !is_64) {
            return Err(self.selector_fault(vector::GP, code_selector));
        }
        Ok(Gate {
            target,
            selector: code_selector,
            code,
            size,
            parameters,
        })
    }

    /// JMP through a gate: the level stays.
    pub(crate) fn jump_through(&mut self, gate: Gate) -> Result<(), Trap> {
        if !gate.code.is_conforming() && gate.code.dpl() != self.cpl {
            return Err(self.selector_fault(vector::GP, gate.selector));
        }
        self.check_presence(&gate)?;
        self.enter_code(gate.code, gate.selector, self.cpl, gate.target)
    }

    /// #NP if the code is not there: looked at after everything about privilege.
    fn check_presence(&mut self, gate: &Gate) -> Result<(), Trap> {
        if gate.code.present() {
            Ok(())
        } else {
            Err(self.selector_fault(vector::NP, gate.selector))
        }
    }

    /// CALL through a gate, to return to `return_ip`. Nothing has changed if this fails.
    pub(crate) fn call_through(&mut self, gate: Gate, return_ip: u64) -> Result<(), Trap> {
        self.check_presence(&gate)?;
        let inner = !gate.code.is_conforming() && gate.code.dpl() < self.cpl;
        let cpl = if inner { gate.code.dpl() } else { self.cpl };
        let old_stack = self.segment[usize::from(seg::SS)];
        let old_pointer = if self.mode.has(Mode::CODE64) {
            self.regs[gpr::RSP]
        } else {
            self.regs[gpr::RSP] & 0xffff_ffff
        };
        let (stack, pointer) = if !inner {
            (old_stack, old_pointer)
        } else if self.long_mode() {
            let pointer = self.tss_stack(4 + u64::from(cpl) * 8, Source::Software)?;
            (null_segment(u16::from(cpl), cpl), pointer)
        } else {
            self.inner_stack(cpl, Source::Software)?
        };
        let mut frame = Frame {
            stack,
            top: pointer,
            size: gate.size,
            inner,
        };
        if inner {
            frame.push(self, old_stack.selector.into())?;
            frame.push(self, old_pointer)?;
            for parameter in (0..gate.parameters).rev() {
                let value = self.parameter(parameter * gate.size, gate.size)?;
                frame.push(self, value)?;
            }
        }
        let code = self.segment[usize::from(seg::CS)].selector;
        frame.push(self, code.into())?;
        frame.push(self, return_ip)?;
        self.enter_code(gate.code, gate.selector, cpl, gate.target)?;
        if inner {
            self.segment[usize::from(seg::SS)] = frame.stack;
            self.update_mode();
        }
        self.set_stack_pointer(frame.top);
        Ok(())
    }

    /// A parameter on the caller's stack, `distance` bytes above its top.
    fn parameter(&mut self, distance: u64, size: u64) -> Result<u64, Trap> {
        if size == 2 {
            self.peek::<u16>(distance).map(u64::from)
        } else {
            self.peek::<u32>(distance).map(u64::from)
        }
    }
}

/// What a call pushes, on the stack that it will run on.
struct Frame {
    stack: Segment,
    top: u64,
    size: u64,
    inner: bool,
}

impl Frame {
    fn push(&mut self, core: &mut Core, value: u64) -> Result<(), Trap> {
        let mask = match (self.size, self.stack.big) {
            (8, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            (_, false) => 0xffff,
        };
        self.top = self.top.wrapping_sub(self.size) & mask;
        let linear = if self.size == 8 {
            self.top
        } else if self.inner {
            self.check_limit(core)?;
            self.stack.base.wrapping_add(self.top) & 0xffff_ffff
        } else {
            core.linear(seg::SS, self.top, self.size, true)?
        };
        match (self.size, self.inner) {
            (2, true) => core.store_sys(linear, value as u16),
            (2, false) => core.store(linear, value as u16),
            (4, true) => core.store_sys(linear, value as u32),
            (4, false) => core.store(linear, value as u32),
            (_, true) => core.store_sys(linear, value),
            (_, false) => core.store(linear, value),
        }
    }

    /// #SS with the selector if the inner stack has no room.
    fn check_limit(&self, core: &mut Core) -> Result<(), Trap> {
        let limit = u64::from(self.stack.limit);
        let last = self.top + self.size - 1;
        let expands_down = self.stack.kind & 4 != 0;
        let fits = if expands_down {
            self.top > limit
        } else {
            last <= limit
        };
        if fits {
            Ok(())
        } else {
            Err(core.selector_fault(vector::SS, self.stack.selector))
        }
    }
}
