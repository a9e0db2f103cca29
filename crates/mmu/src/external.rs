//! Tables that somebody else keeps: the Secure EPT of a TD, which only the TDX module writes
//! (SPEC 5.5).

use twofold_arch::{Gfn, Hpa, Level};

/// What the owner of the tables that map a VM's private memory is asked for. The MMU keeps a mirror
/// of them, of the same shape, and changes an entry of the mirror in this order: exchange it for the
/// frozen value, call one of these functions, and then write the new value, or on an error the
/// old one. So there is one caller at a time for each entry, and nobody meets an entry of which the
/// two tables could disagree.
///
/// Nothing here may wait for a virtual processor, take a lock that is held while the MMU is called,
/// or call the MMU. Frames are without the shared bit.
pub trait ExternalTables: Send + Sync {
    /// Puts a table into the empty entry for `gfn` at `level`, at least 2M: `page` is a page from
    /// [`Host::alloc_table`](crate::Host::alloc_table), which now is the owner's until
    /// [`reclaim_table`](Self::reclaim_table). (TDH.MEM.SEPT.ADD.)
    ///
    /// # Errors
    /// See [`ExternalError`]; the page was not taken.
    fn link_table(&self, gfn: Gfn, level: Level, page: Hpa) -> Result<(), ExternalError>;

    /// Maps the page `hpa` by the empty entry for `gfn` at `level`: with the content of the page at
    /// `source`, as [`Mmu::td_add`](crate::Mmu::td_add) was given it (TDH.MEM.PAGE.ADD), or for the
    /// guest to accept (TDH.MEM.PAGE.AUG).
    ///
    /// # Errors
    /// See [`ExternalError`].
    fn map_leaf(
        &self,
        gfn: Gfn,
        level: Level,
        hpa: Hpa,
        source: Option<u64>,
    ) -> Result<(), ExternalError>;

    /// No new translation is made through the leaf for `gfn` at `level` from now on.
    /// (TDH.MEM.RANGE.BLOCK. Nothing to do for a TD that does not run yet.)
    ///
    /// # Errors
    /// See [`ExternalError`].
    fn block_leaf(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError>;

    /// Sees to it that no virtual processor uses a translation of what was blocked before: begins
    /// a new TLB epoch and makes every virtual processor that is inside leave; returns when those
    /// have. (TDH.MEM.TRACK, and a kick. Nothing to do for a TD that does not run yet.)
    ///
    /// # Errors
    /// See [`ExternalError`].
    fn track(&self) -> Result<(), ExternalError>;

    /// Takes the page `hpa` out of the leaf for `gfn` at `level`, which is blocked and tracked.
    /// (TDH.MEM.PAGE.REMOVE, and a write-back of the caches.)
    ///
    /// # Errors
    /// See [`ExternalError`].
    fn remove_leaf(&self, gfn: Gfn, level: Level, hpa: Hpa) -> Result<(), ExternalError>;

    /// Kicks every virtual processor out of the guest and keeps all of them out until
    /// [`release_vcpus`](Self::release_vcpus): what the MMU does before it repeats a call that found
    /// something busy and must not fail. Returns when all are out.
    fn hold_vcpus(&self);

    /// Ends [`hold_vcpus`](Self::hold_vcpus).
    fn release_vcpus(&self);

    /// The VM ends: no virtual processor will run again. What it has is reclaimed next, one by one.
    /// (The TD's key goes: TDH.VP.FLUSH, TDH.MNG.VPFLUSHDONE, TDH.MNG.KEY.FREEID.)
    fn end(&self);

    /// Takes back the page `hpa` that a leaf at `level` mapped, after [`end`](Self::end).
    /// (TDH.PHYMEM.PAGE.RECLAIM.)
    fn reclaim_leaf(&self, hpa: Hpa, level: Level);

    /// Takes back the page of a table, after [`end`](Self::end). The MMU gives it back to the
    /// host then.
    fn reclaim_table(&self, page: Hpa);

    /// The page of the leaf for `gfn` at `level`, whatever its state, if there is one: for
    /// [`Mmu::check`](crate::Mmu::check).
    ///
    /// # Errors
    /// [`Unknown`] if it cannot be told now.
    fn leaf(&self, gfn: Gfn, level: Level) -> Result<Option<Hpa>, Unknown> {
        let _ = (gfn, level);
        Err(Unknown)
    }
}

/// Why the owner of external tables did not do what it was asked for. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExternalError {
    /// Somebody else uses what is needed; the same call may succeed later.
    #[error("the owner of the private tables is busy")]
    Busy,
    /// The tables are not as the MMU believes: a bug, after which the VM cannot go on. With the
    /// owner's status.
    #[error("the owner of the private tables refuses with status {0:#x}")]
    Refused(u64),
}

/// The owner of external tables cannot say what is in an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the owner of the private tables cannot tell")]
pub struct Unknown;
