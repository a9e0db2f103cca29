//! Guest memory as the processor sees it: from a linear address to a value.
//!
//! An access first asks the [`tlb`]; a hit is a compare and an add to a host pointer. A miss walks
//! the guest's tables ([`stage1`], every step of which is itself a second-stage access) and the
//! hypervisor's ([`stage2`]). What the second stage does not translate is either the hypervisor's
//! to fix, or memory that it emulates ([`mmio`]). Host memory is touched by [`access`] only.
//! [`code`] notices stores into pages from which code was decoded.

pub(crate) mod access;
pub(crate) mod code;
mod data;
mod fetch;
mod guest_tables;
mod mmio;
mod pml;
pub mod process;
mod span;
mod stage1;
mod stage2;
mod sub_page;
#[cfg(test)]
mod tests;
mod tlb;
mod virtualization_exception;

pub(crate) use access::Datum;
pub use pml::Pml;
pub use stage2::SecondStage;
pub use sub_page::InvalidSppt;
pub use virtualization_exception::{VeBusy, VeControl, VeInfo, reason};

use crate::core_state::Core;
use crate::line::Request;
use crate::machine::Machine;
use crate::state::{cr0, rflags};
use crate::trap::{Exception, Exit, SecondStageFault, Trap, UnknownInstruction, vector};
use guest_tables::{Directories, NestedTables, TablePages};
use mmio::Mmio;
use stage1::{Failure, GuestTables, LinearAccess, Mapping, Paging};
use stage2::{GuestAccess, HostPage, Operation, Purpose, Rights, WalkCache, Walker};
use sub_page::WriteCache;
use tlb::{Allowed, Set, Tlb};
use twofold_arch::{Gpa, Hpa, sppt};

/// log2 of the page size.
const PAGE_SHIFT: u32 = twofold_arch::PAGE_SHIFT;
/// The address bits above the offset within a page.
const PAGE_MASK: u64 = !(twofold_arch::PAGE_SIZE - 1);

/// What a linear address translates to, as [`Cpu::translate`](crate::Cpu::translate) tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The guest's tables allow writes.
    pub writable: bool,
    /// The page belongs to user mode.
    pub user: bool,
    /// The guest's tables allow instruction fetches.
    pub executable: bool,
}

/// The memory half of a vCPU.
pub(crate) struct Memory {
    tlb: Tlb,
    /// Index of the first TLB entry of the set that explicit data accesses use now.
    data_base: usize,
    paging: Paging,
    directories: Directories,
    walker: Walker,
    walk_cache: WalkCache,
    /// Pages that were written by sub-page permissions.
    sub_pages: WriteCache,
    /// Where EPT dirty flags that are set are logged.
    pub(crate) pml: Option<Pml>,
    /// Whether violations become #VE.
    pub(crate) ve: Option<VeControl>,
    /// Length of the instruction that the last #VE is about.
    ve_instruction_length: u8,
    table_pages: TablePages,
    mmio: Mmio,
    /// The last #GP was raised because this linear address was not canonical. An access through SS
    /// raises #SS instead, and only the instruction knows which segment it used.
    pub(crate) not_canonical: Option<u64>,
}

impl Memory {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self {
            tlb: Tlb::new(),
            data_base: Set::Supervisor.base(),
            paging: Paging::default(),
            directories: Directories::new(),
            walker: Walker::none(machine),
            walk_cache: WalkCache::new(),
            sub_pages: WriteCache::new(),
            pml: None,
            ve: None,
            ve_instruction_length: 0,
            table_pages: TablePages::new(),
            mmio: Mmio::default(),
            not_canonical: None,
        }
    }
}

/// Bytes from `linear` to the end of its page.
const fn rest_of_page(linear: u64) -> u64 {
    (1 << PAGE_SHIFT) - (linear & !PAGE_MASK)
}

/// Where a guest-physical address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// An address in this process.
    Host(usize),
    /// Memory that the hypervisor emulates.
    Emulated(u64),
}

/// A translated data access within one page.
#[derive(Clone, Copy, Debug)]
struct Target {
    place: Place,
    /// Code was decoded from the page: a store has to be announced.
    code: bool,
    /// Sub-page permissions allowed the write, and have been asked about its bytes only.
    sub_page: bool,
}

impl Core {
    /// Chooses the second-stage tables. Forgets every translation.
    pub(crate) fn set_second_stage(&mut self, second_stage: SecondStage) {
        let sppt = self.mem.walker.sppt();
        self.mem.walker = Walker::new(&self.machine, second_stage);
        self.mem.walker.set_sppt(sppt);
        self.flush_all();
    }

    /// Chooses the sub-page permission table. Forgets every translation. Whether there can be one,
    /// there.
    pub(crate) fn set_sppt(&mut self, root: Option<Hpa>) -> bool {
        let maxphyaddr = self.machine.config().maxphyaddr;
        let accepted = root.is_none_or(|root| sppt::is_valid_pointer(root.get(), maxphyaddr))
            && self.mem.walker.set_sppt(root);
        self.flush_all();
        accepted
    }

    /// Forgets every cached translation of either stage.
    fn flush_all(&mut self) {
        self.mem.walk_cache.flush();
        self.mem.table_pages.flush();
        self.flush_tlb();
    }

    /// Forgets every cached translation that depends on the guest's tables, and looks at the
    /// control registers anew. Called after every change of CR0, CR3, CR4 or IA32_EFER that
    /// concerns paging.
    pub(crate) fn flush_tlb(&mut self) {
        self.mem.tlb.flush();
        self.mem.sub_pages.flush();
        self.mem.directories.flush();
        self.mem.paging = Paging::new(self.cr0, self.cr3, self.cr4, self.efer, self.physical_bits)
            .with_keys(self.cr4, self.msrs.pkru);
        self.update_rights();
        self.epoch += 1;
        self.counters.tlb_flushes += 1;
    }

    /// Forgets the translation of one linear address (INVLPG).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.mem.tlb.flush_page(linear);
        self.mem.sub_pages.flush();
        // INVLPG invalidates what is cached of upper levels for all addresses.
        self.mem.directories.flush();
        self.epoch += 1;
    }

    /// Looks anew at whose rights data accesses have, and whether their alignment is checked. Called
    /// after every change of [`Core::user`], RFLAGS.AC and CR0.AM.
    #[inline]
    pub(crate) fn update_rights(&mut self) {
        let ac = self.flags.system() & rflags::AC != 0;
        let set = if self.user && ac && self.cr0 & cr0::AM != 0 {
            Set::Checked
        } else if self.user {
            Set::User
        } else if self.mem.paging.smap() && ac {
            Set::SupervisorAc
        } else {
            Set::Supervisor
        };
        self.mem.data_base = set.base();
    }

    /// Meets what other threads have asked of this vCPU, in guest mode, between two instructions.
    /// Returns whether `run()` is to return [`Exit::Kicked`]; that request stays posted.
    #[cold]
    pub(crate) fn serve_requests(&mut self) -> bool {
        loop {
            let pending = self.line.pending();
            if (pending - Request::EXIT).is_empty() {
                return pending.contains(Request::EXIT);
            }
            // Requests are met outside guest mode: nobody has to wait for that.
            self.line.leave();
            if pending.contains(Request::PAUSE) {
                self.machine.wait_for_exclusive();
            }
            // Cleared before the flush: a request that arrives later is met once more.
            if pending.contains(Request::FLUSH_TLB) {
                self.line.clear(Request::FLUSH_TLB | Request::DROP_WRITES);
                self.flush_all();
            } else if pending.contains(Request::DROP_WRITES) {
                self.line.clear(Request::DROP_WRITES);
                self.mem.tlb.drop_writes();
                self.mem.sub_pages.flush();
            }
            self.line.enter();
        }
    }

    /// Translates by the guest's tables alone, which `read` supplies 8 bytes at a time at a
    /// guest-physical address that is a multiple of 8, as a supervisor's read would, without
    /// changing anything.
    pub(crate) fn translate(
        &self,
        gva: u64,
        read: &mut dyn FnMut(Gpa) -> Option<u64>,
    ) -> Option<Translation> {
        struct Looked<'a>(&'a mut dyn FnMut(Gpa) -> Option<u64>);
        impl GuestTables for Looked<'_> {
            type Error = std::convert::Infallible;
            fn read(&mut self, gpa: u64, bytes: u64) -> Result<Option<u64>, Self::Error> {
                let word = (self.0)(Gpa::new(gpa & !7));
                Ok(word.map(|word| {
                    if bytes == 4 {
                        (word >> ((gpa & 4) * 8)) & 0xffff_ffff
                    } else {
                        word
                    }
                }))
            }
            fn set_flags(&mut self, _: u64, _: u64, _: u64, _: u64) -> Result<bool, Self::Error> {
                Ok(true)
            }
        }
        if !self.mem.paging.is_canonical(gva) {
            return None;
        }
        let access = LinearAccess {
            write: false,
            fetch: false,
            user: false,
            smap_suspended: true,
        };
        let mapping = self.mem.paging.walk(&mut Looked(read), gva, access).ok()?;
        Some(Translation {
            gpa: Gpa::new(mapping.gpa),
            writable: mapping.writable,
            user: mapping.user,
            executable: !mapping.no_execute,
        })
    }

    /// Lets the instruction at RIP treat the page of `gpa` as memory that the hypervisor emulates.
    pub(crate) fn allow_mmio(&mut self, gpa: Gpa) {
        self.mem.mmio.allow(self.rip, gpa);
    }

    /// Takes the hypervisor's answer to [`Exit::MmioRead`].
    pub(crate) fn complete_mmio_read(&mut self, data: &[u8]) {
        self.mem.mmio.answer(data);
    }

    /// Whether the hypervisor owes the answer to a read of emulated memory, or is owed writes.
    pub(crate) fn mmio_in_progress(&self) -> bool {
        self.mem.mmio.owes()
    }

    /// Starts an attempt to execute the instruction at RIP. Returns whether it touches emulated
    /// memory as far as is known: then exactly one instruction (of a repeated one, one iteration)
    /// is to be executed, followed by [`Core::mmio_retire`] if it completes.
    pub(crate) fn mmio_attempt(&mut self) -> bool {
        self.mem.mmio.attempt(self.rip);
        self.mem.mmio.in_progress()
    }

    /// The instruction, the iteration, or the delivery of an event, has completed. Its writes to
    /// emulated memory are now owed: see [`Core::mmio_deliver`].
    pub(crate) fn mmio_retire(&mut self) {
        self.mem.mmio.retire();
    }

    /// The next write to emulated memory that is owed to the hypervisor.
    pub(crate) fn mmio_deliver(&mut self) -> Option<Exit> {
        self.mem.mmio.deliver()
    }

    /// Raises #PF.
    #[cold]
    fn page_fault(&mut self, linear: u64, error_code: u32) -> Trap {
        self.raise(Exception {
            vector: vector::PF,
            error_code: Some(error_code),
            payload: Some(linear),
        })
    }

    /// Raises #GP for an address that is not canonical.
    #[cold]
    fn not_canonical(&mut self, linear: u64) -> Trap {
        self.mem.not_canonical = Some(linear);
        self.general_protection(0)
    }

    /// Leaves because host memory is gone.
    #[cold]
    fn vanished(&mut self, pointer: usize) -> Trap {
        self.leave(Exit::HostFault {
            hva: pointer as u64,
        })
    }

    /// Leaves because an access to emulated memory is not something this processor, or KVM's
    /// emulator, does.
    #[cold]
    fn unknown(&mut self) -> Trap {
        self.leave(Exit::Unknown(UnknownInstruction {
            bytes: [0; 15],
            len: 0,
            mnemonic: iced_x86::Mnemonic::INVALID,
        }))
    }

    #[cold]
    fn mmio_stop(&mut self, stop: mmio::Stop) -> Trap {
        match stop {
            mmio::Stop::Exit(exit) => self.leave(exit),
            mmio::Stop::TooMany => self.unknown(),
        }
    }

    /// Walks the guest's tables.
    fn first_stage(&mut self, linear: u64, access: LinearAccess) -> Result<Mapping, Trap> {
        if let Some(mapping) = self.known_mapping(linear, access) {
            return Ok(mapping);
        }
        let paging = self.mem.paging;
        if !paging.is_canonical(linear) {
            return Err(self.not_canonical(linear));
        }
        let mut tables = NestedTables {
            core: self,
            linear,
            access,
        };
        match paging.walk(&mut tables, linear, access) {
            Ok(mapping) => Ok(mapping),
            Err(Failure::PageFault(error_code)) => Err(self.page_fault(linear, error_code)),
            Err(Failure::Tables(trap)) => Err(trap),
        }
    }

    /// Walks the second stage for the final address of a translation. `None`: the page is emulated
    /// for the instruction in progress.
    fn final_stage(
        &mut self,
        linear: u64,
        bytes: u64,
        mapping: &Mapping,
        operation: Operation,
    ) -> Result<Option<HostPage>, Trap> {
        let access = GuestAccess {
            gpa: mapping.gpa,
            bytes,
            operation,
            linear,
            purpose: Purpose::Final {
                user: mapping.user,
                writable: mapping.writable,
                no_execute: mapping.no_execute,
            },
        };
        match self.mem.second_stage(&self.machine, &access) {
            Ok(page) => Ok(Some(page)),
            Err(refusal) if refusal.is_fault() && self.mem.mmio.allows(mapping.gpa) => Ok(None),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// Translates a data access of `bytes` within one page and caches the translation. A write
    /// that only sub-page permissions allow leaves no permission to write behind.
    fn translate_data(
        &mut self,
        linear: u64,
        bytes: u64,
        write: bool,
        set: Set,
    ) -> Result<Target, Trap> {
        self.counters.tlb_misses += 1;
        let access = LinearAccess {
            write,
            fetch: false,
            user: set == Set::User,
            smap_suspended: set == Set::SupervisorAc,
        };
        let mapping = self.first_stage(linear, access)?;
        let operation = if write {
            Operation::Write
        } else {
            Operation::Read
        };
        let Some(page) = self.final_stage(linear, bytes, &mapping, operation)? else {
            return Ok(Target {
                place: Place::Emulated(mapping.gpa),
                code: false,
                sub_page: false,
            });
        };
        let host = self.machine.host(page.hpa);
        let code = self.machine.code().contains(page.hpa);
        let writable = !self.breakpoints.watches_page(linear, true)
            && mapping.dirty
            && page.dirty
            && page.rights.contains(Rights::WRITE)
            && (write
                || self.mem.paging.permits(
                    &mapping,
                    LinearAccess {
                        write: true,
                        ..access
                    },
                ));
        let allowed = Allowed {
            read: page.rights.contains(Rights::READ)
                && !self.breakpoints.watches_page(linear, false),
            write: writable && !code,
            execute: false,
        };
        let addend = (host as u64).wrapping_sub(linear & PAGE_MASK);
        if let Some(vector) = page.vector
            && mapping.dirty
            && !code
        {
            self.mem.sub_pages.fill(set, linear, addend, vector);
        }
        self.mem.tlb.fill(
            set,
            linear,
            addend,
            allowed,
            (mapping.size > 1 << PAGE_SHIFT).then_some(mapping.size),
        );
        if writable && code {
            self.mem.tlb.fill_beside_code(set, linear, addend);
        }
        Ok(Target {
            place: Place::Host(host + (linear & !PAGE_MASK) as usize),
            code,
            sub_page: page.vector.is_some(),
        })
    }

    /// Whether explicit data accesses have to be aligned: CR0.AM, RFLAGS.AC and CPL 3.
    pub(crate) fn checks_alignment(&self) -> bool {
        self.mem.data_base == Set::Checked.base()
    }

    /// Raises #AC for an explicit access that is not aligned, if that is checked: up to 8 bytes, to
    /// a multiple of their number (SDM volume 3, "Interrupt 17", and the exception types of volume
    /// 2, which leave larger operands to their instructions).
    fn check_alignment(&mut self, linear: u64, bytes: u64, set: Set) -> Result<(), Trap> {
        if set == Set::User
            && self.checks_alignment()
            && bytes <= 8
            && !linear.is_multiple_of(bytes)
        {
            return Err(self.alignment_check());
        }
        Ok(())
    }

    /// The set that explicit data accesses use now.
    fn data_set(&self) -> Set {
        if self.mem.data_base == Set::User.base() || self.checks_alignment() {
            Set::User
        } else if self.mem.data_base == Set::SupervisorAc.base() {
            Set::SupervisorAc
        } else {
            Set::Supervisor
        }
    }
}

impl SecondStageFault {
    /// The guest-physical address that was accessed.
    pub fn gpa(&self) -> Gpa {
        match *self {
            Self::EptViolation { gpa, .. }
            | Self::EptMisconfiguration { gpa }
            | Self::SpptMiss { gpa, .. }
            | Self::SpptMisconfiguration { gpa, .. }
            | Self::NestedPageFault { gpa, .. } => gpa,
        }
    }
}
