//! `page_table_multiarch`: x86 tables with four levels over the pool.
//!
//! UNSAFETY: none of its own; the crate reaches tables by the addresses that it is given here.

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use anyhow::{Result, anyhow, bail};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch as ptm;
use twofold_arch::Level;

pub(super) struct Geometry;

impl ptm::PagingMetaData for Geometry {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;

    fn flush_tlb(_: Option<VirtAddr>) {}
}

pub(super) struct Pages;

impl ptm::PagingHandler for Pages {
    fn alloc_frames(count: usize, _align: usize) -> Option<PhysAddr> {
        if count != 1 {
            return None;
        }
        pool::take().map(|page| PhysAddr::from(page as usize))
    }

    fn dealloc_frames(paddr: PhysAddr, _count: usize) {
        pool::give_back(paddr.as_usize() as u64);
    }

    fn phys_to_virt(paddr: PhysAddr) -> VirtAddr {
        VirtAddr::from(paddr.as_usize())
    }
}

pub(super) type Table = ptm::PageTable64<Geometry, X64PTE, Pages>;

/// An empty table.
pub(super) fn table() -> Result<Table> {
    Table::try_new().map_err(|error| anyhow!("{error:?}"))
}

/// `page_table_multiarch` as a [`Mapper`].
pub(crate) struct PageTableMultiarch(Table);

impl PageTableMultiarch {
    pub(crate) fn new() -> Result<Self> {
        table().map(Self)
    }
}

const READ: ptm::MappingFlags = ptm::MappingFlags::READ.union(ptm::MappingFlags::USER);
const START: VirtAddr = VirtAddr::from_usize(0);

impl Mapper for PageTableMultiarch {
    fn name(&self) -> &'static str {
        "page_table_multiarch"
    }

    fn can(&self, work: Work) -> bool {
        // It has no operation that splits.
        work != Work::Split
    }

    fn clear(&mut self) -> Result<()> {
        *self = Self::new()?;
        Ok(())
    }

    fn map(&mut self, bytes: u64, level: Level) -> Result<()> {
        let to = |gpa: VirtAddr| PhysAddr::from(gpa.as_usize() + HOST_BASE as usize);
        let flags = READ | ptm::MappingFlags::WRITE;
        let mut cursor = self.0.cursor();
        if level == Level::L4K {
            return cursor
                .map_region(START, to, bytes as usize, flags, false)
                .map_err(|error| anyhow!("{error:?}"));
        }
        // Its own choice for a whole range would be 1G.
        for gpa in (0..bytes as usize).step_by(Level::L2M.bytes() as usize) {
            let gpa = VirtAddr::from(gpa);
            cursor
                .map(gpa, to(gpa), ptm::PageSize::Size2M, flags)
                .map_err(|error| anyhow!("{error:?}"))?;
        }
        Ok(())
    }

    fn split(&mut self, _bytes: u64) -> Result<()> {
        bail!("no such operation")
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        self.0
            .cursor()
            .protect_region(START, bytes as usize, READ)
            .map_err(|error| anyhow!("{error:?}"))
    }

    fn unmap(&mut self, _bytes: u64) -> Result<()> {
        // `unmap_region` leaves the tables; only dropping everything gives them back.
        self.clear()
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        let (hpa, flags, _) = self.0.query(VirtAddr::from(gpa as usize)).ok()?;
        Some(Found {
            hpa: hpa.as_usize() as u64,
            writable: flags.contains(ptm::MappingFlags::WRITE),
        })
    }
}
