//! What a VM's guests have written: the dirty log and the dirty rings (KVM API, "KVM_GET_DIRTY_LOG",
//! "KVM_CLEAR_DIRTY_LOG", "KVM_CAP_DIRTY_LOG_RING").

use crate::vm::Vm;
use kvm_bindings::{KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
use rustix::io::Errno;
use twofold_mmu::{DirtyLogError, DirtyRingError, ManualProtect, RegionFlags};

/// What KVM answers for a dirty log that cannot be read or cleared.
fn errno(error: DirtyLogError) -> Errno {
    match error {
        DirtyLogError::RingOnly => Errno::NXIO,
        DirtyLogError::NotLogged => Errno::NOENT,
        // `Buffer`: the slot was replaced by a larger one since it was asked for its size.
        DirtyLogError::Id | DirtyLogError::Range | DirtyLogError::Buffer => Errno::INVAL,
    }
}

/// Address space and id of a slot's name in the API.
const fn parts(slot: u32) -> (u16, u16) {
    ((slot >> 16) as u16, slot as u16)
}

impl Vm {
    /// `KVM_GET_DIRTY_LOG`: the pages of a slot that were written since the last call, one bit
    /// each; with manual protection, since they were cleared.
    ///
    /// # Errors
    /// `ENXIO` with dirty rings, `EINVAL` for an id that cannot exist, `ENOENT` for a slot that is
    /// not there or does not log.
    pub fn get_dirty_log(&self, slot: u32) -> Result<Vec<u64>, Errno> {
        let (as_id, id) = parts(slot);
        let info = self.slot(slot);
        let pages = info.map_or(0, |info| info.pages);
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::NOMEM)?;
        let mut bitmap = vec![0; words];
        // Nobody is stopped for what will be refused.
        if info.is_some_and(|info| info.flags.contains(RegionFlags::LOG_DIRTY)) {
            self.collect_logs();
        }
        self.tables()
            .dirty_log_get(as_id, id, &mut bitmap)
            .map_err(errno)?;
        Ok(bitmap)
    }

    /// `KVM_CLEAR_DIRTY_LOG`: of `pages` pages of a slot from the page `first` on, those that are
    /// dirty and whose bit is set in the bitmap become clean. `bitmap` is called with the number of
    /// its words once nothing else can be refused.
    ///
    /// # Errors
    /// `ENXIO` with dirty rings; `EINVAL` for an id that cannot exist, a first page or a number of
    /// pages that is not a multiple of 64 (the number only if it ends before the slot does), and a
    /// range that leaves the slot; `ENOENT` for a slot that is not there or does not log; what
    /// `bitmap` answers.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first: u64,
        pages: u32,
        bitmap: impl FnOnce(usize) -> Result<Vec<u64>, Errno>,
    ) -> Result<(), Errno> {
        let (as_id, id) = parts(slot);
        let tables = self.tables();
        let words = tables
            .dirty_log_words(as_id, id, first, pages)
            .map_err(errno)?;
        self.collect_logs();
        let mut bitmap = bitmap(words)?;
        tables
            .dirty_log_clear(as_id, id, first, pages, &mut bitmap)
            .map_err(errno)
    }

    /// `KVM_RESET_DIRTY_RINGS`: protects the pages of the entries that the program has harvested and
    /// takes the entries back. How many there were.
    ///
    /// # Errors
    /// `EINVAL` without dirty rings.
    pub fn reset_dirty_rings(&self) -> Result<u32, Errno> {
        match self.tables().ring_entries() {
            0 => Err(Errno::INVAL),
            _ => Ok(self.tables().reset_dirty_rings()),
        }
    }

    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`
    pub(crate) fn set_manual_protect(&self, argument: u64) -> Result<(), Errno> {
        let enable = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        let allowed = match argument & enable {
            0 => enable,
            _ => enable | u64::from(KVM_DIRTY_LOG_INITIALLY_SET),
        };
        if argument & !allowed != 0 {
            return Err(Errno::INVAL);
        }
        self.tables()
            .set_manual_protect(ManualProtect::from_bits_truncate(argument as u32));
        Ok(())
    }

    /// `KVM_CAP_DIRTY_LOG_RING`: each vCPU that is created from now on gets a ring of `bytes` bytes.
    ///
    /// # Errors
    /// `EINVAL` for a size that is not a power of two, below a page or below the reserve, for a
    /// second call, and once there are vCPUs; `E2BIG` above 65536 entries.
    pub(crate) fn enable_dirty_ring(&self, bytes: u64) -> Result<(), Errno> {
        self.before_vcpus(|| self.tables().enable_dirty_ring(bytes))?
            .map(drop)
            .map_err(|error| match error {
                DirtyRingError::Invalid => Errno::INVAL,
                DirtyRingError::TooBig => Errno::TOOBIG,
            })
    }

    /// Brings what the processors have logged by themselves into bitmaps and rings.
    fn collect_logs(&self) {
        if !self.tables().logs_by_pml() {
            return;
        }
        self.machine().kick_all();
        for vcpu in self.vcpus() {
            vcpu.log.wait_until_drained();
        }
    }
}
