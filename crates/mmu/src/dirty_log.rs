//! Reading the dirty bitmap of a slot (SPEC 6.9).

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::region::ADDRESS_SPACES;
use alloc::sync::Arc;
use twofold_arch::Gfn;
use twofold_table::Debt;

/// Why a dirty bitmap cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// No such slot id or address space can exist: `-EINVAL`.
    #[error("slot id or address space out of range")]
    Id,
    /// No such slot, or it does not log: `-ENOENT`.
    #[error("no slot with dirty logging has this id")]
    NotLogged,
    /// The buffer has fewer bits than the slot has pages.
    #[error("the buffer is smaller than the slot's bitmap")]
    Buffer,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// `KVM_GET_DIRTY_LOG`: moves the slot's dirty bits to `bitmap` (bit n of word m is page
    /// `64 * m + n` of the slot) and protects those pages again, so that the next write is seen.
    /// Words of `bitmap` beyond the slot are left as they are.
    ///
    /// A page is marked before the mapping that lets it be written is published, in one read
    /// section. So after taking the bits this waits for the open sections, and then finds every
    /// mapping that it has to protect.
    ///
    /// # Errors
    /// See [`DirtyLogError`].
    pub fn dirty_log_get(
        &self,
        as_id: u16,
        slot: u16,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        if usize::from(as_id) >= ADDRESS_SPACES || usize::from(slot) >= crate::region::USER_SLOTS {
            return Err(DirtyLogError::Id);
        }
        let mut writer = self.lock();
        let (info, dirty) = self
            .slot_by_id(&writer, as_id, slot)
            .and_then(|slot| Some((slot.info, Arc::clone(slot.dirty.as_ref()?))))
            .ok_or(DirtyLogError::NotLogged)?;
        let bitmap = bitmap
            .get_mut(..dirty.words())
            .ok_or(DirtyLogError::Buffer)?;
        let mut any = 0;
        for (number, word) in bitmap.iter_mut().enumerate() {
            *word = dirty.take(number);
            any |= *word;
        }
        if any == 0 {
            return Ok(());
        }
        let _readers = self.synchronize(&mut writer);
        let mut debt = Debt::none();
        for (number, &word) in bitmap.iter().enumerate() {
            let first = info.base.get() + 64 * number as u64;
            let mut rest = word;
            while rest != 0 {
                // One run of pages at a time.
                let start = rest.trailing_zeros();
                let run = (rest >> start).trailing_ones();
                let gfns = first + u64::from(start)..first + u64::from(start) + u64::from(run);
                let gfns = Gfn::new(gfns.start)..Gfn::new(gfns.end);
                self.write_protect(&writer, as_id, gfns, &mut debt);
                rest = if start + run == 64 {
                    0
                } else {
                    rest >> (start + run) << (start + run)
                };
            }
        }
        self.pay(&writer, debt);
        Ok(())
    }
}
