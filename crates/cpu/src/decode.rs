//! From bytes in guest memory to a block of operations.

use crate::blocks::Block;
use crate::core_state::{Core, seg};
use crate::form::Form;
use crate::fuse::fuse;
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::trap::{Exit, Trap, UnknownInstruction};
use crate::{
    bits, control, control_registers, decimal, events, far, features, integer, io, msr, muldiv,
    protection_keys, random, segments, shifts, simd, stack, strings, syscall, system, system_flags,
    tables, td, x87, xsave,
};
use iced_x86::{
    Decoder, DecoderError, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic,
};

/// Bytes of code that one block is decoded from at most.
const BLOCK_BYTES: usize = 256;
/// Instructions in a block at most: requests and interrupts are looked at between blocks.
const BLOCK_OPS: usize = 48;
/// The longest instruction.
const INSTRUCTION_BYTES: usize = 15;

/// The handler for an instruction, if this processor executes it.
fn select(form: &Form) -> Option<Handler> {
    // AVX-512 needs state that XCR0 cannot enable; XOP has names in common with others.
    let encoding = form.instruction.encoding();
    if !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX) {
        return None;
    }
    integer::select(form)
        .or_else(|| control::select(form))
        .or_else(|| stack::select(form))
        .or_else(|| shifts::select(form))
        .or_else(|| muldiv::select(form))
        .or_else(|| bits::select(form))
        .or_else(|| decimal::select(form))
        .or_else(|| strings::select(form))
        .or_else(|| io::select(form))
        .or_else(|| segments::select(form))
        .or_else(|| far::select(form))
        .or_else(|| events::select(form))
        .or_else(|| control_registers::select(form))
        .or_else(|| msr::select(form))
        .or_else(|| tables::select(form))
        .or_else(|| syscall::select(form))
        .or_else(|| system_flags::select(form))
        .or_else(|| system::select(form))
        .or_else(|| td::select(form))
        .or_else(|| protection_keys::select(form))
        .or_else(|| random::select(form))
        .or_else(|| x87::select(form))
        .or_else(|| xsave::select(form))
        .or_else(|| simd::select(form))
}

/// Whether an instruction is an invalid opcode: it is none at all, or came with a feature that this
/// processor does not have.
fn is_undefined(form: &Form) -> bool {
    let features = form.instruction.cpuid_features();
    form.mnemonic == Mnemonic::INVALID || !features.iter().all(|&feature| features::has(feature))
}

/// What becomes of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// It is executed.
    Executed,
    /// It is an invalid opcode.
    Undefined,
    /// It should be executed and is not: running it ends in [`Exit::Unknown`].
    Missing,
}

/// What becomes of an instruction in code of 16, 32 or 64 bits at CPL 3, with SSE and AVX enabled.
pub fn support(instruction: &Instruction, bitness: u32) -> Support {
    let mode = Mode::default()
        .with(Mode::CODE64, bitness == 64)
        .with(Mode::CODE32, bitness == 32)
        .with(Mode::STACK32, bitness == 32)
        .with(
            Mode::USER
                .with(Mode::SSE, true)
                .with(Mode::AVX, true)
                .with(Mode::PROTECTED, true),
            true,
        );
    let form = Form::new(*instruction, mode);
    match select(&form) {
        Some(_) => Support::Executed,
        None if is_undefined(&form) => Support::Undefined,
        None => Support::Missing,
    }
}

/// An encoding that no processor executes.
pub(crate) fn invalid(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    Err(core.invalid_opcode())
}

/// An instruction that this processor does not execute. What it is, is filled in by whoever holds
/// the block's bytes.
pub(crate) fn unknown(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    Err(core.leave(Exit::Unknown(UnknownInstruction {
        bytes: [0; 15],
        len: 0,
        mnemonic: Mnemonic::INVALID,
    })))
}

/// Whether the block ends behind an instruction: it sets RIP, or the bytes that follow may mean
/// something else after it.
fn ends_block(instruction: &Instruction) -> bool {
    !matches!(instruction.flow_control(), FlowControl::Next)
}

/// The part of the state that decides which block an address means: mode and base of CS.
pub(crate) fn context_of(mode: Mode, cs_base: u64) -> u64 {
    // Outside 64-bit code a segment base has 32 bits, in 64-bit code it is not used.
    let base = if mode.has(Mode::CODE64) {
        0
    } else {
        cs_base & 0xffff_ffff
    };
    mode.bits() << 32 | base
}

/// The operation of an instruction, with which `bytes` begin.
fn operation(form: &Form, ip: u64, bytes: &[u8]) -> Op {
    let mut op = form.operands(ip, unknown);
    io::note_port(form, &mut op);
    x87::note_opcode(form, bytes, &mut op);
    op.run = match select(form) {
        Some(handler) => handler,
        None if is_undefined(form) => invalid,
        None => unknown,
    };
    op
}

impl Core {
    /// The linear address of an instruction at `ip`.
    pub(crate) fn code_linear(&self, ip: u64) -> u64 {
        if self.mode.has(Mode::CODE64) {
            ip
        } else {
            self.segment[usize::from(seg::CS)].base.wrapping_add(ip) & 0xffff_ffff
        }
    }

    /// How many bytes from `ip` on lie in the code segment.
    fn code_limit(&mut self, ip: u64) -> Result<usize, Trap> {
        if self.mode.has(Mode::CODE64) {
            return Ok(usize::MAX);
        }
        let limit = u64::from(self.segment[usize::from(seg::CS)].limit);
        if ip > limit {
            return Err(self.general_protection(0));
        }
        Ok((limit - ip + 1) as usize)
    }

    /// Decodes the block at RIP.
    pub(crate) fn decode_block(&mut self) -> Result<Block, Trap> {
        let ip = self.rip;
        let linear = self.code_linear(ip);
        let limit = self.code_limit(ip)?;
        let mut buffer = [0; BLOCK_BYTES];
        let code = self.fetch(linear)?;
        let length = code.available.min(BLOCK_BYTES).min(limit);
        self.read_code(code.host, &mut buffer[..length])?;
        if let Some(block) = self.decode_bytes(&buffer[..length]) {
            // Only what became code is watched, which is known when it has been read.
            if self.code_is(code.host, &block.bytes)? {
                return Ok(block);
            }
            self.watch_code(code.host, length);
            self.read_code(code.host, &mut buffer[..length])?;
            if let Some(block) = self.decode_bytes(&buffer[..length]) {
                return Ok(block);
            }
        }
        // Not even one instruction fits: it goes on in the next page, or the segment ends here.
        let whole = INSTRUCTION_BYTES.min(limit);
        if length >= whole {
            return Err(self.general_protection(0));
        }
        let next = self.code_linear(ip.wrapping_add(length as u64));
        self.fetch(next)?;
        // The second fetch may have let other threads' requests in: translate both again.
        let first = self.exec_place(linear)?;
        self.watch_code(first, length);
        self.read_code(first, &mut buffer[..length])?;
        let second = self.exec_place(next)?;
        self.watch_code(second, whole - length);
        self.read_code(second, &mut buffer[length..whole])?;
        match self.decode_bytes(&buffer[..whole]) {
            Some(mut block) => {
                // One instruction: those behind it belong to the next page's block.
                if let Some(first) = block.ops.first().copied() {
                    block.next_ip = first.next_ip();
                    block.bytes = buffer[..usize::from(first.len)].into();
                    block.ops = Box::new([first]);
                    block.instructions = 1;
                }
                Ok(block)
            }
            None => Err(self.general_protection(0)),
        }
    }

    /// Decodes as many instructions as make a block; `None` if the bytes end within the first.
    fn decode_bytes(&mut self, bytes: &[u8]) -> Option<Block> {
        let ip = self.rip;
        let most = if self.mode.has(Mode::SINGLE) {
            1
        } else {
            BLOCK_OPS
        };
        let mut decoder = Decoder::with_ip(self.mode.bitness(), bytes, ip, DecoderOptions::NONE);
        let mut ops: Vec<Op> = Vec::with_capacity(most);
        let mut previous: Option<Form> = None;
        let mut instructions = 0;
        let mut used = 0;
        let mut instruction = Instruction::default();
        while ops.len() < most && used < bytes.len() {
            decoder.decode_out(&mut instruction);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let at = ip.wrapping_add(used as u64);
            let form = Form::new(instruction, self.mode);
            let op = operation(&form, at, &bytes[used..]);
            let pair = match (&previous, ops.last()) {
                (Some(first), Some(first_op)) => fuse(first, first_op, &form, &op),
                _ => None,
            };
            match (pair, ops.last_mut()) {
                (Some(pair), Some(last)) => *last = pair,
                _ => ops.push(op),
            }
            previous = Some(form);
            instructions += 1;
            used += instruction.len();
            if ends_block(&instruction) {
                break;
            }
        }
        self.counters.decoded += 1;
        (!ops.is_empty()).then(|| Block {
            context: self.context,
            ip,
            epoch: self.epoch,
            next_ip: ip.wrapping_add(used as u64),
            ops: ops.into_boxed_slice(),
            instructions,
            links: Default::default(),
            bytes: bytes[..used].into(),
        })
    }

    /// Whether a block's bytes are still what memory holds at its address.
    pub(crate) fn block_is_current(&mut self, block: &Block) -> Result<bool, Trap> {
        let linear = self.code_linear(block.ip);
        let limit = self.code_limit(block.ip)?;
        if block.bytes.len() > limit {
            return Ok(false);
        }
        let code = self.fetch(linear)?;
        if block.bytes.len() <= code.available {
            return self.code_is(code.host, &block.bytes);
        }
        let (head, tail) = block.bytes.split_at(code.available);
        let next = self.code_linear(block.ip.wrapping_add(head.len() as u64));
        self.fetch(next)?;
        let first = self.exec_place(linear)?;
        let second = self.exec_place(next)?;
        Ok(self.code_is(first, head)? && self.code_is(second, tail)?)
    }
}

/// What an instruction is, for the report that it is not executed.
pub(crate) fn describe(mode: Mode, bytes: &[u8]) -> UnknownInstruction {
    let mut decoder = Decoder::new(mode.bitness(), bytes, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let length = match instruction.len() {
        0 => bytes.len(),
        length => length.min(bytes.len()),
    }
    .min(INSTRUCTION_BYTES);
    let mut copy = [0; INSTRUCTION_BYTES];
    copy[..length].copy_from_slice(&bytes[..length]);
    UnknownInstruction {
        bytes: copy,
        len: length as u8,
        mnemonic: instruction.mnemonic(),
    }
}
