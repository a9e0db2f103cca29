//! What the machine supplies.

// UNSAFETY: the pages that the hypervisor owns are raw memory; words of them are reached here.
#![expect(unsafe_code)]

use crate::guest::Access;
use crate::interrupts::VirtualGic;
use crate::page::Pages;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gpa, Hfn, Hpa};
use twofold_table::PageAccess;

/// Words of eight bytes in a page.
pub const WORDS: usize = 512;

/// Whose translations: the VMID that stage 2 runs with. 0 is the host's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Vmid(pub u16);

impl Vmid {
    /// The host's.
    pub const HOST: Self = Self(0);
}

/// The machine below the hypervisor.
///
/// # Safety
/// [`PageAccess::table_ptr`] must give a valid pointer for every page that the hypervisor owns or
/// has mapped with [`map`](Self::map), and nothing but this crate and, for pages that are shared,
/// the host may write there. [`processor`](Self::processor) must be different on each processor
/// that runs at the same time.
pub unsafe trait Platform: PageAccess + Sync {
    /// Makes every processor forget the translations of `range` by `vmid`'s stage 2, with what was
    /// derived from them, and returns when that is done.
    fn invalidate(&self, vmid: Vmid, range: Range<Gpa>);

    /// The same for every address.
    fn invalidate_all(&self, vmid: Vmid);

    /// Makes this processor, and perhaps others, forget the translations of `range` by `vmid`.
    fn invalidate_here(&self, vmid: Vmid, range: Range<Gpa>);

    /// Makes this processor forget everything of `vmid`, stage 1 and instructions too, before
    /// another vCPU of the same VM runs here.
    fn forget_context(&self, vmid: Vmid);

    /// Makes every processor forget every translation of EL1 and EL0 and every instruction.
    fn invalidate_everything(&self);

    /// Makes a page readable and writable at EL2. Must not fail: the tables exist from the start.
    fn map(&self, page: Hfn);

    /// Takes a page out of EL2's own translation, on every processor.
    fn unmap(&self, page: Hfn);

    /// Zeroes a page, which need not be mapped, and cleans it from the data caches so that no
    /// observer sees the old content, however it reads.
    fn wipe(&self, page: Hfn);

    /// Makes what was written to a page visible to instruction fetches.
    fn sync_instructions(&self, page: Hfn);

    /// The number of this processor, below [`MAX_PROCESSORS`].
    fn processor(&self) -> usize;

    /// The machine's counter of time.
    fn counter(&self) -> u64;

    /// Maps pages of a device for EL2 alone, for good, and says where. `None` if there is no room.
    /// What the host may choose has been checked.
    fn map_device(&self, pages: Pages, access: Access) -> Option<u64> {
        let _ = (pages, access);
        None
    }

    /// Exceptions that reach EL2 on this processor go through `vectors` from now on. `false` if
    /// this machine has none of the kind.
    fn set_vectors(&self, vectors: Vectors) -> bool {
        let _ = vectors;
        false
    }

    /// Whether the processors have speculative store bypass safe (FEAT_SSBS).
    fn has_ssbs(&self) -> bool {
        false
    }

    /// Exceptions to EL2 leave PSTATE.SSBS set on this processor from now on. Called where
    /// [`has_ssbs`](Self::has_ssbs) says so.
    fn enable_ssbs(&self) {}

    /// The virtual side of this processor's GICv3 interface, if there is one.
    fn virtual_gic(&self) -> Option<&dyn VirtualGic> {
        None
    }
}

/// Ways into EL2, by upstream's numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vectors {
    /// Straight.
    Direct = 0,
    /// With the branch history overwritten first.
    Hardened = 1,
}

/// The most processors that the hypervisor serves.
#[cfg(not(loom))]
pub const MAX_PROCESSORS: usize = 16;
/// The models have two, and `loom`'s threads small stacks.
#[cfg(loom)]
pub const MAX_PROCESSORS: usize = 2;

/// A word of a page that the hypervisor has mapped. The index is taken modulo [`WORDS`].
fn word<P: Platform>(platform: &P, page: Hfn, index: usize) -> &AtomicU64 {
    // SAFETY: `Platform` promises a valid pointer for pages that are owned or mapped, which all
    // callers' are; the index stays inside the page; words are only accessed atomically.
    unsafe {
        AtomicU64::from_ptr(
            platform
                .table_ptr(page.address())
                .as_ptr()
                .add(index % WORDS),
        )
    }
}

/// Reads a word of a mapped page, once.
pub(crate) fn read<P: Platform>(platform: &P, page: Hfn, index: usize) -> u64 {
    word(platform, page, index).load(Ordering::Relaxed)
}

/// Writes a word of a mapped page.
pub(crate) fn write<P: Platform>(platform: &P, page: Hfn, index: usize, value: u64) {
    word(platform, page, index).store(value, Ordering::Relaxed);
}

/// The page that holds a word of host memory at `address`, and the word's index, or `None` if the
/// address is not that of a word.
pub(crate) fn split(address: u64) -> Option<(Hfn, usize)> {
    let address = Hpa::new(address);
    address
        .is_aligned(8)
        .then(|| (address.frame(), address.page_offset() as usize / 8))
}
