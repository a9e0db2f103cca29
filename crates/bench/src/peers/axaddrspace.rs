//! `axaddrspace` over `page_table_multiarch`: an address space whose pages are mapped on faults.
//!
//! Since 0.6 the crate leaves the table to its user; `page_table_multiarch` is what it used before
//! and what its own hypervisor uses. Frames for the guest are numbers only, tables are real pages.

use super::page_table_multiarch;
use ::axaddrspace::{AddrSpace, AddrSpaceError, AddrSpaceResult, NestedPageTableOps, PageSize};
use ::page_table_multiarch as ptm;
use anyhow::{Result, anyhow, ensure};
use ax_memory_addr as ax;
use axvm_types::{GuestPhysAddr, MappingFlags};
use memory_addr::{PhysAddr, VirtAddr};
use std::cell::Cell;

const PAGE: usize = 4096;

struct Table {
    inner: page_table_multiarch::Table,
    next_frame: Cell<usize>,
}

fn flags(flags: MappingFlags) -> ptm::MappingFlags {
    ptm::MappingFlags::from_bits_truncate(flags.bits())
}

fn done<T>(result: ptm::PagingResult<T>) -> AddrSpaceResult<T> {
    result.map_err(|_| AddrSpaceError::MappingState)
}

fn mapping(
    (paddr, flags, _): (PhysAddr, ptm::MappingFlags, ptm::PageSize),
) -> (ax::PhysAddr, MappingFlags, PageSize) {
    (
        ax::PhysAddr::from(paddr.as_usize()),
        MappingFlags::from_bits_truncate(flags.bits()),
        PageSize::Size4K,
    )
}

impl NestedPageTableOps for Table {
    fn root_paddr(&self) -> ax::PhysAddr {
        ax::PhysAddr::from(self.inner.root_paddr().as_usize())
    }

    fn levels(&self) -> usize {
        4
    }

    fn alloc_frame(&self) -> Option<ax::PhysAddr> {
        let frame = self.next_frame.get();
        self.next_frame.set(frame + PAGE);
        Some(ax::PhysAddr::from(frame))
    }

    fn dealloc_frame(&self, _: ax::PhysAddr) {}

    fn phys_to_virt(&self, paddr: ax::PhysAddr) -> ax::VirtAddr {
        ax::VirtAddr::from(paddr.as_usize())
    }

    fn map(
        &mut self,
        vaddr: GuestPhysAddr,
        paddr: ax::PhysAddr,
        _: PageSize,
        f: MappingFlags,
    ) -> AddrSpaceResult {
        let (vaddr, paddr) = (
            VirtAddr::from(vaddr.as_usize()),
            PhysAddr::from(paddr.as_usize()),
        );
        done(
            self.inner
                .cursor()
                .map(vaddr, paddr, ptm::PageSize::Size4K, flags(f)),
        )
        .map(drop)
    }

    fn unmap(
        &mut self,
        vaddr: GuestPhysAddr,
    ) -> AddrSpaceResult<(ax::PhysAddr, MappingFlags, PageSize)> {
        done(self.inner.cursor().unmap(VirtAddr::from(vaddr.as_usize()))).map(mapping)
    }

    fn map_linear(
        &mut self,
        vaddr: GuestPhysAddr,
        paddr: ax::PhysAddr,
        size: usize,
        f: MappingFlags,
        huge: bool,
    ) -> AddrSpaceResult {
        let vaddr = VirtAddr::from(vaddr.as_usize());
        let to = |v: VirtAddr| PhysAddr::from(v.as_usize() - vaddr.as_usize() + paddr.as_usize());
        done(
            self.inner
                .cursor()
                .map_region(vaddr, to, size, flags(f), huge),
        )
    }

    fn unmap_region(&mut self, start: GuestPhysAddr, size: usize) -> AddrSpaceResult {
        done(
            self.inner
                .cursor()
                .unmap_region(VirtAddr::from(start.as_usize()), size),
        )
    }

    fn remap(&mut self, start: GuestPhysAddr, paddr: ax::PhysAddr, f: MappingFlags) -> bool {
        self.map(start, paddr, PageSize::Size4K, f).is_ok()
    }

    fn protect_region(&mut self, start: GuestPhysAddr, size: usize, f: MappingFlags) -> bool {
        let start = VirtAddr::from(start.as_usize());
        self.inner
            .cursor()
            .protect_region(start, size, flags(f))
            .is_ok()
    }

    fn query(
        &self,
        vaddr: GuestPhysAddr,
    ) -> AddrSpaceResult<(ax::PhysAddr, MappingFlags, PageSize)> {
        done(self.inner.query(VirtAddr::from(vaddr.as_usize()))).map(mapping)
    }
}

/// An address space with one lazily backed area.
pub(crate) struct Space {
    inner: AddrSpace<Table>,
    bytes: u64,
}

impl Space {
    /// An area of `bytes` from guest-physical address 0.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let table = Table {
            inner: page_table_multiarch::table()?,
            next_frame: Cell::new(1 << 40),
        };
        let inner = AddrSpace::new_empty(table, GuestPhysAddr::from(0), bytes as usize)
            .map_err(|error| anyhow!("{error:?}"))?;
        let mut space = Self { inner, bytes };
        space.add_area()?;
        Ok(space)
    }

    fn add_area(&mut self) -> Result<()> {
        self.inner
            .map_alloc(
                GuestPhysAddr::from(0),
                self.bytes as usize,
                MappingFlags::READ | MappingFlags::WRITE | MappingFlags::USER,
                false,
            )
            .map_err(|error| anyhow!("{error:?}"))
    }

    /// Drops every mapping.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.inner
            .unmap(GuestPhysAddr::from(0), self.bytes as usize)
            .map_err(|error| anyhow!("{error:?}"))?;
        self.add_area()
    }

    /// Writes to each of `pages` for the first time: one fault each.
    ///
    /// # Errors
    /// If a fault is not resolved.
    pub(crate) fn fault(&mut self, pages: impl Iterator<Item = u64>) -> Result<()> {
        let mut wrong = 0;
        for page in pages {
            let gpa = GuestPhysAddr::from(page as usize * PAGE);
            let fixed = self.inner.handle_page_fault(gpa, MappingFlags::WRITE);
            wrong += u64::from(!fixed);
        }
        ensure!(wrong == 0, "{wrong} faults were not resolved");
        Ok(())
    }
}
