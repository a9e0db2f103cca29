//! The loop that runs blocks, and what happens between them.

use crate::blocks::{Block, BlockCache};
use crate::breakpoints::{debug_exception, dr6};
use crate::core_state::{Core, Pending, slot};
use crate::decode;
use crate::mode::Mode;
use crate::op::Op;
use crate::state::rflags;
use crate::trap::{Exit, Trap, vector};

/// Why the loop over blocks came to a halt.
enum Pause<'a> {
    /// Something may have to be settled between two instructions.
    Boundary,
    /// The block at RIP is not known, or not known to be what memory holds.
    Miss,
    /// An operation of a block has trapped.
    Trapped {
        trap: Trap,
        block: &'a Block,
        op: &'a Op,
    },
}

/// More than the bytes of any memory operand for which a page is translated at a time.
const OPERAND_BYTES: u64 = 1024;

/// Runs until the hypervisor has to act. The processor is in guest mode.
pub(crate) fn run(core: &mut Core, blocks: &mut BlockCache) -> Exit {
    if let Some(exit) = core.mmio_deliver() {
        return exit;
    }
    core.prepare();
    if let Some(exit) = core.boundary() {
        return exit;
    }
    loop {
        let exit = match run_blocks(core, blocks) {
            Pause::Boundary => core.boundary(),
            Pause::Miss => match refresh(core, blocks) {
                Ok(()) => None,
                Err(trap) => core.handle(trap, None, &[]),
            },
            Pause::Trapped { trap, block, op } => {
                core.rip = op.ip;
                let start = op.ip.wrapping_sub(block.ip) as usize;
                core.handle(trap, Some(op), block.bytes.get(start..).unwrap_or_default())
            }
        };
        if let Some(exit) = exit {
            return exit;
        }
    }
}

/// Runs blocks, at least one, as long as there is nothing else to do.
#[inline(never)]
fn run_blocks<'a>(core: &mut Core, blocks: &'a BlockCache) -> Pause<'a> {
    let Some(mut block) = blocks.find(core.context, core.rip, core.epoch) else {
        return Pause::Miss;
    };
    loop {
        core.rip = block.next_ip;
        core.stop = false;
        let mut completed = u64::from(block.instructions);
        for (index, op) in block.ops.iter().enumerate() {
            if let Err(trap) = (op.run)(core, op) {
                core.counters.instructions += index as u64;
                return Pause::Trapped { trap, block, op };
            }
            if core.stop {
                // The next instruction is the one behind this, unless this was the last.
                if let Some(next) = block.ops.get(index + 1) {
                    core.rip = next.ip;
                    completed = index as u64 + 1;
                }
                break;
            }
        }
        core.counters.blocks += 1;
        core.counters.instructions += completed;
        if core.line.asked() | core.attention | core.code_changed() {
            return Pause::Boundary;
        }
        // Whatever changes the context or the epoch also stops the block.
        let ip = core.rip;
        if !core.stop && ip == block.ip {
            continue;
        }
        if !core.stop
            && let Some(next) = blocks.follow(block, ip, core.epoch)
        {
            block = next;
            continue;
        }
        let Some(next) = blocks.find(core.context, ip, core.epoch) else {
            return Pause::Miss;
        };
        if !core.stop {
            blocks.link(block, core.context, ip, core.epoch);
        }
        block = next;
    }
}

/// Makes the block at RIP known and valid in this epoch.
#[cold]
#[inline(never)]
fn refresh(core: &mut Core, blocks: &mut BlockCache) -> Result<(), Trap> {
    let epoch = core.epoch;
    if let Some(block) = blocks.find_stale(core.context, core.rip) {
        if core.block_is_current(block)? {
            block.epoch = epoch;
            return Ok(());
        }
        core.counters.changed += 1;
    }
    let mut block = core.decode_block()?;
    // Decoding may have let requests in that began a new epoch; then the block is compared once
    // more.
    block.epoch = epoch;
    blocks.insert(block);
    Ok(())
}

impl Core {
    /// Whether a page with code was written since that was last looked at.
    #[inline(always)]
    fn code_changed(&self) -> bool {
        self.machine.code().generation() != self.code_generation
    }

    /// What has to be settled when `run` is entered.
    fn prepare(&mut self) {
        // Code that the program wrote runs as new code.
        self.epoch += 1;
        self.exit_length = None;
        if self.pending_rip != self.rip {
            self.pending = Pending::None;
        }
        self.attention = true;
        self.shadow_running = false;
        if self.complete_io() {
            // As if the instruction had just run alone.
            self.shadow_running = true;
            self.step_trap = self.flags.system() & rflags::TF != 0;
            self.alone = true;
        } else {
            self.completing = self.mmio_attempt() || self.pending != Pending::None;
        }
    }

    /// Runs the next instruction alone.
    fn set_single(&mut self, on: bool) {
        if self.single_once != on {
            self.single_once = on;
            self.update_mode();
        }
    }

    /// Between two blocks, when something may have to be done there.
    #[cold]
    #[inline(never)]
    fn boundary(&mut self) -> Option<Exit> {
        self.code_generation = {
            let generation = self.machine.code().generation();
            if generation != self.code_generation {
                self.epoch += 1;
            }
            generation
        };
        // An instruction that was run alone has completed.
        if self.alone {
            self.alone = false;
            if let Some(exit) = self.after_single() {
                return Some(exit);
            }
        }
        if let Some(exit) = self.debug_trap() {
            return Some(exit);
        }
        let kicked = self.line.asked() && self.serve_requests();
        if self.completing {
            // An instruction that waits for an answer comes first, even if the line was kicked.
            self.resume_running = self.flags.system() & rflags::RF != 0;
            self.alone = true;
            self.set_single(true);
            return None;
        }
        if kicked {
            return Some(Exit::Kicked);
        }
        let resume = loop {
            if let Some(exit) = self.deliver_pending_event() {
                return Some(exit);
            }
            if self.window_requested && self.cr8 < self.window_limit && self.interrupt_window_open()
            {
                return Some(Exit::InterruptWindow);
            }
            let resume = self.flags.system() & rflags::RF != 0;
            if !self.breakpoints.on_code || resume || self.iterating {
                break resume;
            }
            match self.matches_instruction() {
                0 => break resume,
                bits if self.debugged_from_outside() => {
                    return Some(self.debug_exit(self.rip, bits));
                }
                bits => self.events.exception = Some(debug_exception(bits)),
            }
        };
        self.iterating = false;
        let shadow = self.events.sti_shadow || self.events.mov_ss_shadow;
        self.shadow_running = shadow;
        self.resume_running = resume;
        let stepping = self.debug_control.single_step || self.flags.system() & rflags::TF != 0;
        self.step_trap = self.flags.system() & rflags::TF != 0;
        self.alone = shadow || stepping || resume;
        self.set_single(shadow || resume);
        self.attention = self.alone
            || self.window_requested && self.cr8 < self.window_limit
            || self.breakpoints.on_code
            || self.breakpoints.pending != 0
            || self.has_pending_event();
        None
    }

    /// After an instruction that was run alone.
    fn after_single(&mut self) -> Option<Exit> {
        self.completing = false;
        self.mmio_retire();
        if self.resume_running && !self.iterating {
            self.flags.set_system(self.flags.system() & !rflags::RF);
        }
        self.resume_running = false;
        if self.debug_control.single_step || self.step_trap {
            self.breakpoints.pending |= dr6::BS;
        }
        self.step_trap = false;
        if self.shadow_running {
            self.events.sti_shadow = false;
            self.events.mov_ss_shadow = false;
            self.shadow_running = false;
        }
        self.set_single(false);
        self.mmio_deliver()
    }

    /// Deals with a trap. RIP is at the instruction that trapped; `bytes` begin with it.
    #[cold]
    #[inline(never)]
    fn handle(&mut self, trap: Trap, op: Option<&Op>, bytes: &[u8]) -> Option<Exit> {
        match trap {
            Trap::Again => {
                // One iteration of a repeated string instruction counts as run alone.
                self.iterating = true;
                self.boundary()
            }
            Trap::Exit => {
                self.breakpoints.pending = 0;
                self.exit_length = self.exit_length.or(op.map(|op| op.len));
                if self.alone {
                    self.alone = false;
                    self.set_single(false);
                }
                let exit = match self.exit {
                    exit @ (Exit::Halt | Exit::TaskPriority) => {
                        // The state after the instruction.
                        if let Some(op) = op {
                            self.rip = op.next_ip();
                            self.counters.instructions += 1;
                        }
                        self.events.sti_shadow = false;
                        self.events.mov_ss_shadow = false;
                        exit
                    }
                    Exit::Unknown(unknown) if unknown.len == 0 => {
                        Exit::Unknown(decode::describe(self.mode, bytes))
                    }
                    exit => exit,
                };
                Some(exit)
            }
            Trap::Exception => {
                self.breakpoints.pending = 0;
                let mut exception = self.fault;
                if let Some(address) = self.mem.not_canonical.take()
                    && op.is_some_and(|op| self.faulted_on_stack(op, address))
                {
                    exception.vector = vector::SS;
                }
                if self.alone {
                    self.alone = false;
                    self.completing = false;
                    self.set_single(false);
                }
                self.deliver_fault(exception).or_else(|| self.boundary())
            }
        }
    }

    /// Whether an address that was not canonical is one that SS holds: that of a stack
    /// instruction, or of an operand with RSP or RBP as its base.
    fn faulted_on_stack(&self, op: &Op, address: u64) -> bool {
        if op.seg == crate::core_state::seg::SS {
            return true;
        }
        // A stack instruction with a memory operand elsewhere, or an instruction with only that.
        let explicit = op.disp != 0 || op.base != slot::ZERO || op.index != slot::ZERO;
        let operand = self.seg_base[usize::from(op.seg & 7)]
            .wrapping_add(crate::op::offset(self, op) & op.address_mask());
        explicit && address.wrapping_sub(operand) >= OPERAND_BYTES
    }

    /// Whether blocks of single instructions are asked for by anything but the guest's state.
    pub(crate) fn wants_single(&self) -> bool {
        self.single_once
            || self.debug_control.single_step
            || self.breakpoints.on_code
            || self.flags.system() & rflags::TF != 0
    }

    /// Recomputes [`Core::context`] after the mode or CS changed.
    pub(crate) fn update_context(&mut self) {
        let cs_base = self.segment[usize::from(crate::core_state::seg::CS)].base;
        self.context = decode::context_of(self.mode, cs_base);
    }

    /// Whether one instruction, or one iteration, is to be run at a time.
    pub(crate) fn single(&self) -> bool {
        self.mode.has(Mode::SINGLE)
    }
}
