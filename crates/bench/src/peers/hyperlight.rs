//! `hyperlight-common`: the page tables that Hyperlight gives its guests, over the pool. Not made
//! to be shared between threads, and never frees a table.
//!
//! UNSAFETY: the crate's operations are unsafe traits and functions on table memory.
#![expect(unsafe_code)]

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use anyhow::{Context, Result, bail};
use hyperlight_common::vmem::{
    BasicMapping, Mapping, MappingKind, MayNotMoveTable, PageTableEntry, PhysAddr, TableOps,
    TableReadOps, Void, map, modify_mapping, virt_to_phys,
};
use std::cell::RefCell;
use twofold_arch::Level;

/// The tables, and which pages they are.
struct Tables {
    root: u64,
    taken: RefCell<Vec<u64>>,
}

impl Tables {
    fn zeroed(&self) -> Option<u64> {
        let page = pool::take()?;
        let pointer = std::ptr::with_exposed_provenance_mut::<[u64; 512]>(page as usize);
        // SAFETY: a page of the pool belongs to who has taken it.
        unsafe { pointer.write_bytes(0, 1) };
        self.taken.borrow_mut().push(page);
        Some(page)
    }
}

impl AsRef<Self> for Tables {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl TableReadOps for Tables {
    type TableAddr = u64;

    #[inline(always)]
    fn entry_addr(addr: u64, entry_offset: u64) -> u64 {
        addr + entry_offset
    }

    #[inline(always)]
    unsafe fn read_entry(&self, addr: u64) -> PageTableEntry {
        let entry = std::ptr::with_exposed_provenance::<u64>(addr as usize);
        // SAFETY: the crate asks for entries of tables that `alloc_table` returned.
        unsafe { entry.read() }
    }

    #[inline(always)]
    fn to_phys(addr: u64) -> PhysAddr {
        addr
    }

    #[inline(always)]
    fn from_phys(addr: PhysAddr) -> u64 {
        addr
    }

    #[inline(always)]
    fn root_table(&self) -> u64 {
        self.root
    }
}

impl TableOps for Tables {
    type TableMovability = MayNotMoveTable;

    unsafe fn alloc_table(&self) -> u64 {
        // The crate has no way to say that there is no page; the benchmark reserves enough.
        let page = self.zeroed().unwrap_or_default();
        assert!(page != 0, "the pool is empty");
        page
    }

    #[inline(always)]
    unsafe fn write_entry(&self, addr: u64, entry: PageTableEntry) -> Option<Void> {
        let place = std::ptr::with_exposed_provenance_mut::<u64>(addr as usize);
        // SAFETY: the crate writes to entries of tables that `alloc_table` returned.
        unsafe { place.write(entry) };
        None
    }

    unsafe fn update_root(&self, new_root: Void) {
        match new_root {}
    }
}

/// `hyperlight-common` as a [`Mapper`].
pub(crate) struct Hyperlight(Tables);

impl Hyperlight {
    pub(crate) fn new() -> Result<Self> {
        let mut tables = Tables {
            root: 0,
            taken: RefCell::default(),
        };
        tables.root = tables.zeroed().context("a page for the root")?;
        Ok(Self(tables))
    }
}

impl Drop for Hyperlight {
    fn drop(&mut self) {
        for page in self.0.taken.take() {
            pool::give_back(page);
        }
    }
}

impl Mapper for Hyperlight {
    fn name(&self) -> &'static str {
        "hyperlight-common"
    }

    fn can(&self, work: Work) -> bool {
        // It knows only 4K pages and frees nothing.
        matches!(work, Work::Map4K | Work::WriteProtect)
    }

    fn clear(&mut self) -> Result<()> {
        *self = Self::new()?;
        Ok(())
    }

    fn map(&mut self, bytes: u64, _level: Level) -> Result<()> {
        let mapping = Mapping {
            phys_base: HOST_BASE,
            virt_base: 0,
            len: bytes,
            kind: MappingKind::Basic(BasicMapping {
                readable: true,
                writable: true,
                executable: true,
            }),
        };
        // SAFETY: nobody else uses the tables.
        unsafe { map(&self.0, mapping) };
        Ok(())
    }

    fn split(&mut self, _bytes: u64) -> Result<()> {
        bail!("no such operation")
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        let read_only = |_, mapping: Mapping| match mapping.kind {
            MappingKind::Basic(basic) => MappingKind::Basic(BasicMapping {
                writable: false,
                ..basic
            }),
            other => other,
        };
        // SAFETY: nobody else uses the tables.
        unsafe { modify_mapping(&self.0, 0, bytes, read_only) };
        Ok(())
    }

    fn unmap(&mut self, _bytes: u64) -> Result<()> {
        bail!("no such operation")
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        // SAFETY: nobody changes the tables meanwhile.
        let mapping = unsafe { virt_to_phys::<Tables>(&self.0, gpa, 1) }.next()?;
        Some(Found {
            hpa: mapping.phys_base,
            writable: matches!(mapping.kind, MappingKind::Basic(basic) if basic.writable),
        })
    }
}
