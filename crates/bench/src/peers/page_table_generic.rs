//! `page-table-generic`: tables with four levels and an entry of our own making, over the pool.

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use ::page_table_generic::{
    FrameAllocator, MapConfig, PageTable, PageTableEntry, PhysAddr, TableMeta, VirtAddr,
};
use anyhow::{Result, anyhow};
use twofold_arch::Level;

#[derive(Clone, Copy)]
struct Pages;

impl FrameAllocator for Pages {
    fn alloc_frame(&self) -> Option<PhysAddr> {
        pool::take().map(|page| PhysAddr::from_usize(page as usize))
    }

    fn dealloc_frame(&self, frame: PhysAddr) {
        pool::give_back(frame.as_usize() as u64);
    }

    fn phys_to_virt(&self, paddr: PhysAddr) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(paddr.as_usize())
    }
}

/// An x86 entry.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
struct Entry(u64);

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What a leaf allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Permission {
    write: bool,
}

impl PageTableEntry for Entry {
    type PteConfig = Permission;

    #[inline]
    fn new_page(paddr: PhysAddr, config: Permission, is_huge: bool) -> Self {
        let write = if config.write { WRITE } else { 0 };
        let large = if is_huge { LARGE } else { 0 };
        Self(paddr.as_usize() as u64 | PRESENT | write | large)
    }

    #[inline]
    fn new_table(paddr: PhysAddr) -> Self {
        Self(paddr.as_usize() as u64 | PRESENT | WRITE)
    }

    #[inline]
    fn paddr(&self, _is_dir: bool) -> PhysAddr {
        PhysAddr::from_usize((self.0 & ADDRESS) as usize)
    }

    #[inline]
    fn config(&self, _is_dir: bool) -> Permission {
        Permission {
            write: self.0 & WRITE != 0,
        }
    }

    #[inline]
    fn present(&self) -> bool {
        self.0 & PRESENT != 0
    }

    #[inline]
    fn huge(&self, is_dir: bool) -> bool {
        is_dir && self.0 & LARGE != 0
    }

    #[inline]
    fn unused(&self) -> bool {
        self.0 == 0
    }

    #[inline]
    fn clear(&mut self) {
        self.0 = 0;
    }
}

#[derive(Clone, Copy)]
struct Geometry;

impl TableMeta for Geometry {
    type P = Entry;
    const PAGE_SIZE: usize = 4096;
    const LEVEL_BITS: &[usize] = &[9, 9, 9, 9];
    /// It takes the largest block that fits; the benchmark wants 2M.
    const MAX_BLOCK_LEVEL: usize = 2;

    fn flush(_: Option<VirtAddr>) {}
}

/// `page-table-generic` as a [`Mapper`].
pub(crate) struct PageTableGeneric(PageTable<Geometry, Pages>);

impl PageTableGeneric {
    pub(crate) fn new() -> Result<Self> {
        PageTable::new(Pages)
            .map(Self)
            .map_err(|error| anyhow!("{error}"))
    }
}

impl Mapper for PageTableGeneric {
    fn name(&self) -> &'static str {
        "page-table-generic"
    }

    fn can(&self, _work: Work) -> bool {
        true
    }

    fn clear(&mut self) -> Result<()> {
        *self = Self::new()?;
        Ok(())
    }

    fn map(&mut self, bytes: u64, level: Level) -> Result<()> {
        self.0
            .map(&MapConfig {
                vaddr: VirtAddr::from_usize(0),
                paddr: PhysAddr::from_usize(HOST_BASE as usize),
                size: bytes as usize,
                pte: Permission { write: true },
                allow_huge: level == Level::L2M,
                flush: false,
            })
            .map_err(|error| anyhow!("{error}"))
    }

    fn split(&mut self, bytes: u64) -> Result<()> {
        for gpa in (0..bytes as usize).step_by(Level::L2M.bytes() as usize) {
            self.0
                .split_huge_page(VirtAddr::from_usize(gpa))
                .map_err(|error| anyhow!("{error}"))?;
        }
        Ok(())
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        self.0
            .protect_region(
                VirtAddr::from_usize(0),
                bytes as usize,
                Permission { write: false },
            )
            .map_err(|error| anyhow!("{error}"))
    }

    fn unmap(&mut self, bytes: u64) -> Result<()> {
        self.0
            .unmap(VirtAddr::from_usize(0), bytes as usize)
            .map_err(|error| anyhow!("{error}"))
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        let (hpa, permission, _) = self.0.query(VirtAddr::from_usize(gpa as usize)).ok()?;
        Some(Found {
            hpa: hpa.as_usize() as u64,
            writable: permission.write,
        })
    }
}
