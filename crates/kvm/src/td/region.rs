//! `KVM_TDX_INIT_MEM_REGION`: adds to a TD's initial memory, and measures it (SPEC 3.4).

use super::abi::{MEASURE_MEMORY_REGION, MemoryRegion, TdxCommand};
use super::life::{Stage, Td, insist};
use crate::usercopy;
use crate::vcpu::{Vcpu, VcpuState};
use rustix::io::Errno;
use twofold_arch::{Gpa, PAGE_SHIFT, PAGE_SIZE};
use twofold_mmu::{FaultError, Outcome, RegionFlags};
use twofold_tdx::measurement::EXTENSION;

/// A page of the program, copied once, before the MMU holds anything: reading the program's memory
/// may have to wait.
#[repr(C, align(4096))]
struct Source([u8; PAGE_SIZE as usize]);

impl Source {
    fn read(&mut self, address: u64) -> Result<(), Errno> {
        let address = usize::try_from(address).map_err(|_| Errno::FAULT)?;
        // UNSAFETY: copies the program's memory.
        #[expect(unsafe_code)]
        // SAFETY: the array has room for a page, and is borrowed here alone.
        unsafe {
            usercopy::copy_in(address, self.0.as_mut_ptr(), self.0.len())
        }
    }

    fn address(&self) -> u64 {
        (&raw const *self).expose_provenance() as u64
    }
}

impl Vcpu {
    /// Adds the pages of a region one by one, and moves the region to what is left of it.
    pub(super) fn td_init_mem_region(
        &self,
        td: &Td,
        state: &mut VcpuState,
        request: &TdxCommand,
    ) -> Result<(), Errno> {
        if state.td().is_none() {
            return Err(Errno::INVAL);
        }
        let _building = td.building.lock();
        if td.stage() == Stage::Runnable || request.flags & !MEASURE_MEMORY_REGION != 0 {
            return Err(Errno::INVAL);
        }
        let address = usize::try_from(request.data).map_err(|_| Errno::FAULT)?;
        let mut region: MemoryRegion = usercopy::read(address)?;
        check(td, &region)?;
        self.load_root(state)?;
        let measured = request.flags & MEASURE_MEMORY_REGION != 0;
        let result = self.interruptible(state, |state, interrupted| {
            let mut source = Box::new(Source([0; PAGE_SIZE as usize]));
            while region.nr_pages != 0 {
                let page = Page {
                    gpa: region.gpa,
                    source: region.source_addr,
                    measured,
                };
                self.td_add_page(td, state, &page, &mut source, interrupted)?;
                region.source_addr = region.source_addr.wrapping_add(PAGE_SIZE);
                region.gpa += PAGE_SIZE;
                region.nr_pages -= 1;
            }
            Ok(())
        });
        usercopy::write(address, &region)?;
        result
    }

    fn td_add_page(
        &self,
        td: &Td,
        state: &mut VcpuState,
        page: &Page,
        source: &mut Source,
        interrupted: impl Fn() -> bool,
    ) -> Result<(), Errno> {
        let tables = self.vm().tables();
        let gpa = Gpa::new(page.gpa);
        let slot = tables.lookup(state.reader(), gpa).ok_or(Errno::INVAL)?;
        if !slot.flags.contains(RegionFlags::GUEST_MEMFD) || !tables.is_private(gpa.frame()) {
            return Err(Errno::INVAL);
        }
        if page.source == 0 {
            return Err(Errno::OPNOTSUPP);
        }
        source.read(page.source)?;
        loop {
            if interrupted() {
                return Err(Errno::INTR);
            }
            let Some((reader, roots)) = state.td_parts() else {
                self.load_root(state)?;
                continue;
            };
            match tables.td_add(reader, roots, gpa.frame(), source.address()) {
                Ok(Outcome::Fixed { .. }) => break,
                // The module was busy, or somebody changes slots or attributes.
                Ok(Outcome::Retry) => rustix::thread::sched_yield(),
                Ok(Outcome::ObsoleteRoot) => state.forget_td_roots(),
                // There is a page already.
                Ok(_) | Err(FaultError::Bugged) => return Err(Errno::IO),
                Err(FaultError::WrongKind { .. }) => return Err(Errno::INVAL),
                Err(FaultError::Interrupted) => return Err(Errno::INTR),
                Err(FaultError::OutOfMemory) => return Err(Errno::NOMEM),
                Err(FaultError::Poisoned | FaultError::PoisonedPrivate) => {
                    return Err(Errno::HWPOISON);
                }
                Err(FaultError::BadHostMemory | FaultError::BadPrivateMemory) => {
                    return Err(Errno::FAULT);
                }
            }
        }
        if page.measured {
            let (module, tdr) = (td.module(), td.tdr()?);
            for at in (0..PAGE_SIZE).step_by(EXTENSION) {
                insist(|| module.mr_extend(page.gpa + at, tdr)).map_err(|failure| {
                    td.bug("a page cannot be measured", Some(failure.status));
                    Errno::IO
                })?;
            }
        }
        Ok(())
    }
}

/// What is done in one step.
struct Page {
    gpa: u64,
    source: u64,
    measured: bool,
}

/// What can be said of a region without looking at memory.
fn check(td: &Td, region: &MemoryRegion) -> Result<(), Errno> {
    let shared = td.shared_bit().ok_or(Errno::INVAL)?;
    let size = region
        .nr_pages
        .checked_mul(PAGE_SIZE)
        .filter(|&size| size != 0)
        .ok_or(Errno::INVAL)?;
    let last = region.gpa.checked_add(size - 1).ok_or(Errno::INVAL)?;
    let aligned = [region.source_addr, region.gpa]
        .iter()
        .all(|address| address.is_multiple_of(1 << PAGE_SHIFT));
    if aligned && (region.gpa | last) & shared == 0 {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}
