//! The host's stage 2: every address is itself, built where the host touches it.
//!
//! An entry that is empty may be built at any time. An annotated entry says who has the page, and
//! the host may not touch it. Memory is normal memory and may be executed; everything else is a
//! device and may not.

// UNSAFETY: tables are declared to the engine here, under the host's lock.
#![expect(unsafe_code)]

use crate::error::Error;
use crate::page::{PageMap, Pages};
use crate::platform::{Platform, Vmid};
use crate::pool::{Pool, Reach};
use twofold_arch::stage2::{Execute, Geometry, MemoryType, Shareability, Stage2Flags};
use twofold_arch::{Gpa, Hfn, Hpa};
use twofold_table::stage2::{Stage2K4, annotated, annotation};
use twofold_table::{
    Cursor, Debt, Entry, Format, Height, PageSource, Quiesced, RawPages, RootTable, Seen, Table,
    TablePage,
};

/// The type of an invalid entry that says who has the page.
pub(crate) const DONATED: u8 = 2;

/// Who has a page that the host has given away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The hypervisor.
    Hyp,
    /// A guest.
    Guest {
        /// The VM's handle.
        handle: u16,
        /// The guest's frame, below 2^40.
        gfn: u64,
    },
}

impl Owner {
    /// The invalid entry that stands for it: the party in bits 3:1, what it adds above bit 3.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the frame number does not fit.
    pub fn entry(self) -> Result<u64, Error> {
        let payload = match self {
            Self::Hyp => 1 << 1,
            Self::Guest { handle, gfn } => {
                if gfn >> 40 != 0 {
                    return Err(Error::Invalid);
                }
                2 << 1 | (u64::from(handle) | gfn << 16) << 4
            }
        };
        annotation(DONATED, payload).ok_or(Error::Invalid)
    }

    /// Whom an entry stands for.
    pub fn of_entry(entry: u64) -> Option<Self> {
        let (DONATED, payload) = annotated(entry)? else {
            return None;
        };
        let extra = payload >> 4;
        match payload >> 1 & 7 {
            1 if extra == 0 => Some(Self::Hyp),
            2 => Some(Self::Guest {
                handle: extra as u16,
                gfn: extra >> 16,
            }),
            _ => None,
        }
    }
}

/// What became of an access that the host's stage 2 stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostFault {
    /// It is mapped now; the host tries again.
    Mapped {
        /// Bytes of the mapping.
        bytes: u64,
    },
    /// It was mapped already, by another processor.
    Spurious,
    /// The page is not the host's. The host is to get an abort.
    Denied,
}

pub(crate) type HostTable<'s, P> = Table<'s, Stage2K4, RawPages<P>>;

/// The host's table and the pool that it is built from; behind the host's lock.
#[derive(Debug)]
pub(crate) struct Host {
    root: RootTable,
    /// The first address that the processors do not have.
    end: u64,
    pool: Pool,
    /// How often every device mapping was given up for its tables.
    recycled: u64,
}

/// Everything the operations below need beside the host itself.
pub(crate) struct Env<'a, 'm, P> {
    pub(crate) storage: &'a RawPages<P>,
    pub(crate) pages: &'a PageMap<'m>,
}

impl<'a, 'm, P: Platform> Env<'a, 'm, P> {
    fn platform(&self) -> &'a P {
        &self.storage.0
    }

    fn reach(&self) -> Reach<'a, 'm, P> {
        Reach {
            platform: self.platform(),
            pages: self.pages,
        }
    }
}

struct PoolSource<'a, 'm, P> {
    pool: &'a mut Pool,
    reach: Reach<'a, 'm, P>,
}

impl<P: Platform> PageSource for PoolSource<'_, '_, P> {
    fn take(&mut self) -> Option<TablePage> {
        let page = self.pool.allocate(self.reach, 0)?;
        // SAFETY: the pool's pages are the hypervisor's for ever; this one is in use until it is
        // given back.
        Some(unsafe { TablePage::assume(page.address()) })
    }

    fn give_back(&mut self, page: TablePage) {
        self.pool.free(self.reach, page.hpa().frame());
    }
}

const MEMORY: u64 = Stage2Flags::READ
    .union(Stage2Flags::WRITE)
    .union(Stage2Flags::ACCESSED)
    .bits()
    | MemoryType::Normal.bits()
    | Shareability::Inner.bits();

const DEVICE: u64 = Stage2Flags::READ
    .union(Stage2Flags::WRITE)
    .union(Stage2Flags::ACCESSED)
    .bits()
    | MemoryType::Device.bits()
    | Execute::None.bits();

/// Tables below an entry at `height` that the pages from `first` to `last`, all of which the entry
/// covers, need to have entries of their own.
fn tables_between(first: u64, last: u64, height: Height) -> u64 {
    (2..=height.get())
        .map(|number| {
            let shift = Stage2K4::shift(Height::new(number)) - 12;
            (last >> shift) - (first >> shift) + 1
        })
        .sum()
}

/// Pages of a pool that suffice for the host's table with an entry for every page of memory: with
/// them, and after the device mappings are given up, no change can fail for want of a table.
fn pages_for_memory(pages: &PageMap<'_>, geometry: Geometry) -> u64 {
    let root = Stage2K4::height(geometry.start_level);
    let tables: u64 = pages
        .regions()
        .iter()
        .map(|region| {
            let first = region.start.get();
            tables_between(first, first + (region.pages - 1), root)
        })
        .sum();
    // One path beside it, for the device that is being touched.
    tables
        + u64::from(geometry.tables_per_page())
        + u64::from(geometry.root_pages.next_power_of_two())
}

impl Host {
    /// An empty table for `geometry` from `pool`; `None` if the pool is too small for all memory.
    pub(crate) fn new<P: Platform>(
        env: &Env<'_, '_, P>,
        geometry: Geometry,
        mut pool: Pool,
    ) -> Option<Self> {
        if pool.free_pages() < pages_for_memory(env.pages, geometry) {
            return None;
        }
        let order = geometry.root_pages.next_power_of_two().ilog2() as usize;
        let page = pool.allocate(env.reach(), order)?;
        // SAFETY: as in `PoolSource`; the root is never given back.
        let page = unsafe { TablePage::assume(page.address()) };
        Some(Self {
            root: RootTable {
                page,
                height: Stage2K4::height(geometry.start_level),
                pages: geometry.root_pages as usize,
            },
            end: 1 << geometry.ipa_bits,
            pool,
            recycled: 0,
        })
    }

    pub(crate) fn root(&self) -> RootTable {
        self.root
    }

    pub(crate) fn free_pages(&self) -> u64 {
        self.pool.free_pages()
    }

    pub(crate) fn recycled(&self) -> u64 {
        self.recycled
    }

    fn table<'a, P: Platform>(&self, env: &Env<'a, '_, P>) -> HostTable<'a, P> {
        // SAFETY: tables are given back only under the host's lock, which the caller holds.
        unsafe { Table::new(env.storage, self.root) }
    }

    /// The entry that decides about a page.
    pub(crate) fn look<P: Platform>(&self, env: &Env<'_, '_, P>, page: Hfn) -> Option<Seen> {
        let gpa = Gpa::new(page.address().get());
        (gpa.get() < self.end).then(|| self.table(env).lookup(gpa, Height::LEAF))
    }

    /// Who has a page, if it is not the host.
    pub(crate) fn owner<P: Platform>(&self, env: &Env<'_, '_, P>, page: Hfn) -> Option<Owner> {
        Owner::of_entry(self.look(env, page)?.value())
    }

    /// Pages for the tables that are missing between the host's table and an entry for each page.
    fn missing_tables<P: Platform>(&self, env: &Env<'_, '_, P>, pages: Pages) -> u64 {
        let end = pages.start.get() + pages.count;
        let mut position = pages.start.get();
        let mut missing = 0;
        while position < end {
            let Some(seen) = self.look(env, Hfn::new(position)) else {
                break;
            };
            let height = seen.place().height();
            let covered = Stage2K4::bytes(height) >> 12;
            let last = (position | (covered - 1)).min(end - 1);
            missing += tables_between(position, last, height);
            position = last + 1;
        }
        missing
    }

    /// Makes sure that the tables for changing `pages` are there, so that the change cannot fail.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if even giving up the device mappings does not free enough.
    pub(crate) fn reserve<P: Platform>(
        &mut self,
        env: &Env<'_, '_, P>,
        pages: Pages,
    ) -> Result<(), Error> {
        let needed = self.missing_tables(env, pages);
        if self.pool.free_pages() < needed {
            self.recycle(env);
        }
        if self.pool.free_pages() < needed {
            return Err(Error::NoMemory);
        }
        Ok(())
    }

    /// Writes an entry for one page; `neighbours` says what stays around it. The tables have been
    /// reserved.
    fn write_page<P: Platform>(&mut self, env: &Env<'_, '_, P>, page: Hfn, value: u64) {
        let gpa = Gpa::new(page.address().get());
        let table = self.table(env);
        let seen = table.lookup(gpa, Height::LEAF);
        let around = seen.value();
        let block = seen.entry::<Stage2K4>() == Entry::Leaf;
        let attributes = Stage2K4::attributes(around);
        let mut debt = Debt::none();
        let mut source = PoolSource {
            pool: &mut self.pool,
            reach: env.reach(),
        };
        let result = table.set_below(
            seen,
            gpa,
            Height::LEAF,
            value,
            |at: Gpa, height| {
                if block {
                    Stage2K4::leaf(Hpa::new(at.get()), height, attributes)
                } else {
                    Stage2K4::EMPTY
                }
            },
            &mut source,
            |range| env.platform().invalidate(Vmid::HOST, range),
            &mut debt,
        );
        assert!(
            result.is_ok(),
            "the host's tables were reserved and are locked"
        );
        self.settle(env, debt);
    }

    fn settle<P: Platform>(&mut self, env: &Env<'_, '_, P>, debt: Debt<Stage2K4>) {
        let settled = debt.settle(|range| env.platform().invalidate(Vmid::HOST, range));
        // SAFETY: walkers of the host's table hold the host's lock, which the caller has.
        let alone = unsafe { Quiesced::exclusive() };
        let (pool, reach) = (&mut self.pool, env.reach());
        let _ = settled.reclaim(&alone, env.storage, |page| {
            pool.free(reach, page.hpa().frame());
        });
    }

    /// Takes pages from the host's stage 2 and notes who has them. The tables have been reserved.
    pub(crate) fn give_away<P: Platform>(
        &mut self,
        env: &Env<'_, '_, P>,
        pages: Pages,
        owner: Owner,
    ) -> Result<(), Error> {
        // For a guest there is only ever one page, since the frame is part of the note.
        let entry = owner.entry()?;
        for page in pages.iter() {
            self.write_page(env, page, entry);
        }
        Ok(())
    }

    /// Maps pages for the host again.
    pub(crate) fn take_back<P: Platform>(&mut self, env: &Env<'_, '_, P>, pages: Pages) {
        for page in pages.iter() {
            let leaf = Stage2K4::leaf(page.address(), Height::LEAF, MEMORY);
            self.write_page(env, page, leaf);
        }
    }

    /// Builds what an access of the host to `address` needs.
    pub(crate) fn fault<P: Platform>(&mut self, env: &Env<'_, '_, P>, address: Hpa) -> HostFault {
        let page = address.frame();
        let memory = env.pages.is_memory(page);
        // Memory that nobody may map has a record, and is no device either.
        if !memory && env.pages.record(page).is_some() {
            return HostFault::Denied;
        }
        let Some(seen) = self.look(env, page) else {
            return HostFault::Denied;
        };
        match seen.entry::<Stage2K4>() {
            Entry::Leaf => return HostFault::Spurious,
            Entry::Special => return HostFault::Denied,
            Entry::Empty | Entry::Frozen | Entry::Table(_) => {}
        }
        match self.map_around(env, address, seen, memory) {
            Some(fault) => fault,
            None => {
                self.recycle(env);
                let Some(seen) = self.look(env, page) else {
                    return HostFault::Denied;
                };
                self.map_around(env, address, seen, memory)
                    .unwrap_or(HostFault::Denied)
            }
        }
    }

    /// Maps the largest block around `address` that fits into the empty entry `seen` and is all
    /// memory of one region, or all device. `None` if there is no page for a table.
    fn map_around<P: Platform>(
        &mut self,
        env: &Env<'_, '_, P>,
        address: Hpa,
        seen: Seen,
        memory: bool,
    ) -> Option<HostFault> {
        let page = address.frame();
        let mut target = seen.place().height();
        while target > Height::LEAF {
            let pages = Stage2K4::bytes(target) >> 12;
            if Stage2K4::may_map(target) && env.pages.is_uniform(page, pages) {
                break;
            }
            target = target.below()?;
        }
        let bytes = Stage2K4::bytes(target);
        let start = Hpa::new(address.get() & !(bytes - 1));
        let attributes = if memory { MEMORY } else { DEVICE };
        let table = self.table(env);
        let mut source = PoolSource {
            pool: &mut self.pool,
            reach: env.reach(),
        };
        table
            .link_leaf(
                seen,
                Gpa::new(start.get()),
                target,
                Stage2K4::leaf(start, target, attributes),
                &mut source,
            )
            .ok()
            .map(|_| HostFault::Mapped { bytes })
    }

    /// Gives up every mapping of a device, with the tables that hold nothing else; they are built
    /// again when they are touched.
    fn recycle<P: Platform>(&mut self, env: &Env<'_, '_, P>) {
        let table = self.table(env);
        let mut debt = Debt::none();
        let mut cursor = Cursor::new(table, Gpa::new(0)..Gpa::new(self.end));
        while let Some(seen) = cursor.next() {
            let page = Hpa::new(seen.place().gpa().get()).frame();
            let pages = Stage2K4::bytes(seen.place().height()) >> 12;
            let entry = seen.entry::<Stage2K4>();
            if !matches!(entry, Entry::Leaf | Entry::Table(_))
                || env.pages.record(page).is_some()
                || !env.pages.is_uniform(page, pages)
            {
                continue;
            }
            if matches!(entry, Entry::Table(_)) {
                cursor.skip();
            }
            let result = table.set(
                seen,
                Stage2K4::EMPTY,
                |range| env.platform().invalidate(Vmid::HOST, range),
                &mut debt,
            );
            debug_assert!(result.is_ok(), "the host's table is locked");
        }
        self.settle(env, debt);
        self.recycled += 1;
    }
}
