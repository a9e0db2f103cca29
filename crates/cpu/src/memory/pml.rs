//! Page-modification logging (SDM Vol. 3, "Page-Modification Logging"): the processor writes down
//! the guest-physical address of each page whose EPT dirty flag it sets.

use super::access::{Datum, Vanished};
use crate::machine::Machine;
use twofold_arch::Hpa;

/// A vCPU's page-modification log, as two fields of the VMCS describe it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pml {
    /// The page of 512 entries of 8 bytes, 4 KiB aligned ("PML address").
    pub page: Hpa,
    /// The entry that is written next ("PML index"). It counts down from
    /// [`Pml::FIRST`]; the log is full when it is above that.
    pub index: u16,
}

impl Pml {
    /// The index of an empty log.
    pub const FIRST: u16 = 511;

    /// A log that is empty.
    pub const fn empty(page: Hpa) -> Self {
        Self {
            page,
            index: Self::FIRST,
        }
    }

    /// Whether there is no room for an entry.
    pub const fn is_full(&self) -> bool {
        self.index > Self::FIRST
    }

    /// Writes an entry into a log that is not full. `Err`: where there is no memory.
    pub(super) fn log(&mut self, machine: &Machine, gpa: u64) -> Result<(), usize> {
        let place = machine.host(self.page) + usize::from(self.index) * size_of::<u64>();
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: the log is raw memory.
        // SAFETY: whoever chose the log gave the processor its page; the index is within it.
        let stored = unsafe { u64::store(pointer, gpa & super::PAGE_MASK) };
        stored.map_err(|Vanished| place)?;
        self.index = self.index.wrapping_sub(1);
        Ok(())
    }
}
