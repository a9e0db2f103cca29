//! Virtualization exceptions (SDM Vol. 3, "Virtualization Exceptions"): an EPT violation that the
//! guest is told of instead of the hypervisor.
//!
//! A violation is convertible if the entry that decided it has bit 63 clear: the leaf, or the entry
//! that is not present, at whatever level. It becomes #VE if the control is on, CR0.PE is set, no
//! event is being delivered, and the information page's busy word is 0, which the processor sets
//! and the page's owner clears. A misconfiguration always leaves the guest.

use super::access::{Datum, Vanished};
use super::stage1::{LinearAccess, code};
use super::stage2::Refusal;
use crate::core_state::Core;
use crate::trap::{Exception, Exit, SecondStageFault, Trap, vector};
use twofold_arch::qualification::Qualification;
use twofold_arch::{Gpa, Hpa};

/// Basic exit reasons (SDM Vol. 3, appendix "VMX Basic Exit Reasons"), as [`VeInfo`] and
/// [`Exit::Intercepted`] name them.
pub mod reason {
    /// CPUID.
    pub const CPUID: u32 = 10;
    /// HLT.
    pub const HLT: u32 = 12;
    /// INVD.
    pub const INVD: u32 = 13;
    /// VMCALL.
    pub const VMCALL: u32 = 18;
    /// IN, OUT, INS, OUTS.
    pub const IO: u32 = 30;
    /// RDMSR.
    pub const RDMSR: u32 = 31;
    /// WRMSR.
    pub const WRMSR: u32 = 32;
    /// MWAIT.
    pub const MWAIT: u32 = 36;
    /// MONITOR.
    pub const MONITOR: u32 = 39;
    /// EPT violation.
    pub const EPT_VIOLATION: u32 = 48;
    /// WBINVD and WBNOINVD.
    pub const WBINVD: u32 = 54;
}

/// The control "EPT-violation #VE" and what belongs to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VeControl {
    /// The information page, 4 KiB aligned ("virtualization-exception information address").
    pub page: Hpa,
    /// #VE leaves with [`Exit::VirtualizationException`] instead of being delivered (bit 20 of the
    /// exception bitmap).
    pub intercept: bool,
}

/// What a #VE is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VeInfo {
    /// The [basic exit reason](reason).
    pub reason: u32,
    /// The exit qualification.
    pub qualification: u64,
    /// The guest-linear address, for an EPT violation.
    pub gla: u64,
    /// The guest-physical address, for an EPT violation.
    pub gpa: Gpa,
    /// Bytes of the instruction, if the #VE is about one; 0 for an EPT violation. The information
    /// page has no place for it: the processor keeps it.
    pub instruction_length: u8,
}

impl VeInfo {
    /// About an access that an EPT violation with this qualification refused.
    pub const fn of_violation(gpa: Gpa, qualification: u64, gla: u64) -> Self {
        Self {
            reason: reason::EPT_VIOLATION,
            qualification,
            gla,
            gpa,
            instruction_length: 0,
        }
    }

    /// About an instruction of `length` bytes that is not executed.
    pub const fn of_instruction(reason: u32, qualification: u64, length: u8) -> Self {
        Self {
            reason,
            qualification,
            gla: 0,
            gpa: Gpa::new(0),
            instruction_length: length,
        }
    }
}

/// The information page still holds what nobody has taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VeBusy;

/// Offsets in the information page.
mod field {
    pub(super) const REASON: u64 = 0;
    pub(super) const BUSY: u64 = 4;
    pub(super) const QUALIFICATION: u64 = 8;
    pub(super) const GLA: u64 = 16;
    pub(super) const GPA: u64 = 24;
    pub(super) const EPTP_INDEX: u64 = 32;
}

/// What the processor writes to the busy word.
const BUSY: u32 = u32::MAX;

/// Why a #VE is not raised.
enum Unraised {
    /// The information page is in use.
    Busy,
    /// Or it is not there.
    Vanished(usize),
}

impl Core {
    /// What becomes of an access that the second stage refused: #VE, #PF or an exit.
    #[cold]
    pub(super) fn refused(&mut self, refusal: Refusal) -> Trap {
        let Exit::SecondStage(SecondStageFault::EptViolation {
            gpa,
            qualification,
            gla,
        }) = refusal.exit
        else {
            return self.leave(refusal.exit);
        };
        if self.mem.walker.is_beyond_shared_bit(gpa) {
            let error = self.reserved_address_code(Qualification::from_bits_retain(qualification));
            return self.page_fault(gla, error);
        }
        let Some(control) = self.mem.ve else {
            return self.leave(refusal.exit);
        };
        if !refusal.convertible || self.real_mode() || self.delivering {
            return self.leave(refusal.exit);
        }
        let info = VeInfo::of_violation(gpa, qualification, gla);
        match self.write_ve(control.page, &info) {
            Err(Unraised::Busy) => self.leave(refusal.exit),
            Err(Unraised::Vanished(place)) => self.vanished(place),
            Ok(()) if control.intercept => self.leave(Exit::VirtualizationException(info)),
            Ok(()) => self.raise(EXCEPTION),
        }
    }

    /// #PF with a reserved bit, for code or page tables of a TD where they may not be.
    #[cold]
    pub(super) fn reserved_address(&mut self, linear: u64, access: LinearAccess) -> Trap {
        let error = self.mem.paging.access_code(access) | code::PRESENT | code::RESERVED;
        self.page_fault(linear, error)
    }

    /// The error code for a guest-physical address of a TD with bits set that it does not have:
    /// such bits are reserved in the guest's tables, though the processor, whose addresses are
    /// wider, finds that out only in the second stage.
    fn reserved_address_code(&self, qualification: Qualification) -> u32 {
        let mut error = code::PRESENT | code::RESERVED;
        let mut set = |bit, on| {
            if on {
                error |= bit;
            }
        };
        set(code::WRITE, qualification.contains(Qualification::WRITE));
        set(code::FETCH, qualification.contains(Qualification::FETCH));
        set(code::USER, self.cpl == 3);
        error
    }

    /// Queues the #VE that `info` describes.
    pub(crate) fn inject_ve(&mut self, info: &VeInfo) -> Result<(), VeBusy> {
        let page = self.mem.ve.ok_or(VeBusy)?.page;
        self.write_ve(page, info).map_err(|_| VeBusy)?;
        self.events.exception = Some(EXCEPTION);
        Ok(())
    }

    /// Fills the information page if it is free.
    fn write_ve(&mut self, page: Hpa, info: &VeInfo) -> Result<(), Unraised> {
        let busy: u32 = self.read_ve_field(page, field::BUSY)?;
        if busy != 0 {
            return Err(Unraised::Busy);
        }
        self.write_ve_field(page, field::REASON, info.reason)?;
        self.write_ve_field(page, field::QUALIFICATION, info.qualification)?;
        self.write_ve_field(page, field::GLA, info.gla)?;
        self.write_ve_field(page, field::GPA, info.gpa.get())?;
        // There is one EPT pointer.
        self.write_ve_field(page, field::EPTP_INDEX, 0u16)?;
        self.mem.ve_instruction_length = info.instruction_length;
        self.write_ve_field(page, field::BUSY, BUSY)
    }

    /// Takes what the information page holds, which is free then.
    pub(crate) fn take_ve(&mut self) -> Option<VeInfo> {
        let page = self.mem.ve?.page;
        self.read_ve(page).ok().flatten()
    }

    fn read_ve(&mut self, page: Hpa) -> Result<Option<VeInfo>, Unraised> {
        let busy: u32 = self.read_ve_field(page, field::BUSY)?;
        if busy == 0 {
            return Ok(None);
        }
        let info = VeInfo {
            reason: self.read_ve_field(page, field::REASON)?,
            qualification: self.read_ve_field(page, field::QUALIFICATION)?,
            gla: self.read_ve_field(page, field::GLA)?,
            gpa: Gpa::new(self.read_ve_field(page, field::GPA)?),
            instruction_length: self.mem.ve_instruction_length,
        };
        self.write_ve_field(page, field::BUSY, 0u32)?;
        Ok(Some(info))
    }

    fn read_ve_field<T: Datum>(&self, page: Hpa, offset: u64) -> Result<T, Unraised> {
        let place = self.machine.host(page) + offset as usize;
        let pointer = std::ptr::with_exposed_provenance::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: the information page is raw memory.
        // SAFETY: whoever chose the page gave it to the processor; the offset is within it.
        unsafe { T::load(pointer) }.map_err(|Vanished| Unraised::Vanished(place))
    }

    fn write_ve_field<T: Datum>(&self, page: Hpa, offset: u64, value: T) -> Result<(), Unraised> {
        let place = self.machine.host(page) + offset as usize;
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: the information page is raw memory.
        // SAFETY: as for `read_ve_field`.
        unsafe { T::store(pointer, value) }.map_err(|Vanished| Unraised::Vanished(place))
    }
}

/// #VE has no error code, and leaves CR2 alone.
const EXCEPTION: Exception = Exception {
    vector: vector::VE,
    error_code: None,
    payload: None,
};
