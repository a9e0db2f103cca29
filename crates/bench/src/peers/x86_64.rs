//! `x86_64`: its mapper for tables that are reached at a constant offset, over the pool.
//!
//! UNSAFETY: the crate wants a reference to the root and promises about what is mapped.
#![expect(unsafe_code)]

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use ::x86_64::structures::paging::mapper::{CleanUp, TranslateResult};
use ::x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper as _, OffsetPageTable, Page, PageSize, PageTable,
    PageTableFlags, PhysFrame, Size2MiB, Size4KiB, Translate,
};
use ::x86_64::{PhysAddr, VirtAddr};
use anyhow::{Context, Result, anyhow, bail};
use twofold_arch::Level;

struct Pages;

// SAFETY: a page of the pool belongs to who has taken it.
unsafe impl FrameAllocator<Size4KiB> for Pages {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        pool::take().map(|page| PhysFrame::containing_address(PhysAddr::new(page)))
    }
}

impl FrameDeallocator<Size4KiB> for Pages {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        pool::give_back(frame.start_address().as_u64());
    }
}

const WRITABLE: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE);

/// `x86_64` as a [`Mapper`].
pub(crate) struct X86_64 {
    mapper: OffsetPageTable<'static>,
}

impl X86_64 {
    pub(crate) fn new() -> Result<Self> {
        let root = pool::take().context("a page for the root")?;
        let root = std::ptr::with_exposed_provenance_mut::<PageTable>(root as usize);
        // SAFETY: the page is as large as a table and aligned, belongs to this mapper until it is
        // dropped, and holds integers. Physical addresses of the benchmark are virtual ones, so the
        // offset is 0.
        let mapper = unsafe {
            (*root).zero();
            OffsetPageTable::new(&mut *root, VirtAddr::new(0))
        };
        Ok(Self { mapper })
    }

    fn map_with<S: PageSize + std::fmt::Debug>(&mut self, bytes: u64) -> Result<()>
    where
        OffsetPageTable<'static>: ::x86_64::structures::paging::Mapper<S>,
    {
        for gpa in (0..bytes).step_by(S::SIZE as usize) {
            let page = Page::<S>::containing_address(VirtAddr::new(gpa));
            let frame = PhysFrame::containing_address(PhysAddr::new(HOST_BASE + gpa));
            // SAFETY: no processor uses the table.
            let mapped = unsafe { self.mapper.map_to(page, frame, WRITABLE, &mut Pages) };
            mapped.map_err(|error| anyhow!("{error:?}"))?.ignore();
        }
        Ok(())
    }

    fn free_tables(&mut self) {
        // SAFETY: every table was taken from the pool for this mapper alone.
        unsafe { self.mapper.clean_up(&mut Pages) };
    }
}

impl Drop for X86_64 {
    fn drop(&mut self) {
        // `clean_up` frees tables that are empty, so the leaves have to go first.
        let root = self.mapper.level_4_table_mut();
        let mut tables: Vec<(u64, u8)> = vec![(std::ptr::from_mut(root).addr() as u64, 4)];
        while let Some((page, level)) = tables.pop() {
            if level > 1 {
                let table = std::ptr::with_exposed_provenance::<PageTable>(page as usize);
                // SAFETY: only tables of this mapper are in the list, and nothing changes them.
                let entries = unsafe { &*table }.iter();
                tables.extend(
                    entries
                        .filter(|entry| {
                            entry.flags().contains(PageTableFlags::PRESENT)
                                && !entry.flags().contains(PageTableFlags::HUGE_PAGE)
                        })
                        .map(|entry| (entry.addr().as_u64(), level - 1)),
                );
            }
            pool::give_back(page);
        }
    }
}

impl Mapper for X86_64 {
    fn name(&self) -> &'static str {
        "x86_64"
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
        match level {
            Level::L4K => self.map_with::<Size4KiB>(bytes),
            _ => self.map_with::<Size2MiB>(bytes),
        }
    }

    fn split(&mut self, _bytes: u64) -> Result<()> {
        bail!("no such operation")
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        for gpa in (0..bytes).step_by(4096) {
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(gpa));
            // SAFETY: no processor uses the table.
            let changed = unsafe { self.mapper.update_flags(page, PageTableFlags::PRESENT) };
            changed.map_err(|error| anyhow!("{error:?}"))?.ignore();
        }
        Ok(())
    }

    fn unmap(&mut self, bytes: u64) -> Result<()> {
        for gpa in (0..bytes).step_by(4096) {
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(gpa));
            let (_, flush) = self
                .mapper
                .unmap(page)
                .map_err(|error| anyhow!("{error:?}"))?;
            flush.ignore();
        }
        self.free_tables();
        Ok(())
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        match self.mapper.translate(VirtAddr::new(gpa)) {
            TranslateResult::Mapped {
                frame,
                offset,
                flags,
            } => Some(Found {
                hpa: frame.start_address().as_u64() + offset,
                writable: flags.contains(PageTableFlags::WRITABLE),
            }),
            _ => None,
        }
    }
}
