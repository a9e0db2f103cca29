//! The machine below the TDX module: this process's memory, and the process's one module.

// UNSAFETY: reads and writes private pages by address.
#![expect(unsafe_code)]

use super::inject::Injection;
use crate::fork;
use crate::memory_key::Open;
use crate::sync::ProcessMutex;
use crate::usercopy;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use twofold_arch::{Hpa, PAGE_SIZE};
use twofold_tdx::{Module, Platform, Point};

/// The module of this process.
pub(crate) type TdxModule = Module<ProcessPlatform>;

/// Numbers of private keys: how many TDs can exist at once.
const PRIVATE_KEYS: std::ops::RangeInclusive<u16> = FIRST_KEY..=FIRST_KEY + 1023;
/// The lowest of them: the ones below are for memory that is encrypted without a TD.
const FIRST_KEY: u16 = 64;

/// The end of the addresses that a process can have, with four levels of its own tables.
const END_OF_PROCESS: u64 = 1 << 47;

/// This process's memory. All of it may become private: what is given to the module is chosen by
/// this crate alone, which has it from reservations and pools of its own.
#[derive(Debug)]
pub(crate) struct ProcessPlatform {
    injection: Injection,
}

fn bytes(page: Hpa) -> *mut u8 {
    ptr::with_exposed_provenance_mut(page.get() as usize)
}

// SAFETY: host-physical addresses are this process's own. Pages that become tables come from the
// pools of a TD and of its MMU, which stay mapped as long as the TD's pages belong to the module.
unsafe impl Platform for ProcessPlatform {
    fn has_memory(&self, page: Hpa, bytes: u64) -> bool {
        let end = page.get().checked_add(bytes);
        page.get() >= PAGE_SIZE && end.is_some_and(|end| end <= END_OF_PROCESS)
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::new(bytes(page).cast()).unwrap_or(NonNull::dangling())
    }

    fn copy_page(&self, from: Hpa, to: Hpa) -> bool {
        // Copied twice: what is read must not be private memory, which is open only afterwards.
        let mut content = [0; PAGE_SIZE as usize];
        if !self.read(from, &mut content) {
            return false;
        }
        let _open = Open::new();
        // SAFETY: `to` is a page that its owner gave to the module, which has claimed it.
        unsafe { ptr::copy_nonoverlapping(content.as_ptr(), bytes(to), content.len()) };
        true
    }

    fn zero_page(&self, page: Hpa) {
        let _open = Open::new();
        // SAFETY: a page that its owner gave to the module.
        unsafe { ptr::write_bytes(bytes(page), 0, PAGE_SIZE as usize) };
    }

    fn read_page(&self, page: Hpa, offset: usize, into: &mut [u8]) {
        let _open = Open::new();
        let offset = offset.min(PAGE_SIZE as usize);
        let length = into.len().min(PAGE_SIZE as usize - offset);
        // SAFETY: within a page that its owner gave to the module; `into` has as much room.
        unsafe { ptr::copy_nonoverlapping(bytes(page).add(offset), into.as_mut_ptr(), length) };
    }

    fn read(&self, from: Hpa, into: &mut [u8]) -> bool {
        // SAFETY: `into` has room for its length.
        unsafe { usercopy::copy_in(from.get() as usize, into.as_mut_ptr(), into.len()) }.is_ok()
    }

    fn injects_busy(&self, point: Point) -> bool {
        self.injection.busy(point)
    }

    fn is_interrupted(&self) -> bool {
        self.injection.interrupt()
    }
}

/// The module, with the process that it belongs to: a forked child has its own.
static MODULE: ProcessMutex<Option<(u32, Arc<TdxModule>)>> = ProcessMutex::new(None);

/// The TDX module of this process.
pub(crate) fn module() -> Arc<TdxModule> {
    let generation = fork::generation();
    MODULE.with(|module| match module {
        Some((owner, module)) if *owner == generation => Arc::clone(module),
        other => {
            let platform = ProcessPlatform {
                injection: Injection::from_environment(),
            };
            let new = Arc::new(Module::new(platform, PRIVATE_KEYS));
            *other = Some((generation, Arc::clone(&new)));
            new
        }
    })
}

/// The key numbers, one of which is free for each TD.
pub(crate) fn keys() -> std::ops::RangeInclusive<u16> {
    PRIVATE_KEYS
}

/// Before `fork`.
pub(crate) fn lock_for_fork() {
    MODULE.close_gate();
}

/// After `fork`.
pub(crate) fn unlock_after_fork() {
    MODULE.open_gate();
}
