//! The platform for `twofold-pkvm`: EL2's own pages, and TLBs.

// UNSAFETY: this is the machine: page tables, TLB and cache maintenance.
#![expect(unsafe_code)]

use super::gic::{self, Gic};
use super::registers::{read, write};
use core::arch::asm;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gpa, Hfn, Hpa, PAGE_SIZE};
use twofold_pkvm::interrupts::VirtualGic;
use twofold_pkvm::platform::{Platform, Vectors, Vmid};
use twofold_pkvm::{Access, Pages};
use twofold_table::PageAccess;

/// Memory of the machine, started with `-m 512`.
pub(crate) const RAM_START: u64 = 0x4000_0000;
/// Its pages.
pub(crate) const RAM_PAGES: u64 = 512 << 20 >> 12;

/// Where EL2 maps devices for the host, and how many pages it has for them.
const PRIVATE_START: u64 = 0x8000_0000;
const PRIVATE_PAGES: u64 = 512;

unsafe extern "C" {
    static el2_level3: [AtomicU64; RAM_PAGES as usize];
    static el2_private3: [AtomicU64; PRIVATE_PAGES as usize];
    fn vectors();
    fn hardened_vectors();
}

/// Pages of the private range that are in use.
static PRIVATE_USED: AtomicU64 = AtomicU64::new(0);

/// A normal, inner-shareable, readable and writable page that is not executed.
const PAGE: u64 = 1 << 54 | 1 << 10 | 3 << 8 | 3;

/// A page of a device that is read and never executed.
const DEVICE_PAGE: u64 = 3 << 53 | 1 << 10 | 1 << 7 | 1 << 2 | 3;
/// What makes it read-only.
const READ_ONLY: u64 = 1 << 7;

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

/// Zeroes a page that is the hypervisor's and mapped, in the largest steps that the processor has.
fn zero(start: u64) {
    const PROHIBITED: u64 = 1 << 4;
    let zeroing = read!("dczid_el0");
    let step = 4 << (zeroing & 0xf);
    let mut address = start;
    while address < start + PAGE_SIZE {
        if zeroing & PROHIBITED == 0 {
            // SAFETY: the caller's page; the blocks are smaller and aligned.
            unsafe { asm!("dc zva, {}", in(reg) address, options(nostack)) };
            address += step;
        } else {
            // SAFETY: the caller's page.
            unsafe { (address as *mut u64).write_volatile(0) };
            address += 8;
        }
    }
}

/// Where EL2's own translation leads.
fn translated(address: u64) -> Option<Hfn> {
    const FAULT: u64 = 1;
    const ADDRESS: u64 = 0xffff_ffff_f000;
    let hosts = read!("par_el1");
    // SAFETY: asks for a translation; what the register held is put back.
    unsafe { asm!("at s1e2r, {}", "isb", in(reg) address, options(nostack)) };
    let result = read!("par_el1");
    write!("par_el1", hosts);
    (result & FAULT == 0).then(|| Hpa::new(result & ADDRESS).frame())
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

    fn invalidate_here(&self, vmid: Vmid, range: Range<Gpa>) {
        let pages = (range.end.get() - range.start.get()) / PAGE_SIZE;
        with_vmid(vmid, || {
            if pages > 16 {
                // SAFETY: forgetting translations is always allowed.
                unsafe { asm!("tlbi vmalls12e1", options(nostack)) };
            }
            for page in (0..pages).take(16) {
                let operand = (range.start.get() + page * PAGE_SIZE) >> 12;
                // SAFETY: as above.
                unsafe { asm!("tlbi ipas2e1, {}", in(reg) operand, options(nostack)) };
            }
            // SAFETY: as above.
            unsafe {
                asm!(
                    "dsb nsh",
                    "tlbi vmalle1",
                    "dsb nsh",
                    "isb",
                    options(nostack)
                )
            };
        });
    }

    fn forget_context(&self, vmid: Vmid) {
        with_vmid(vmid, || {
            // SAFETY: forgetting translations and instructions is always allowed.
            unsafe {
                asm!(
                    "tlbi vmalle1",
                    "ic iallu",
                    "dsb nsh",
                    "isb",
                    options(nostack)
                )
            };
        });
    }

    fn invalidate_everything(&self) {
        // SAFETY: forgetting translations and instructions is always allowed.
        unsafe {
            asm!(
                "dsb ishst",
                "tlbi alle1is",
                "ic ialluis",
                "dsb ish",
                "isb",
                options(nostack)
            )
        };
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
        zero(start);
        let mut address = start;
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

    fn counter(&self) -> u64 {
        read!("cntpct_el0")
    }

    fn map_device(&self, pages: Pages, access: Access) -> Option<u64> {
        let room = |used: u64| {
            used.checked_add(pages.count)
                .filter(|&end| end <= PRIVATE_PAGES)
        };
        let first = PRIVATE_USED
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, room)
            .ok()?;
        for (index, page) in (first..).zip(pages.iter()) {
            let mut value = page.address().get() | DEVICE_PAGE;
            if access.contains(Access::WRITE) {
                value &= !READ_ONLY;
            }
            // SAFETY: inside the table, since there was room; the boot code made it, and entries
            // are only accessed atomically.
            unsafe { &el2_private3[index as usize] }.store(value, Ordering::Relaxed);
        }
        // SAFETY: barriers.
        unsafe { asm!("dsb ishst", "isb", options(nostack)) };
        let place = PRIVATE_START + first * PAGE_SIZE;
        assert_eq!(
            translated(place),
            Some(pages.start),
            "EL2 does not see the device that it has mapped at {place:#x}"
        );
        Some(place)
    }

    fn set_vectors(&self, which: Vectors) -> bool {
        let table = match which {
            Vectors::Direct => vectors as *const (),
            Vectors::Hardened => hardened_vectors as *const (),
        };
        write!("vbar_el2", table as u64);
        // SAFETY: a barrier.
        unsafe { asm!("isb", options(nostack)) };
        true
    }

    fn has_ssbs(&self) -> bool {
        read!("id_aa64pfr1_el1") >> 4 & 0xf != 0
    }

    fn enable_ssbs(&self) {
        const DSSBS: u64 = 1 << 44;
        write!("sctlr_el2", read!("sctlr_el2") | DSSBS);
        // SAFETY: a barrier.
        unsafe { asm!("isb", options(nostack)) };
    }

    fn virtual_gic(&self) -> Option<&dyn VirtualGic> {
        gic::is_there().then_some(&Gic)
    }
}
