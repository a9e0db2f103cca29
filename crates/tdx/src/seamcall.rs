//! The module behind its calling convention: a function number and registers.

use crate::legality::Function;
use crate::module::{Failure, Module};
use crate::platform::Platform;
use crate::status::{Operand, Status};
use twofold_arch::Hpa;

/// The registers of a SEAMCALL, in and out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "registers")]
pub struct Registers {
    pub rcx: u64,
    pub rdx: u64,
    pub r8: u64,
    pub r9: u64,
}

impl<P: Platform> Module<P> {
    /// SEAMCALL: `rax` has the function's number in bits 15:0 and its version in bits 23:16. Returns
    /// the new RAX; on an error about a Secure EPT entry RCX and RDX show it.
    ///
    /// TDH.VP.ENTER is not reached this way, since the virtual processor's run is the caller's: see
    /// [`vp_enter`](Self::vp_enter).
    pub fn seamcall(&self, rax: u64, registers: &mut Registers) -> Status {
        let invalid = Status::OPERAND_INVALID.with(Operand::Rax);
        let Some(function) = Function::from_number(rax as u16) else {
            return invalid;
        };
        if rax >> 16 != 0 {
            return invalid;
        }
        let input = *registers;
        // Nothing of what was handed in comes back by accident.
        (registers.rcx, registers.rdx) = (0, 0);
        match self.dispatch(function, &input, registers) {
            Ok(()) => Status::SUCCESS,
            Err(failure) => {
                if let Some((entry, level)) = failure.entry {
                    registers.rcx = entry.architectural(level);
                    registers.rdx = entry.information(level);
                }
                failure.status
            }
        }
    }

    fn dispatch(
        &self,
        function: Function,
        input: &Registers,
        output: &mut Registers,
    ) -> Result<(), Failure> {
        let (rcx, rdx) = (input.rcx, Hpa::new(input.rdx));
        let (page, r8, r9) = (Hpa::new(rcx), Hpa::new(input.r8), Hpa::new(input.r9));
        match function {
            Function::VpEnter => {
                return Err(Status::OPERAND_INVALID.with(Operand::Rax).into());
            }
            Function::MngCreate => {
                let hkid = u16::try_from(input.rdx)
                    .map_err(|_| Status::OPERAND_INVALID.with(Operand::Rdx))?;
                self.mng_create(page, hkid)?;
            }
            Function::MngKeyConfig => self.mng_key_config(page)?,
            Function::MngAddCx => self.mng_add_cx(page, rdx)?,
            Function::MngInit => self.mng_init(page, rdx)?,
            Function::VpCreate => self.vp_create(page, rdx)?,
            Function::VpAddCx => self.vp_add_cx(page, rdx)?,
            Function::VpInit => self.vp_init(page, input.rdx)?,
            Function::VpFlush => self.vp_flush(page)?,
            Function::MngVpFlushDone => self.mng_vp_flush_done(page)?,
            Function::MngKeyFreeId => self.mng_key_free_id(page)?,
            Function::PageAdd => self.page_add(rcx, rdx, r8, r9)?,
            Function::MrExtend => self.mr_extend(rcx, rdx)?,
            Function::MrFinalize => self.mr_finalize(page)?,
            Function::SeptAdd => self.sept_add(rcx, rdx, r8)?,
            Function::PageAug => self.page_aug(rcx, rdx, r8)?,
            Function::PageRelocate => output.rcx = self.page_relocate(rcx, rdx, r8)?.get(),
            Function::PageDemote => self.page_demote(rcx, rdx, r8)?,
            Function::PagePromote => output.rcx = self.page_promote(rcx, rdx)?.get(),
            Function::SeptRead => {
                let (entry, level) = self.sept_read(rcx, rdx)?;
                output.rcx = entry.architectural(level);
                output.rdx = entry.information(level);
            }
            Function::RangeBlock => self.range_block(rcx, rdx)?,
            Function::RangeUnblock => self.range_unblock(rcx, rdx)?,
            Function::Track => self.track(page)?,
            Function::PageRemove => output.rcx = self.page_remove(rcx, rdx)?.get(),
            Function::SeptRemove => output.rcx = self.sept_remove(rcx, rdx)?.get(),
            Function::PageReclaim => {
                let reclaimed = self.page_reclaim(page)?;
                output.rcx = reclaimed.kind as u64;
                output.rdx = reclaimed.owner.get();
                output.r8 = u64::from(reclaimed.level);
            }
            // The model's memory has no key and no cache of its own.
            Function::CacheWriteBack | Function::PageWriteBack => {}
        }
        Ok(())
    }
}
