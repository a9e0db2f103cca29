//! IN, OUT, INS and OUTS.
//!
//! The instruction leaves with [`Exit::Io`] while RIP is still at it. When the processor runs
//! again a single transfer is completed at once; a string instruction is executed again and finds
//! its data.

use crate::core_state::{Core, Pending};
use crate::cpu::IO_BATCH_BYTES;
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::op::{Handler, Op};
use crate::state::{gpr, rflags};
use crate::td::PortAccess;
use crate::trap::{Exit, Trap};
use iced_x86::Mnemonic as M;

const RAX: u8 = gpr::RAX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.width) {
        (M::In, 1) => input::<u8>,
        (M::In, 2) => input::<u16>,
        (M::In, _) => input::<u32>,
        (M::Out, _) => match form.source_width() {
            1 => output::<u8>,
            2 => output::<u16>,
            _ => output::<u32>,
        },
        (M::Insb, _) => input_string::<u8>,
        (M::Insw, _) => input_string::<u16>,
        (M::Insd, _) => input_string::<u32>,
        (M::Outsb, _) => output_string::<u8>,
        (M::Outsw, _) => output_string::<u16>,
        (M::Outsd, _) => output_string::<u32>,
        _ => return None,
    })
}

/// The marker in [`Op::aux`] for a port that is an immediate.
pub(crate) const PORT_IS_IMMEDIATE: u8 = 1;

/// Notes in the operation where its port number comes from.
pub(crate) fn note_port(form: &Form, op: &mut Op) {
    if matches!(form.mnemonic, M::In | M::Out) {
        op.aux = u8::from(form.kinds.contains(&Kind::Imm)) * PORT_IS_IMMEDIATE;
    }
}

fn port(core: &Core, op: &Op) -> u16 {
    if op.aux == PORT_IS_IMMEDIATE {
        op.imm as u16 & 0xff
    } else {
        core.reg(gpr::RDX as u8)
    }
}

impl Core {
    /// Whether the current privilege level may use `size` ports from `port` on: #GP(0) if neither
    /// IOPL nor the bitmap in the TSS allows it.
    fn check_io(&mut self, port: u16, size: u64) -> Result<(), Trap> {
        if self.real_mode() {
            return Ok(());
        }
        let iopl = (self.flags.system() & rflags::IOPL) >> 12;
        if u64::from(self.cpl) <= iopl && !self.virtual_8086() {
            return Ok(());
        }
        // The word at 0x66 is the offset of the bitmap; two bytes are always read from it.
        let limit = u64::from(self.tr.limit);
        let is_tss32 = self.tr.kind & 0xd == 9;
        if self.tr.unusable || !self.tr.present || !is_tss32 || limit < 0x67 {
            return Err(self.general_protection(0));
        }
        let bitmap: u16 = self.load_sys(self.tr.base.wrapping_add(0x66))?;
        let at = u64::from(bitmap) + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.general_protection(0));
        }
        let bits: u16 = self.load_sys(self.tr.base.wrapping_add(at))?;
        let wanted = ((1u16 << size) - 1) << (port % 8);
        if bits & wanted != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// Leaves for port I/O of the instruction at `op`.
    fn leave_for_io(&mut self, op: &Op, size: u64, write: bool, count: u32, port: u16) -> Trap {
        self.note_port_access(port, size);
        self.pending_rip = op.ip;
        self.pending = if write {
            Pending::Out {
                count,
                next: op.next_ip(),
            }
        } else {
            Pending::In {
                size: size as u8,
                count,
                next: op.next_ip(),
            }
        };
        self.leave(Exit::Io {
            port,
            size: size as u8,
            write,
            count,
        })
    }

    /// Completes IN and OUT (not INS and OUTS) when the processor runs again. Returns whether an
    /// instruction was completed.
    pub(crate) fn complete_io(&mut self) -> bool {
        match self.pending {
            Pending::Out { next, .. } if !self.io_string => {
                self.pending = Pending::None;
                self.rip = next;
            }
            Pending::InReady { size, next, .. } if !self.io_string => {
                self.pending = Pending::None;
                let mut bytes = [0; 4];
                for (byte, data) in bytes.iter_mut().zip(&self.io_buffer) {
                    *byte = *data;
                }
                let value = u32::from_le_bytes(bytes);
                match size {
                    1 => self.set_reg(RAX, value as u8),
                    2 => self.set_reg(RAX, value as u16),
                    _ => self.set_reg(RAX, value),
                }
                self.rip = next;
            }
            _ => return false,
        }
        self.port_access_done();
        self.counters.instructions += 1;
        true
    }

    /// How many elements of a string transfer fit in one exit: what is left to do, to the end of
    /// the page that memory's side is in, and to the end of the hypervisor's buffer.
    fn batch(&self, op: &Op, register: usize, size: u64) -> u64 {
        if op.repeat == 0 {
            return 1;
        }
        let in_page = if self.flags.system() & rflags::DF != 0 {
            1
        } else {
            (0x1000 - (self.regs[register] & 0xfff)) / size
        };
        self.repeat_count(op)
            .min(in_page)
            .min(IO_BATCH_BYTES as u64 / size)
            .max(1)
    }
}

/// What IN or OUT does.
fn single_access(op: &Op, port: u16, size: u64, input: bool) -> PortAccess {
    PortAccess {
        port,
        size,
        input,
        string: false,
        immediate: op.aux == PORT_IS_IMMEDIATE,
    }
}

/// What INS or OUTS does.
fn string_access(port: u16, size: u64, input: bool) -> PortAccess {
    PortAccess {
        port,
        size,
        input,
        string: true,
        immediate: false,
    }
}

fn input<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let port = port(core, op);
    core.check_io(port, T::BYTES)?;
    core.td_intercepts_io(op, &single_access(op, port, T::BYTES, true))?;
    core.io_string = false;
    core.io_buffer.clear();
    Err(core.leave_for_io(op, T::BYTES, false, 1, port))
}

fn output<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let port = port(core, op);
    core.check_io(port, T::BYTES)?;
    core.td_intercepts_io(op, &single_access(op, port, T::BYTES, false))?;
    let value: T = core.reg(RAX);
    core.io_string = false;
    core.io_buffer.clear();
    let bytes = value.zero_extend().to_le_bytes();
    core.io_buffer
        .extend_from_slice(&bytes[..T::BYTES as usize]);
    Err(core.leave_for_io(op, T::BYTES, true, 1, port))
}

fn input_string<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let port: u16 = core.reg(gpr::RDX as u8);
    core.check_io(port, T::BYTES)?;
    if op.repeat != 0 && core.repeat_count(op) == 0 {
        core.pending = Pending::None;
        return Ok(());
    }
    core.td_intercepts_io(op, &string_access(port, T::BYTES, true))?;
    if let Pending::InReady { count, .. } = core.pending {
        consume_input::<T>(core, op, u64::from(count))?;
        core.pending = Pending::None;
        core.port_access_done();
        if op.repeat == 0 || core.repeat_count(op) == 0 {
            return Ok(());
        }
    }
    let count = core.batch(op, gpr::RDI, T::BYTES);
    // The destination must be writable before the device is asked.
    let target = core.string_target(op, T::BYTES, true)?;
    core.touch_write(target, T::BYTES)?;
    core.io_string = true;
    core.io_buffer.clear();
    Err(core.leave_for_io(op, T::BYTES, false, count as u32, port))
}

/// Stores what the device answered: as much as the registers ask for now, which the hypervisor may
/// have changed since the exit.
fn consume_input<T: Int>(core: &mut Core, op: &Op, answered: u64) -> Result<(), Trap> {
    let wanted = core.batch(op, gpr::RDI, T::BYTES).min(answered);
    let step = core.string_step(T::BYTES);
    for _ in 0..wanted {
        let Some(data) = core.io_buffer.get(..T::BYTES as usize) else {
            break;
        };
        let mut bytes = [0; 16];
        bytes[..T::BYTES as usize].copy_from_slice(data);
        let target = core.string_target(op, T::BYTES, true)?;
        core.store(target, T::from_bytes(bytes))?;
        core.io_buffer.drain(..T::BYTES as usize);
        if let Pending::InReady { count, .. } = &mut core.pending {
            *count = count.saturating_sub(1);
        }
        core.advance(op, gpr::RDI, step);
        if op.repeat != 0 {
            core.advance(op, gpr::RCX, u64::MAX);
        }
    }
    Ok(())
}

fn output_string<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let port: u16 = core.reg(gpr::RDX as u8);
    core.check_io(port, T::BYTES)?;
    if op.repeat != 0 && core.repeat_count(op) == 0 {
        core.pending = Pending::None;
        return Ok(());
    }
    core.td_intercepts_io(op, &string_access(port, T::BYTES, false))?;
    let step = core.string_step(T::BYTES);
    if let Pending::Out { count, .. } = core.pending {
        core.pending = Pending::None;
        core.port_access_done();
        if op.repeat == 0 {
            core.advance(op, gpr::RSI, step);
            return Ok(());
        }
        let done = u64::from(count).min(core.repeat_count(op));
        core.advance(op, gpr::RSI, step.wrapping_mul(done));
        core.advance(op, gpr::RCX, done.wrapping_neg());
        if core.repeat_count(op) == 0 {
            return Ok(());
        }
    }
    let count = core.batch(op, gpr::RSI, T::BYTES);
    core.io_string = true;
    core.io_buffer.clear();
    for i in 0..count {
        let offset = core.regs[gpr::RSI].wrapping_add(step.wrapping_mul(i)) & op.address_mask();
        let element = core
            .linear(op.seg, offset, T::BYTES, false)
            .and_then(|linear| core.load::<T>(linear));
        match element {
            Ok(value) => {
                let bytes = value.to_bytes();
                core.io_buffer
                    .extend_from_slice(&bytes[..T::BYTES as usize]);
            }
            Err(trap) if i == 0 => return Err(trap),
            // What could be read goes out first; the fault comes with the next element.
            Err(_) => {
                return Err(core.leave_for_io(op, T::BYTES, true, i as u32, port));
            }
        }
    }
    Err(core.leave_for_io(op, T::BYTES, true, count as u32, port))
}
