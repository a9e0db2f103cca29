//! `aarch64-paging`: stage-2 tables with four levels that are never active, over the pool.
//!
//! UNSAFETY: the crate's trait for tables has an unsafe method.
#![expect(unsafe_code)]

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use ::aarch64_paging::Mapping;
use ::aarch64_paging::descriptor::{
    Descriptor, PhysicalAddress, Stage2Attributes, UpdatableDescriptor,
};
use ::aarch64_paging::paging::{Constraints, MemoryRegion, PageTable, Stage2, Translation};
use anyhow::{Result, anyhow};
use std::ptr::NonNull;
use twofold_arch::Level;

struct Pages;

type Table = PageTable<Stage2Attributes>;

impl Translation<Stage2Attributes> for Pages {
    fn allocate_table(&mut self) -> (NonNull<Table>, PhysicalAddress) {
        // The crate has no way to say that there is no page; the benchmark reserves enough.
        let page = pool::take().unwrap_or_default() as usize;
        let pointer = std::ptr::with_exposed_provenance_mut::<Table>(page);
        // SAFETY: the page is as large as a table, aligned, and belongs to who has taken it; a null
        // pointer stops here instead of being used.
        let table = unsafe {
            assert!(page != 0, "the pool is empty");
            pointer.write_bytes(0, 1);
            NonNull::new_unchecked(pointer)
        };
        (table, PhysicalAddress(page))
    }

    unsafe fn deallocate_table(&mut self, page_table: NonNull<Table>) {
        pool::give_back(page_table.addr().get() as u64);
    }

    fn physical_to_virtual(&self, pa: PhysicalAddress) -> NonNull<Table> {
        // SAFETY: the crate asks for tables that `allocate_table` returned, which are not null.
        unsafe { NonNull::new_unchecked(std::ptr::with_exposed_provenance_mut(pa.0)) }
    }
}

const READ: Stage2Attributes = Stage2Attributes::VALID
    .union(Stage2Attributes::MEMATTR_NORMAL_INNER_WB)
    .union(Stage2Attributes::MEMATTR_NORMAL_OUTER_WB)
    .union(Stage2Attributes::S2AP_ACCESS_RO)
    .union(Stage2Attributes::SH_INNER)
    .union(Stage2Attributes::ACCESS_FLAG);
const WRITE: Stage2Attributes = Stage2Attributes::S2AP_ACCESS_WO;

/// `aarch64-paging` as a [`Mapper`].
pub(crate) struct Aarch64Paging(Mapping<Pages, Stage2>);

impl Aarch64Paging {
    pub(crate) fn new() -> Self {
        Self(Mapping::new(Pages, 0, Stage2))
    }

    fn map_with(&mut self, bytes: u64, flags: Stage2Attributes, kind: Constraints) -> Result<()> {
        self.0
            .map_range(
                &MemoryRegion::new(0, bytes as usize),
                PhysicalAddress(HOST_BASE as usize),
                flags,
                kind,
            )
            .map_err(|error| anyhow!("{error}"))
    }
}

type Update<'a> =
    &'a dyn Fn(&MemoryRegion, &mut UpdatableDescriptor<'_, Stage2Attributes>) -> Result<(), ()>;

impl Mapper for Aarch64Paging {
    fn name(&self) -> &'static str {
        "aarch64-paging"
    }

    fn can(&self, work: Work) -> bool {
        // It would choose 1G blocks for the benchmark's range, and cannot be told otherwise.
        !matches!(work, Work::Map2M | Work::Split)
    }

    fn clear(&mut self) -> Result<()> {
        *self = Self::new();
        Ok(())
    }

    fn map(&mut self, bytes: u64, level: Level) -> Result<()> {
        let kind = match level {
            Level::L4K => Constraints::NO_BLOCK_MAPPINGS,
            _ => Constraints::empty(),
        };
        self.map_with(bytes, READ | WRITE, kind)
    }

    fn split(&mut self, _bytes: u64) -> Result<()> {
        Err(anyhow!("no such operation"))
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        let protect: Update<'_> = &|_, descriptor| match descriptor.is_table() {
            true => Ok(()),
            false => descriptor.modify_flags(Stage2Attributes::empty(), WRITE),
        };
        self.0
            .modify_range(&MemoryRegion::new(0, bytes as usize), protect)
            .map_err(|error| anyhow!("{error}"))
    }

    fn unmap(&mut self, bytes: u64) -> Result<()> {
        self.map_with(bytes, Stage2Attributes::empty(), Constraints::empty())
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        let page = MemoryRegion::new(gpa as usize, gpa as usize + 1);
        let mut found = None;
        let mut look = |_: &MemoryRegion, entry: &Descriptor<Stage2Attributes>, level: usize| {
            if entry.is_valid() && level == 3 {
                found = Some(Found {
                    hpa: entry.output_address().0 as u64,
                    writable: entry.flags().contains(WRITE),
                });
            }
            Ok(())
        };
        self.0.walk_range(&page, &mut look).ok()?;
        found
    }
}
