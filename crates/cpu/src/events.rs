//! Exceptions and interrupts: through the IDT in long and protected mode, through the vector table
//! in real mode.

use crate::breakpoints::{dr6, dr7};
use crate::core_state::{Core, Pending, seg};
use crate::form::Form;
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::segments::null_segment;
use crate::state::{Segment, gpr, rflags};
use crate::trap::{Exception, Exit, Trap, vector};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Int => |core, op| {
            core.require_v86_iopl()?;
            software_interrupt(core, op, op.imm as u8)
        },
        M::Int3 => |core, op| {
            if core.debug_control.software_breakpoints {
                return Err(core.leave(Exit::Debug {
                    exception: vector::BP,
                    pc: core.code_linear(op.ip),
                    dr6: core.debug.dr6,
                    dr7: core.effective_dr7(),
                }));
            }
            software_interrupt(core, op, vector::BP)
        },
        M::Into => |core, op| {
            if core.flags.of() {
                software_interrupt(core, op, vector::OF)
            } else {
                Ok(())
            }
        },
        M::Int1 => |core, op| {
            if core.debugged_from_outside() {
                return Err(core.leave(core.debug_exit(op.ip, 0)));
            }
            let after = op.next_ip();
            deliver_and_go(core, vector::DB, None, Source::Hardware, after)
        },
        M::Ud0 | M::Ud1 | M::Ud2 => crate::decode::invalid,
        _ => return None,
    })
}

/// Where an event comes from: decides the privilege check and the EXT bit of error codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// INT n, INT3, INTO: the gate's DPL is checked.
    Software,
    /// Exceptions, external interrupts, NMI.
    Hardware,
}

/// Whether an exception pushes an error code.
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// Contributory exceptions (SDM Vol. 3, "Interrupt 8: Double Fault").
fn is_contributory(vector: u8) -> bool {
    matches!(
        vector,
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP
    )
}

fn software_interrupt(core: &mut Core, op: &Op, vector: u8) -> Result<(), Trap> {
    deliver_and_go(core, vector, None, Source::Software, op.next_ip())
}

/// Delivers an event whose handler returns to `return_ip`.
fn deliver_and_go(
    core: &mut Core,
    vector: u8,
    error_code: Option<u32>,
    source: Source,
    return_ip: u64,
) -> Result<(), Trap> {
    let before = core.rip;
    core.rip = return_ip;
    let result = core.deliver(vector, error_code, source);
    if let Err(trap) = result {
        core.rip = before;
        if trap == Trap::Exit {
            core.exit_length = Some(0);
        }
    }
    result
}

impl Core {
    /// Whether an event waits that could be delivered at the next boundary.
    pub(crate) fn has_pending_event(&self) -> bool {
        let events = &self.events;
        events.exception.is_some()
            || events.nmi_injected
            || events.interrupt.is_some()
            || (events.nmi_pending && !events.nmi_masked && !self.debug_control.block_interrupts)
    }

    /// Delivers the event that waits, the most urgent first. Returns why the hypervisor has to act
    /// if it has to; then the event still waits.
    pub(crate) fn deliver_pending_event(&mut self) -> Option<Exit> {
        if let Some(exception) = self.events.exception {
            let exit = self.deliver_exception(exception);
            if exit.is_none() {
                self.events.exception = None;
            }
            return exit;
        }
        if self.events.nmi_pending
            && !self.events.nmi_masked
            && !self.events.mov_ss_shadow
            && !self.debug_control.block_interrupts
        {
            self.events.nmi_pending = false;
            self.events.nmi_injected = true;
        }
        if self.events.nmi_injected {
            let exit = self.deliver_interrupt(vector::NMI);
            if exit.is_none() {
                self.events.nmi_injected = false;
                self.events.nmi_masked = true;
            }
            return exit;
        }
        if let Some(vector) = self.events.interrupt {
            let exit = self.deliver_interrupt(vector);
            if exit.is_none() {
                self.events.interrupt = None;
            }
            return exit;
        }
        None
    }

    /// Delivers an exception that the instruction at RIP raised.
    pub(crate) fn deliver_fault(&mut self, exception: Exception) -> Option<Exit> {
        self.deliver_exception(exception)
    }

    fn deliver_interrupt(&mut self, vector: u8) -> Option<Exit> {
        match self.deliver(vector, None, Source::Hardware) {
            Ok(()) => self.delivered(),
            Err(Trap::Exception) => {
                // Neither an interrupt nor an NMI is contributory: the fault is delivered alone.
                let fault = self.fault;
                self.deliver_exception(fault)
            }
            Err(Trap::Exit | Trap::Again) => Some(self.exit),
        }
    }

    /// An event has been delivered.
    fn delivered(&mut self) -> Option<Exit> {
        self.counters.events += 1;
        self.attention = true;
        // The instruction whose answer was an exception is done with.
        self.pending = Pending::None;
        self.events.sti_shadow = false;
        self.events.mov_ss_shadow = false;
        self.mmio_retire();
        None
    }

    /// Delivers an exception; what delivering it raises becomes a double fault or takes its place;
    /// what delivering a double fault raises is a shutdown.
    fn deliver_exception(&mut self, first: Exception) -> Option<Exit> {
        let mut current = first;
        loop {
            self.mem.not_canonical = None;
            if current.vector == vector::PF
                && let Some(address) = current.payload
            {
                self.cr2 = address;
            }
            if current.vector == vector::DB {
                let payload = current.payload.unwrap_or(0);
                self.debug.dr6 = self.debug.dr6 & !dr6::MATCHED | payload;
                // General detect is off while the handler runs.
                self.debug.dr7 &= !dr7::GD;
            }
            let error_code = if self.real_mode() {
                None
            } else {
                current.error_code
            };
            match self.deliver(current.vector, error_code, Source::Hardware) {
                Ok(()) => return self.delivered(),
                Err(Trap::Exit | Trap::Again) => return Some(self.exit),
                Err(Trap::Exception) => {}
            }
            let second = self.fault;
            if current.vector == vector::DF {
                return Some(Exit::Shutdown);
            }
            let page_fault = |vector| vector == vector::PF || vector == vector::VE;
            let double = (is_contributory(current.vector) && is_contributory(second.vector))
                || (page_fault(current.vector)
                    && (is_contributory(second.vector) || page_fault(second.vector)));
            current = if double {
                if page_fault(second.vector)
                    && let Some(address) = second.payload
                {
                    self.cr2 = address;
                }
                Exception {
                    vector: vector::DF,
                    error_code: Some(0),
                    payload: None,
                }
            } else {
                second
            };
        }
    }

    /// Delivers one event at RIP. On a trap nothing but memory below the new stack pointer has
    /// changed.
    fn deliver(&mut self, vector: u8, error_code: Option<u32>, source: Source) -> Result<(), Trap> {
        let pending = self.breakpoints.pending;
        self.delivering = true;
        let result = if self.real_mode() {
            self.deliver_real(vector)
        } else if self.long_mode() {
            self.deliver_long(vector, error_code, source)
        } else {
            self.deliver_protected(vector, error_code, source)
        };
        self.delivering = false;
        // Writing the frame matches no breakpoint; the event takes the place of a single step.
        self.breakpoints.pending = pending;
        if result.is_ok() {
            self.step_trap = false;
            self.iterating = false;
        }
        result
    }

    /// The flags that an event's frame holds. RF is set for faults other than debug exceptions and
    /// between the iterations of a repeated instruction (SDM Vol. 3, "Instruction-Breakpoint
    /// Exception Condition").
    fn saved_flags(&self, vector: u8, source: Source) -> u64 {
        let fault = source == Source::Hardware && is_fault(vector);
        if fault || self.iterating {
            self.flags.image() | rflags::RF
        } else if source == Source::Software {
            self.flags.image() & !rflags::RF
        } else {
            self.flags.image()
        }
    }

    /// Real mode: FLAGS, CS and IP are pushed; the table holds offset and segment.
    fn deliver_real(&mut self, vector: u8) -> Result<(), Trap> {
        let entry = u64::from(vector) * 4;
        if entry + 3 > u64::from(self.idt.limit) {
            return Err(self.general_protection(0));
        }
        let target: u32 = self.load_sys(self.idt.base.wrapping_add(entry) & 0xffff_ffff)?;
        let before = self.regs[gpr::RSP];
        let flags = self.flags.image() as u16;
        let selector = self.segment[usize::from(seg::CS)].selector;
        let ip = self.rip as u16;
        let pushed = self
            .push(flags)
            .and_then(|()| self.push(selector))
            .and_then(|()| self.push(ip));
        if let Err(trap) = pushed {
            self.regs[gpr::RSP] = before;
            return Err(trap);
        }
        let cleared = rflags::IF | rflags::TF | rflags::AC | rflags::RF;
        self.flags.set_system(self.flags.system() & !cleared);
        self.load_real_segment(usize::from(seg::CS), (target >> 16) as u16);
        self.rip = u64::from(target & 0xffff);
        self.update_mode();
        Ok(())
    }

    /// Raises an exception about a gate in the IDT or about what it refers to.
    fn gate_fault(&mut self, vector: u8, code: u32, source: Source) -> Trap {
        let external = u32::from(source == Source::Hardware);
        self.raise(Exception {
            vector,
            error_code: Some(code | external),
            payload: None,
        })
    }

    /// Long mode (SDM Vol. 3, "Exception and Interrupt Handling in 64-bit Mode").
    fn deliver_long(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
        source: Source,
    ) -> Result<(), Trap> {
        let in_idt = u32::from(vector) << 3 | 2;
        let offset = u64::from(vector) * 16;
        if offset + 15 > u64::from(self.idt.limit) {
            return Err(self.gate_fault(vector::GP, in_idt, source));
        }
        let place = self.idt.base.wrapping_add(offset);
        let low: u64 = self.load_sys(place)?;
        let high: u64 = self.load_sys(place.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        let gate_dpl = (low >> 45 & 3) as u8;
        if !matches!(kind, 14 | 15) || (source == Source::Software && gate_dpl < self.cpl) {
            return Err(self.gate_fault(vector::GP, in_idt, source));
        }
        if low >> 47 & 1 == 0 {
            return Err(self.gate_fault(vector::NP, in_idt, source));
        }
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let selector = (low >> 16) as u16;
        let ist = low >> 32 & 7;
        if selector & !3 == 0 {
            return Err(self.gate_fault(vector::GP, 0, source));
        }
        let about_selector = u32::from(selector & !3);
        let mut descriptor = match self.descriptor(selector, vector::GP) {
            Ok(descriptor) => descriptor,
            Err(Trap::Exception) if self.fault.vector == vector::GP => {
                return Err(self.gate_fault(vector::GP, about_selector, source));
            }
            Err(trap) => return Err(trap),
        };
        let long = descriptor.low >> 53 & 1 != 0 && descriptor.low >> 54 & 1 == 0;
        if !descriptor.is_code() || descriptor.dpl() > self.cpl || !long {
            return Err(self.gate_fault(vector::GP, about_selector, source));
        }
        if !descriptor.present() {
            return Err(self.gate_fault(vector::NP, about_selector, source));
        }
        let inner = !descriptor.is_conforming() && descriptor.dpl() < self.cpl;
        let cpl = if inner { descriptor.dpl() } else { self.cpl };
        let stack = if ist != 0 {
            self.tss_stack(0x24 + (ist - 1) * 8, source)?
        } else if inner {
            self.tss_stack(4 + u64::from(cpl) * 8, source)?
        } else {
            self.regs[gpr::RSP]
        };
        let error = error_code.filter(|_| has_error_code(vector)).map(u64::from);
        // The frame is aligned to 16 bytes before anything is pushed. Its first and its last word
        // say about the others.
        let mut top = stack & !15;
        let words = 5 + u64::from(error.is_some());
        let places = [stack, top.wrapping_sub(8), top.wrapping_sub(8 * words)];
        if !places.iter().all(|place| self.is_canonical(*place)) {
            return Err(self.gate_fault(vector::SS, 0, source));
        }
        if !self.is_canonical(target) {
            return Err(self.gate_fault(vector::GP, 0, source));
        }
        let image = self.saved_flags(vector, source);
        let old_stack = if self.mode.has(Mode::CODE64) {
            self.regs[gpr::RSP]
        } else {
            self.regs[gpr::RSP] & 0xffff_ffff
        };
        let frame = [
            Some(u64::from(self.segment[usize::from(seg::SS)].selector)),
            Some(old_stack),
            Some(image),
            Some(u64::from(self.segment[usize::from(seg::CS)].selector)),
            Some(self.rip),
            error,
        ];
        let was_user = self.user;
        self.mark_accessed(&mut descriptor)?;
        for value in frame.into_iter().flatten() {
            top = top.wrapping_sub(8);
            self.push_frame(top, value, was_user && cpl != 3)?;
        }
        // Everything has been read and written that could fault.
        let code = descriptor.segment(selector & !3 | u16::from(cpl));
        if inner {
            // SS is null with the new level as its RPL.
            self.segment[usize::from(seg::SS)] = null_segment(u16::from(cpl), cpl);
        }
        self.segment[usize::from(seg::CS)] = code;
        self.cpl = cpl;
        self.regs[gpr::RSP] = top;
        self.rip = target;
        let mut cleared = rflags::TF | rflags::VM | rflags::RF | rflags::NT;
        if kind == 14 {
            cleared |= rflags::IF;
        }
        self.flags.set_system(self.flags.system() & !cleared);
        self.update_mode();
        Ok(())
    }

    /// Writes one word of an exception's frame with the rights of the handler's level.
    fn push_frame(&mut self, linear: u64, value: u64, supervisor: bool) -> Result<(), Trap> {
        if supervisor {
            self.store_sys(linear, value)
        } else {
            self.store(linear, value)
        }
    }

    /// A stack pointer from the 64-bit TSS.
    pub(crate) fn tss_stack(&mut self, offset: u64, source: Source) -> Result<u64, Trap> {
        if offset + 7 > u64::from(self.tr.limit) {
            let selector = u32::from(self.tr.selector & !3);
            return Err(self.gate_fault(vector::TS, selector, source));
        }
        self.load_sys(self.tr.base.wrapping_add(offset))
    }

    /// 32-bit protected mode: interrupt and trap gates of 16 and 32 bits.
    fn deliver_protected(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
        source: Source,
    ) -> Result<(), Trap> {
        let from_v86 = self.virtual_8086();
        let in_idt = u32::from(vector) << 3 | 2;
        let offset = u64::from(vector) * 8;
        if offset + 7 > u64::from(self.idt.limit) {
            return Err(self.gate_fault(vector::GP, in_idt, source));
        }
        let gate: u64 = self.load_sys(self.idt.base.wrapping_add(offset) & 0xffff_ffff)?;
        let kind = gate >> 40 & 0x1f;
        let gate_dpl = (gate >> 45 & 3) as u8;
        if kind == 5 {
            // A task gate.
            return Err(self.unsupported());
        }
        if !matches!(kind, 6 | 7 | 14 | 15) || (source == Source::Software && gate_dpl < self.cpl) {
            return Err(self.gate_fault(vector::GP, in_idt, source));
        }
        if gate >> 47 & 1 == 0 {
            return Err(self.gate_fault(vector::NP, in_idt, source));
        }
        let wide = kind >= 14;
        let target = gate & 0xffff | if wide { gate >> 32 & 0xffff_0000 } else { 0 };
        let selector = (gate >> 16) as u16;
        let about_selector = u32::from(selector & !3);
        if about_selector == 0 {
            return Err(self.gate_fault(vector::GP, 0, source));
        }
        let mut descriptor = match self.descriptor(selector, vector::GP) {
            Ok(descriptor) => descriptor,
            Err(Trap::Exception) if self.fault.vector == vector::GP => {
                return Err(self.gate_fault(vector::GP, about_selector, source));
            }
            Err(trap) => return Err(trap),
        };
        if !descriptor.is_code() || descriptor.dpl() > self.cpl {
            return Err(self.gate_fault(vector::GP, about_selector, source));
        }
        if !descriptor.present() {
            return Err(self.gate_fault(vector::NP, about_selector, source));
        }
        let code = descriptor.segment(selector);
        if target > u64::from(code.limit) {
            return Err(self.gate_fault(vector::GP, 0, source));
        }
        let inner = !descriptor.is_conforming() && descriptor.dpl() < self.cpl;
        let cpl = if inner { descriptor.dpl() } else { self.cpl };
        if from_v86 && cpl != 0 {
            return Err(self.gate_fault(vector::GP, about_selector, source));
        }
        let image = self.saved_flags(vector, source);
        let selectors = self.v86_selectors();
        let old = [
            u64::from(self.segment[usize::from(seg::SS)].selector),
            self.regs[gpr::RSP],
            image,
            u64::from(self.segment[usize::from(seg::CS)].selector),
            self.rip,
        ];
        let error = error_code.filter(|_| has_error_code(vector)).map(u64::from);
        let (stack_segment, stack) = if inner {
            self.inner_stack(cpl, source)?
        } else {
            (self.segment[usize::from(seg::SS)], self.regs[gpr::RSP])
        };
        let words = if inner { &old[..] } else { &old[2..] };
        let size = if wide { 4 } else { 2 };
        let mask = if stack_segment.big {
            0xffff_ffff
        } else {
            0xffff
        };
        let mut top = stack;
        self.mark_accessed(&mut descriptor)?;
        let segments = if from_v86 { &selectors[..] } else { &[] };
        for value in segments.iter().chain(words).copied().chain(error) {
            top = top.wrapping_sub(size) & mask;
            let linear = stack_segment.base.wrapping_add(top) & 0xffff_ffff;
            if !inner {
                // The current stack's limits hold.
                self.linear(seg::SS, top, size, true)?;
            }
            match (wide, inner) {
                (true, true) => self.store_sys(linear, value as u32)?,
                (true, false) => self.store(linear, value as u32)?,
                (false, true) => self.store_sys(linear, value as u16)?,
                (false, false) => self.store(linear, value as u16)?,
            }
        }
        if inner {
            self.segment[usize::from(seg::SS)] = stack_segment;
        }
        self.segment[usize::from(seg::CS)] = Segment {
            selector: selector & !3 | u16::from(cpl),
            ..code
        };
        if from_v86 {
            self.clear_v86_segments();
        }
        self.cpl = cpl;
        self.rip = target;
        let mut cleared = rflags::TF | rflags::VM | rflags::RF | rflags::NT;
        if kind & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.flags.set_system(self.flags.system() & !cleared);
        self.update_mode();
        self.regs[gpr::RSP] = if stack_segment.big {
            top
        } else {
            self.regs[gpr::RSP] & !0xffff | top
        };
        Ok(())
    }

    /// Stack segment and pointer of an inner level from the 32-bit TSS.
    pub(crate) fn inner_stack(&mut self, cpl: u8, source: Source) -> Result<(Segment, u64), Trap> {
        let tss = u32::from(self.tr.selector & !3);
        let wide = self.tr.kind & 8 != 0;
        let (offset, size) = if wide {
            (4 + u64::from(cpl) * 8, 4)
        } else {
            (2 + u64::from(cpl) * 4, 2)
        };
        if offset + 2 * size - 1 > u64::from(self.tr.limit) {
            return Err(self.gate_fault(vector::TS, tss, source));
        }
        let place = self.tr.base.wrapping_add(offset);
        let (stack, selector) = if wide {
            let stack: u32 = self.load_sys(place)?;
            (
                u64::from(stack),
                self.load_sys::<u16>(place.wrapping_add(4))?,
            )
        } else {
            let stack: u16 = self.load_sys(place)?;
            (
                u64::from(stack),
                self.load_sys::<u16>(place.wrapping_add(2))?,
            )
        };
        let about = u32::from(selector & !3);
        if about == 0 || (selector & 3) as u8 != cpl {
            return Err(self.gate_fault(vector::TS, about, source));
        }
        let mut descriptor = self.descriptor(selector, vector::TS)?;
        let writable =
            descriptor.is_code_or_data() && !descriptor.is_code() && descriptor.kind() & 2 != 0;
        if !writable || descriptor.dpl() != cpl {
            return Err(self.gate_fault(vector::TS, about, source));
        }
        if !descriptor.present() {
            return Err(self.gate_fault(vector::SS, about, source));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok((descriptor.segment(selector), stack))
    }
}

/// Whether the saved RIP is that of the instruction that raised the exception, so that RF is set
/// in the saved flags.
fn is_fault(vector: u8) -> bool {
    vector < 32
        && !matches!(
            vector,
            vector::DB | vector::NMI | vector::BP | vector::OF | vector::MC | vector::DF
        )
}
