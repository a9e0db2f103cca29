//! The platform for `twofold-pkvm`: EL2's own pages, and TLBs.

// UNSAFETY: this is the machine: page tables, TLB and cache maintenance.
#![expect(unsafe_code)]

use super::registers::{read, write};
use core::arch::asm;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gpa, Hfn, Hpa, PAGE_SIZE};
use twofold_pkvm::platform::{Platform, Vmid};
use twofold_table::PageAccess;

/// Memory of the machine, started with `-m 512`.
pub(crate) const RAM_START: u64 = 0x4000_0000;
/// Its pages.
pub(crate) const RAM_PAGES: u64 = 512 << 20 >> 12;

unsafe extern "C" {
    static el2_level3: [AtomicU64; RAM_PAGES as usize];
}

/// A normal, inner-shareable, readable and writable page that is not executed.
const PAGE: u64 = 1 << 54 | 1 << 10 | 3 << 8 | 3;

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine;

// SAFETY: EL2 translates every address to itself, and the page is mapped as `Platform` promises.
unsafe impl PageAccess for Machine {
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        match NonNull::new(page.get() as *mut u64) {
            Some(pointer) => pointer,
            None => panic!("page 0 is no memory"),
        }
    }
}

fn entry(page: Hfn) -> &'static AtomicU64 {
    let index = (page.address().get() - RAM_START) / PAGE_SIZE;
    // SAFETY: the tables of all memory, made by the boot code; entries are only accessed atomically.
    unsafe { &el2_level3[index as usize] }
}

/// Runs with another VMID's stage 2 for the duration of a TLB operation.
fn with_vmid(vmid: Vmid, operation: impl FnOnce()) {
    let own = read!("vttbr_el2");
    // Entries written before are seen by every walk from here on.
    // SAFETY: a barrier.
    unsafe { asm!("dsb ishst", options(nostack)) };
    if own >> 48 != u64::from(vmid.0) {
        // EL2 does not use stage 2 itself, and nothing runs at EL1 here meanwhile.
        write!(
            "vttbr_el2",
            u64::from(vmid.0) << 48 | own & 0xffff_ffff_ffff
        );
        // SAFETY: a barrier.
        unsafe { asm!("isb", options(nostack)) };
    }
    operation();
    if own >> 48 != u64::from(vmid.0) {
        write!("vttbr_el2", own);
    }
    // SAFETY: a barrier.
    unsafe { asm!("isb", options(nostack)) };
}

// SAFETY: processors have their number in TPIDR_EL2 from the start; `map` and `unmap` keep EL2's
// own table, in which nothing else changes after boot.
unsafe impl Platform for Machine {
    fn invalidate(&self, vmid: Vmid, range: Range<Gpa>) {
        // More than a few pages are cheaper to forget altogether.
        let pages = (range.end.get() - range.start.get()) / PAGE_SIZE;
        if pages > 16 {
            return self.invalidate_all(vmid);
        }
        with_vmid(vmid, || {
            for page in 0..pages {
                let operand = (range.start.get() + page * PAGE_SIZE) >> 12;
                // SAFETY: forgetting translations is always allowed.
                unsafe { asm!("tlbi ipas2e1is, {}", in(reg) operand, options(nostack)) };
            }
            // What was combined with stage 1 is gone only after this.
            // SAFETY: as above.
            unsafe {
                asm!(
                    "dsb ish",
                    "tlbi vmalle1is",
                    "dsb ish",
                    "isb",
                    options(nostack)
                )
            };
        });
    }

    fn invalidate_all(&self, vmid: Vmid) {
        with_vmid(vmid, || {
            // SAFETY: forgetting translations is always allowed.
            unsafe { asm!("tlbi vmalls12e1is", "dsb ish", "isb", options(nostack)) };
        });
    }

    fn map(&self, page: Hfn) {
        entry(page).store(page.address().get() | PAGE, Ordering::Relaxed);
        // SAFETY: barriers.
        unsafe { asm!("dsb ishst", "isb", options(nostack)) };
    }

    fn unmap(&self, page: Hfn) {
        entry(page).store(0, Ordering::Relaxed);
        let operand = page.get();
        // SAFETY: forgetting translations is always allowed.
        unsafe {
            asm!("dsb ishst", "tlbi vae2is, {}", "dsb ish", "isb", in(reg) operand, options(nostack));
        }
    }

    fn wipe(&self, page: Hfn) {
        // A page that is not mapped is mapped for the moment.
        let mapped = entry(page).load(Ordering::Relaxed) != 0;
        if !mapped {
            self.map(page);
        }
        let start = page.address().get();
        let line = 4 << (read!("ctr_el0") >> 16 & 0xf);
        let mut address = start;
        while address < start + PAGE_SIZE {
            // SAFETY: the page is the hypervisor's and mapped.
            unsafe { (address as *mut u64).write_volatile(0) };
            address += 8;
        }
        address = start;
        while address < start + PAGE_SIZE {
            // SAFETY: cleaning a mapped page.
            unsafe { asm!("dc civac, {}", in(reg) address, options(nostack)) };
            address += line;
        }
        // SAFETY: a barrier.
        unsafe { asm!("dsb sy", options(nostack)) };
        if !mapped {
            self.unmap(page);
        }
    }

    fn sync_instructions(&self, _page: Hfn) {
        // The page may not be mapped here; forget every instruction instead.
        // SAFETY: forgetting instructions is always allowed.
        unsafe { asm!("dsb ish", "ic ialluis", "dsb ish", "isb", options(nostack)) };
    }

    fn processor(&self) -> usize {
        read!("tpidr_el2") as usize
    }
}
