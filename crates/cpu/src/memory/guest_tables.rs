//! The guest's tables as the walk meets them: read through the second stage, and what is remembered of
//! them between walks.

use super::access::{Datum, Vanished};
use super::stage1::{GuestTables, LinearAccess, Mapping, Upper};
use super::stage2::{GuestAccess, HostPage, Operation, Purpose};
use super::{PAGE_MASK, PAGE_SHIFT};
use crate::core_state::Core;
use crate::trap::Trap;
use twofold_arch::Hpa;

/// Regions of 2 MiB of linear addresses whose last table is remembered.
const DIRECTORIES: usize = 256;
/// log2 of such a region: the last table of every paging mode covers at least that much.
const DIRECTORY_SHIFT: u32 = 21;

/// What the upper levels of the guest's tables say, by 2 MiB of linear addresses: the processor's
/// paging-structure cache.
pub(super) struct Directories(Box<[Option<(u64, Upper)>; DIRECTORIES]>);

impl Directories {
    pub(super) fn new() -> Self {
        Self(Box::new([None; DIRECTORIES]))
    }

    pub(super) fn flush(&mut self) {
        self.0.fill(None);
    }

    fn place(linear: u64) -> (u64, usize) {
        let region = linear >> DIRECTORY_SHIFT;
        (region, region as usize & (DIRECTORIES - 1))
    }

    #[inline(always)]
    fn get(&self, linear: u64) -> Option<Upper> {
        let (region, place) = Self::place(linear);
        match self.0[place] {
            Some((cached, upper)) if cached == region => Some(upper),
            _ => None,
        }
    }

    fn put(&mut self, linear: u64, upper: Upper) {
        let (region, place) = Self::place(linear);
        self.0[place] = Some((region, upper));
    }
}

/// A page of guest tables that was translated.
#[derive(Clone, Copy)]
struct TablePage {
    /// Guest-physical address, or 1.
    gpa: u64,
    host: usize,
    hpa: Hpa,
    writable: bool,
}

impl TablePage {
    /// The entry at `gpa`, which is in this page.
    ///
    /// # Errors
    /// There is no memory at this address of the process.
    #[inline(always)]
    fn read(&self, gpa: u64, bytes: u64) -> Result<u64, usize> {
        let place = self.host + (gpa & !PAGE_MASK) as usize;
        let pointer = std::ptr::with_exposed_provenance::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: the guest's tables are guest memory.
        // SAFETY: the second stage translated the page since the last flush, and the vCPU is in
        // guest mode.
        let value = unsafe {
            if bytes == 4 {
                u32::load(pointer).map(u64::from)
            } else {
                u64::load(pointer)
            }
        };
        value.map_err(|Vanished| place)
    }
}

/// Pages that hold the guest's tables: the walk meets the same ones again and again.
pub(super) struct TablePages(Box<[TablePage; Self::COUNT]>);

impl TablePages {
    const COUNT: usize = 256;
    const EMPTY: TablePage = TablePage {
        gpa: 1,
        host: 0,
        hpa: Hpa::new(0),
        writable: false,
    };

    fn slot(gpa: u64) -> usize {
        // Tables are often neighbours; those of different levels often are not.
        let frame = gpa >> PAGE_SHIFT;
        (frame ^ (frame >> 8)) as usize & (Self::COUNT - 1)
    }

    pub(super) fn new() -> Self {
        Self(Box::new([Self::EMPTY; Self::COUNT]))
    }

    pub(super) fn flush(&mut self) {
        self.0.fill(Self::EMPTY);
    }
}

impl Core {
    /// What the walk finds if it remembers everything above the last table, and nothing has to be
    /// set: most of the time.
    #[inline(always)]
    pub(super) fn known_mapping(&self, linear: u64, access: LinearAccess) -> Option<Mapping> {
        let upper = self.mem.directories.get(linear)?;
        let paging = &self.mem.paging;
        let (gpa, bytes) = paging.last_entry(&upper, linear);
        let page = &self.mem.table_pages.0[TablePages::slot(gpa)];
        if page.gpa != gpa & PAGE_MASK {
            return None;
        }
        let entry = page.read(gpa, bytes).ok()?;
        paging.last_mapping(upper, entry, linear, access)
    }
}

/// The guest's tables, reached through the second stage.
pub(super) struct NestedTables<'a> {
    pub(super) core: &'a mut Core,
    pub(super) linear: u64,
    pub(super) access: LinearAccess,
}

impl NestedTables<'_> {
    /// The page of guest tables that holds `gpa`. `None`: the hypervisor has nothing there.
    fn page(&mut self, gpa: u64, write: bool) -> Result<Option<TablePage>, Trap> {
        let page = gpa & PAGE_MASK;
        let cached = self.core.mem.table_pages.0[TablePages::slot(gpa)];
        if cached.gpa == page && (cached.writable || !write) {
            return Ok(Some(cached));
        }
        if self.core.mem.walker.forbids_code(gpa) {
            return Err(self.core.reserved_address(self.linear, self.access));
        }
        let write = write || self.core.mem.walker.guest_tables_are_written();
        let access = GuestAccess {
            gpa,
            bytes: 1,
            operation: if write {
                Operation::Write
            } else {
                Operation::Read
            },
            linear: self.linear,
            purpose: Purpose::GuestTable,
        };
        match self.core.mem.second_stage(&self.core.machine, &access) {
            Ok(HostPage { hpa, .. }) => {
                let host = self.core.machine.host(hpa);
                let entry = TablePage {
                    gpa: page,
                    host,
                    hpa,
                    writable: write,
                };
                self.core.mem.table_pages.0[TablePages::slot(gpa)] = entry;
                Ok(Some(entry))
            }
            Err(refusal) if refusal.is_fault() && self.core.mem.mmio.allows(gpa) => Ok(None),
            Err(refusal) => Err(self.core.refused(refusal)),
        }
    }
}

impl GuestTables for NestedTables<'_> {
    type Error = Trap;

    #[inline(always)]
    fn recall(&self, linear: u64) -> Option<Upper> {
        self.core.mem.directories.get(linear)
    }

    fn remember(&mut self, linear: u64, upper: Upper) {
        self.core.mem.directories.put(linear, upper);
    }

    fn read(&mut self, gpa: u64, bytes: u64) -> Result<Option<u64>, Trap> {
        let Some(page) = self.page(gpa, false)? else {
            return Ok(None);
        };
        page.read(gpa, bytes)
            .map(Some)
            .map_err(|place| self.core.vanished(place))
    }

    fn set_flags(&mut self, gpa: u64, bytes: u64, old: u64, flags: u64) -> Result<bool, Trap> {
        let Some(page) = self.page(gpa, true)? else {
            return Ok(true);
        };
        let place = page.host + (gpa & !PAGE_MASK) as usize;
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: the guest's tables are guest memory.
        // SAFETY: as for `read`, and the second stage allowed the write.
        let found = unsafe {
            if bytes == 4 {
                u32::compare_exchange(pointer, old as u32, (old | flags) as u32).map(u64::from)
            } else {
                u64::compare_exchange(pointer, old, old | flags)
            }
        };
        match found {
            Ok(found) => {
                if self.core.machine.code().contains(page.hpa) {
                    self.core.code_written(place, bytes as usize);
                }
                Ok(found == old)
            }
            Err(Vanished) => Err(self.core.vanished(place)),
        }
    }
}
