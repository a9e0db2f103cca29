//! Instruction fetches: where code is, and reading and comparing its bytes.

use super::access::{self, Vanished};
use super::stage1::LinearAccess;
use super::stage2::{Operation, Rights};
use super::tlb::{Allowed, Set, tag};
use super::{PAGE_MASK, PAGE_SHIFT};
use crate::core_state::Core;
use crate::trap::Trap;
use twofold_arch::Hpa;

/// Bytes of code in host memory, from an instruction's first byte to the end of its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CodeBytes {
    /// Address of the first byte in this process.
    pub(crate) host: usize,
    /// Bytes up to the end of the page.
    pub(crate) available: usize,
}

impl Core {
    /// Translates a linear address for fetching at the current privilege level. What it returns
    /// identifies the page and may be compared with, but code is only decoded from a page that was
    /// [fetched](Core::fetch).
    #[inline(always)]
    pub(crate) fn exec_place(&mut self, linear: u64) -> Result<usize, Trap> {
        let set = if self.user {
            Set::User
        } else {
            Set::Supervisor
        };
        let entry = self.mem.tlb.entry(set.base(), linear);
        if entry.execute == tag(linear, 1) {
            return Ok(linear.wrapping_add(entry.addend) as usize);
        }
        self.exec_slow(linear, set)
    }

    /// Translates a linear address in order to decode code there, and from then on notices stores
    /// to its page. Called between instructions only: other threads' requests may be met meanwhile,
    /// so earlier translations do not hold any more.
    pub(crate) fn fetch(&mut self, linear: u64) -> Result<CodeBytes, Trap> {
        loop {
            let host = self.exec_place(linear)?;
            let hpa = self.hpa_of(host & PAGE_MASK as usize);
            if self.machine.code().is_settled(hpa) {
                let available = (1 << PAGE_SHIFT) - (host & !PAGE_MASK as usize);
                return Ok(CodeBytes { host, available });
            }
            self.machine.code().note(hpa);
            // Everybody who may write the page without a look at the bitmap stops doing so. This
            // vCPU waits outside guest mode, lest two that do this wait for each other.
            self.line.leave();
            self.machine.drop_writes();
            self.machine.code().settle(hpa);
            self.line.enter();
            self.serve_requests();
        }
    }

    /// The host-physical address of a place in this process.
    pub(super) fn hpa_of(&self, host: usize) -> Hpa {
        Hpa::new(host.wrapping_sub(self.machine.config().hpa_offset) as u64)
    }

    /// From now on stores to these bytes, all in one page, are noticed: code is about to be read
    /// there.
    pub(crate) fn watch_code(&mut self, host: usize, bytes: usize) {
        self.machine.code().note_lines(self.hpa_of(host), bytes);
    }

    /// Reads code. What is gone ends in [`Exit::HostFault`](crate::Exit::HostFault).
    pub(crate) fn read_code(&mut self, host: usize, buffer: &mut [u8]) -> Result<(), Trap> {
        let pointer = std::ptr::with_exposed_provenance::<u8>(host);
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: the page was translated since the last flush, in guest mode.
        let copied = unsafe { access::copy_from(buffer, pointer) };
        copied.map_err(|Vanished| self.vanished(host))
    }

    /// Whether code in memory, all in one page, is still what it was; from now on stores to it are
    /// noticed.
    pub(crate) fn code_is(&mut self, host: usize, bytes: &[u8]) -> Result<bool, Trap> {
        self.watch_code(host, bytes.len());
        let pointer = std::ptr::with_exposed_provenance::<u8>(host);
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: the page was translated since the last flush, in guest mode.
        let same = unsafe { access::equals(pointer, bytes) };
        same.map_err(|Vanished| self.vanished(host))
    }

    #[cold]
    #[inline(never)]
    fn exec_slow(&mut self, linear: u64, set: Set) -> Result<usize, Trap> {
        self.counters.tlb_misses += 1;
        let access = LinearAccess {
            write: false,
            fetch: true,
            user: set == Set::User,
            smap_suspended: false,
        };
        let mapping = self.first_stage(linear, access)?;
        if self.mem.walker.forbids_code(mapping.gpa) {
            return Err(self.reserved_address(linear, access));
        }
        let Some(page) = self.final_stage(linear, 1, &mapping, Operation::Fetch)? else {
            // Code in emulated memory: KVM cannot fetch it either.
            return Err(self.unknown());
        };
        let host = self.machine.host(page.hpa);
        debug_assert!(page.rights.contains(Rights::EXECUTE));
        self.mem.tlb.fill(
            set,
            linear,
            (host as u64).wrapping_sub(linear & PAGE_MASK),
            Allowed {
                read: false,
                write: false,
                execute: true,
            },
            (mapping.size > 1 << PAGE_SHIFT).then_some(mapping.size),
        );
        Ok(host + (linear & !PAGE_MASK) as usize)
    }
}
