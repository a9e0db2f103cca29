//! What the MMU needs of the process around it: pages for tables, the program's memory, and the
//! other vCPUs.
//!
//! Host-physical addresses are this process's virtual addresses, so a table page is reached at its
//! own address and a guest page is the program's own page.

use crate::huge_page;
use crate::table_pool::TablePool;
use crate::trace;
use crate::vanishing;
use crate::{memory_key, pagemap, presence};
use rustix::io::Errno;
use rustix::mm::Advice;
use std::ptr::NonNull;
use std::sync::Arc;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_cpu::Machine;
use twofold_mmu::{Host, HostPage, PopulateError, Tracer};

/// The process as the MMU of one VM sees it.
#[derive(Debug)]
pub(crate) struct ProcessMemory {
    machine: Arc<Machine>,
    pool: TablePool,
}

impl ProcessMemory {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            pool: TablePool::default(),
        }
    }
}

// UNSAFETY: the trait's duties.
#[expect(unsafe_code)]
// SAFETY: the pool's pages stay mapped at their addresses until the pool is dropped, which is after
// the MMU, and are given to nobody else. `flush_tlbs` and `heavy_barrier` are the processor's own,
// with membarrier as the barrier on every thread of the process.
unsafe impl Host for ProcessMemory {
    fn alloc_table(&self) -> Option<Hpa> {
        self.pool
            .take()
            .map(|page| Hpa::new(page.as_ptr().expose_provenance() as u64))
    }

    fn free_table(&self, page: Hpa) {
        self.pool.give_back(self.table_ptr(page));
    }

    #[inline]
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        let pointer = std::ptr::with_exposed_provenance_mut(page.get() as usize);
        NonNull::new(pointer).unwrap_or(NonNull::dangling())
    }

    fn populate(&self, hva: u64, write: bool) -> Result<HostPage, PopulateError> {
        make_present(hva, write)?;
        let writable = write || pagemap::may_write_in_place(hva);
        Ok(HostPage {
            hpa: Hpa::new(hva),
            writable,
            level: Level::L4K,
        })
    }

    fn populate_private(&self, address: u64, _write: bool) -> Result<HostPage, PopulateError> {
        let _open = memory_key::Open::new();
        // A read of a page that was never used maps it at once, zeroed, rather than the zero page.
        make_present(address, true)?;
        Ok(HostPage {
            hpa: Hpa::new(address),
            writable: true,
            level: Level::L4K,
        })
    }

    fn populate_range(
        &self,
        address: u64,
        private: bool,
        pages: &mut [HostPage],
    ) -> (usize, Option<PopulateError>) {
        let _open = private.then(memory_key::Open::new);
        if let Some(result) = presence::populate_range(address, private, pages) {
            return result;
        }
        for (number, page) in pages.iter_mut().enumerate() {
            let address = address + number as u64 * PAGE_SIZE;
            let result = match private {
                true => self.populate_private(address, false),
                false => self.populate(address, false),
            };
            match result {
                Ok(found) => *page = found,
                Err(error) => return (number, Some(error)),
            }
        }
        (pages.len(), None)
    }

    fn mapping_level(&self, hva: u64) -> Level {
        huge_page::level(hva)
    }

    fn flush_tlbs(&self) {
        self.machine.flush_tlbs();
    }

    fn heavy_barrier(&self) {
        twofold_cpu::heavy_barrier();
    }

    fn wait_hint(&self) {
        rustix::thread::sched_yield();
    }

    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        trace::changes()
    }
}

/// Makes one page of the program present, for reading or for writing. Waits for a userfaultfd
/// handler where one is registered.
fn make_present(hva: u64, write: bool) -> Result<(), PopulateError> {
    if vanishing::is_survived() {
        // UNSAFETY: accesses the program's memory.
        #[expect(unsafe_code)]
        // SAFETY: the handler is installed, and slots are described for guests to access.
        let touched = unsafe { twofold_cpu::process::touch(hva as usize, write) };
        if touched.is_ok() {
            return Ok(());
        }
    }
    populate(
        hva,
        if write {
            Advice::LinuxPopulateWrite
        } else {
            Advice::LinuxPopulateRead
        },
    )
}

/// Asks the kernel to make a page present, and learns why if it cannot.
#[cold]
fn populate(hva: u64, advice: Advice) -> Result<(), PopulateError> {
    let address = std::ptr::with_exposed_provenance_mut(hva as usize);
    // UNSAFETY: madvise is unsafe for the sake of other kinds of advice.
    #[expect(unsafe_code)]
    // SAFETY: populating changes no byte that a program can observe.
    let result = unsafe { rustix::mm::madvise(address, PAGE_SIZE as usize, advice) };
    match result {
        Ok(()) => Ok(()),
        Err(Errno::INTR) => Err(PopulateError::Interrupted),
        Err(Errno::AGAIN) => Err(PopulateError::Again),
        Err(Errno::HWPOISON) => Err(PopulateError::Poisoned),
        // ENOMEM: nothing is mapped. EINVAL: mapped without the permission, or not memory.
        // EFAULT: a plain access would raise SIGBUS.
        Err(error) => {
            tracing::debug!(hva = format_args!("{hva:#x}"), ?advice, %error, "no host memory");
            Err(PopulateError::Fault)
        }
    }
}
