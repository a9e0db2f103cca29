//! A guest without processors: an MMU with one slot, and threads that take its faults.

use crate::host::{GUEST_MEMORY, PoolHost};
use crate::measure::{Meter, per_item};
use anyhow::{Result, ensure};
use std::ops::Range;
use twofold_arch::{Gpa, Level, PAGE_SIZE, Pferr};
use twofold_mmu::{Config, Ept, Fault, Mmu, Outcome, Region, RegionFlags, RootRole};

/// An MMU with a slot from guest-physical address 0.
pub(crate) struct Guest {
    pub(crate) mmu: Mmu<Ept, PoolHost>,
    bytes: u64,
}

impl Guest {
    /// A guest with `bytes` of memory.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let guest = Self {
            mmu: Mmu::new(PoolHost::default(), Config::default()),
            bytes,
        };
        guest.set_flags(RegionFlags::empty())?;
        Ok(guest)
    }

    /// Pages of the guest.
    pub(crate) const fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE
    }

    /// Where its memory is in the program.
    pub(crate) const fn hva(&self) -> Range<u64> {
        GUEST_MEMORY..GUEST_MEMORY + self.bytes
    }

    /// Creates the slot or changes its flags.
    pub(crate) fn set_flags(&self, flags: RegionFlags) -> Result<()> {
        self.mmu.set_region(Region {
            slot: 0,
            flags: flags.bits(),
            gpa: 0,
            size: self.bytes,
            hva: GUEST_MEMORY,
        })?;
        Ok(())
    }

    /// Writes to each of `pages` for the first time: one fault each.
    ///
    /// # Errors
    /// If a fault does not end in a new 4K mapping.
    pub(crate) fn fault(&self, pages: impl Iterator<Item = u64>) -> Result<()> {
        let root = self.mmu.load_root(RootRole::NORMAL)?;
        let mut reader = self.mmu.reader();
        let mut wrong = 0;
        for page in pages {
            let fault = Fault {
                gpa: Gpa::new(page * PAGE_SIZE),
                error: Pferr::WRITE,
            };
            let fixed = Ok(Outcome::Fixed { level: Level::L4K });
            wrong += u64::from(self.mmu.fault(&mut reader, &root, fault) != fixed);
        }
        ensure!(wrong == 0, "{wrong} faults did not end in a new 4K mapping");
        Ok(())
    }

    /// [`fault`](Self::fault) with every page, in order, into empty tables.
    pub(crate) fn fill(&self) -> Result<()> {
        self.mmu.zap_all();
        self.fault(0..self.pages())
    }

    /// [`fill`](Self::fill), measured per page.
    pub(crate) fn timed_fill(&self) -> Result<f64> {
        self.mmu.zap_all();
        let mut result = Ok(());
        let figure = per_item(self.pages(), || result = self.fault(0..self.pages()));
        result?;
        Ok(figure)
    }
}

/// Pages that the tables of `bytes` mapped as 4K take, with some to spare.
pub(crate) const fn tables(bytes: u64) -> u64 {
    bytes / Level::L2M.bytes() + bytes / Level::L1G.bytes() + 32
}

/// 1 GiB, over which most rows go.
pub(crate) const GIB: u64 = 1 << 30;

/// Faults of one round over a large guest.
pub(crate) fn round_faults(meter: Meter) -> usize {
    match meter {
        Meter::Time => 1 << 18,
        Meter::Instructions => 1 << 15,
    }
}
