//! A guest's stage 2.
//!
//! The guest's state of a page stands in two bits of the leaf that the processor leaves to
//! software. An entry that is absent is no page; a poisoned one is a page that was taken by force.

// UNSAFETY: tables are declared to the engine here, under the guest's lock.
#![expect(unsafe_code)]

use crate::error::Error;
use crate::page::State;
use crate::platform::{Platform, Vmid};
use crate::stack::{Stack, StackSource};
use bitflags::bitflags;
use twofold_arch::stage2::{
    Execute, Geometry, MemoryType, SOFTWARE_SHIFT, Shareability, Stage2Flags,
};
use twofold_arch::{Gfn, Gpa, Hfn, PAGE_SIZE};
use twofold_table::stage2::{Stage2K4, annotated, annotation};
use twofold_table::{
    Cursor, Debt, Entry, Format, Height, Quiesced, RawPages, RootTable, Seen, Table, TablePage,
};

/// The type of an invalid entry of a guest whose page was taken by force.
const POISONED: u8 = 3;

bitflags! {
    /// What a guest may do with a page.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Access: u64 {
        /// Read.
        const READ = 1 << 0;
        /// Write.
        const WRITE = 1 << 1;
        /// Fetch instructions.
        const EXECUTE = 1 << 2;
    }
}

impl Access {
    /// The access that a host asks for. Writing or executing without reading is refused: hardware
    /// could do it, but no user of KVM can ask for it, and a page that its owner cannot read back
    /// serves nobody (SPEC 2.16 P13).
    ///
    /// # Errors
    /// [`Error::Invalid`] for other bits, and for anything without [`Access::READ`].
    pub fn from_host(bits: u64) -> Result<Self, Error> {
        Self::from_bits(bits)
            .filter(|access| access.contains(Self::READ))
            .ok_or(Error::Invalid)
    }

    fn leaf_bits(self) -> u64 {
        let mut bits = 0;
        if self.contains(Self::READ) {
            bits |= Stage2Flags::READ.bits();
        }
        if self.contains(Self::WRITE) {
            bits |= Stage2Flags::WRITE.bits();
        }
        if !self.contains(Self::EXECUTE) {
            bits |= Execute::None.bits();
        }
        bits
    }
}

/// Pages in a block.
pub const BLOCK_PAGES: u64 = 512;
const BLOCK: Height = Height::new(2);

/// What a guest has at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestPage {
    /// Nothing.
    Absent,
    /// A page that was taken by force.
    Poisoned,
    /// A page, or a part of a block.
    Mapped {
        /// The page itself, or the block's first.
        page: Hfn,
        /// Pages mapped by the leaf: 1 or [`BLOCK_PAGES`].
        pages: u64,
        /// The guest's state.
        state: State,
    },
}

/// A page or block that a guest is to have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) gfn: Gfn,
    pub(crate) page: Hfn,
    /// 1 or [`BLOCK_PAGES`].
    pub(crate) pages: u64,
    pub(crate) access: Access,
    pub(crate) state: State,
}

/// A guest's table; behind the guest's lock.
#[derive(Debug)]
pub(crate) struct Guest {
    root: RootTable,
    geometry: Geometry,
    vmid: Vmid,
    /// Tables that are not in use.
    spare: Stack,
    /// Pages that the guest has or borrows.
    mapped: u64,
}

fn leaf(page: Hfn, height: Height, access: Access, state: State) -> u64 {
    let attributes = MemoryType::Normal.bits()
        | Shareability::Inner.bits()
        | Stage2Flags::ACCESSED.bits()
        | access.leaf_bits()
        | (state as u64) << SOFTWARE_SHIFT;
    Stage2K4::leaf(page.address(), height, attributes)
}

fn state_of(leaf: u64) -> State {
    State::from_bits((leaf >> SOFTWARE_SHIFT) as u8)
}

impl Guest {
    /// An empty table whose root is `root`, zeroed pages that the hypervisor owns: as many as
    /// `geometry` says, aligned to their size.
    pub(crate) fn new(root: Hfn, geometry: Geometry, vmid: Vmid) -> Self {
        Self {
            root: RootTable {
                // SAFETY: the pages are the hypervisor's until the VM is torn down.
                page: unsafe { TablePage::assume(root.address()) },
                height: Stage2K4::height(geometry.start_level),
                pages: geometry.root_pages as usize,
            },
            geometry,
            vmid,
            spare: Stack::new(),
            mapped: 0,
        }
    }

    pub(crate) fn root(&self) -> Hfn {
        self.root.page.hpa().frame()
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn mapped(&self) -> u64 {
        self.mapped
    }

    fn table<'s, P: Platform>(&self, storage: &'s RawPages<P>) -> Table<'s, Stage2K4, RawPages<P>> {
        // SAFETY: tables are taken out only under the guest's lock, which the caller holds.
        unsafe { Table::new(storage, self.root) }
    }

    /// The address of the first of `pages` frames of the guest.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one is beyond the guest's addresses.
    pub(crate) fn gpa(&self, gfn: Gfn, pages: u64) -> Result<Gpa, Error> {
        let last = gfn.get().checked_add(pages).ok_or(Error::Invalid)?;
        if last > 1 << (self.geometry.ipa_bits - 12) {
            return Err(Error::Invalid);
        }
        Ok(gfn.address())
    }

    fn describe(seen: Seen) -> GuestPage {
        match seen.entry::<Stage2K4>() {
            Entry::Leaf => GuestPage::Mapped {
                page: Stage2K4::leaf_address(seen.value(), seen.place().height()).frame(),
                pages: Stage2K4::bytes(seen.place().height()) / PAGE_SIZE,
                state: state_of(seen.value()),
            },
            Entry::Special if matches!(annotated(seen.value()), Some((POISONED, _))) => {
                GuestPage::Poisoned
            }
            _ => GuestPage::Absent,
        }
    }

    /// What the guest has at a frame.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the frame is beyond the guest's addresses.
    pub(crate) fn look<P: Platform>(
        &self,
        storage: &RawPages<P>,
        gfn: Gfn,
    ) -> Result<GuestPage, Error> {
        let gpa = self.gpa(gfn, 1)?;
        Ok(Self::describe(
            self.table(storage).lookup(gpa, Height::LEAF),
        ))
    }

    /// The single page that the guest has at a frame, with its state.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none, [`Error::Poisoned`], [`Error::TooBig`] for a block.
    pub(crate) fn page<P: Platform>(
        &self,
        storage: &RawPages<P>,
        gfn: Gfn,
    ) -> Result<(Hfn, State), Error> {
        match self.look(storage, gfn)? {
            GuestPage::Absent => Err(Error::NotFound),
            GuestPage::Poisoned => Err(Error::Poisoned),
            GuestPage::Mapped {
                pages: 1,
                page,
                state,
            } => Ok((page, state)),
            GuestPage::Mapped { .. } => Err(Error::TooBig),
        }
    }

    /// Whether `pages` frames, one or an aligned block, are all absent.
    ///
    /// # Errors
    /// [`Error::Invalid`] beyond the guest's addresses; [`Error::NotPermitted`] if something is
    /// there, poison included.
    pub(crate) fn check_absent<P: Platform>(
        &self,
        storage: &RawPages<P>,
        gfn: Gfn,
        pages: u64,
    ) -> Result<(), Error> {
        let gpa = self.gpa(gfn, pages)?;
        let end = Gpa::new(gpa.get() + pages * PAGE_SIZE);
        let mut cursor = Cursor::new(self.table(storage), gpa..end);
        while let Some(seen) = cursor.next() {
            if !matches!(seen.entry::<Stage2K4>(), Entry::Empty | Entry::Table(_)) {
                return Err(Error::NotPermitted);
            }
        }
        Ok(())
    }

    /// Maps one page or one block where nothing is mapped. Tables come from `tables`.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if they do not suffice; nothing has changed then.
    pub(crate) fn map<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        mapping: Mapping,
        tables: &mut Stack,
    ) -> Result<(), Error> {
        let Mapping {
            gfn,
            page,
            pages,
            access,
            state,
        } = mapping;
        let gpa = self.gpa(gfn, pages)?;
        let target = if pages == 1 { Height::LEAF } else { BLOCK };
        let table = self.table(storage);
        let seen = table.lookup(gpa, target);
        let new = leaf(page, target, access, state);
        let platform = &storage.0;
        if access.contains(Access::EXECUTE) {
            for offset in 0..pages {
                platform.sync_instructions(Hfn::new(page.get() + offset));
            }
        }
        let vmid = self.vmid;
        let mut debt = Debt::none();
        if seen.place().height() == target {
            // An empty entry, or for a block a table with nothing in it.
            table
                .set(
                    seen,
                    new,
                    |range| platform.invalidate(vmid, range),
                    &mut debt,
                )
                .map_err(|_| Error::Again)?;
            self.settle(storage, debt);
        } else {
            let mut source = StackSource {
                stack: tables,
                platform,
            };
            table
                .link_leaf(seen, gpa, target, new, &mut source)
                .map_err(|_| Error::NoMemory)?;
            let _ = debt.settle(|_| {});
        }
        self.mapped += pages;
        Ok(())
    }

    fn settle<P: Platform>(&mut self, storage: &RawPages<P>, debt: Debt<Stage2K4>) {
        let (platform, vmid) = (&storage.0, self.vmid);
        let settled = debt.settle(|range| platform.invalidate(vmid, range));
        // SAFETY: walkers of the guest's table hold the guest's lock, which the caller has.
        let alone = unsafe { Quiesced::exclusive() };
        let spare = &mut self.spare;
        let _ = settled.reclaim(&alone, storage, |page| {
            platform.wipe(page.hpa().frame());
            spare.push(platform, page.hpa().frame());
        });
    }

    fn replace<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        change: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Error> {
        let gpa = self.gpa(gfn, 1)?;
        let table = self.table(storage);
        let seen = table.lookup(gpa, Height::LEAF);
        if seen.entry::<Stage2K4>() != Entry::Leaf {
            return Err(Error::Again);
        }
        let new = change(seen.value());
        if new == seen.value() {
            return Ok(0);
        }
        let (platform, vmid) = (&storage.0, self.vmid);
        let mut debt = Debt::none();
        table
            .set(
                seen,
                new,
                |range| platform.invalidate(vmid, range),
                &mut debt,
            )
            .map_err(|_| Error::Again)?;
        self.settle(storage, debt);
        Ok(Stage2K4::bytes(seen.place().height()) / PAGE_SIZE)
    }

    /// Changes the state of a page that is there.
    pub(crate) fn set_state<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        state: State,
    ) -> Result<(), Error> {
        self.replace(storage, gfn, |old| {
            old & !(3 << SOFTWARE_SHIFT) | (state as u64) << SOFTWARE_SHIFT
        })
        .map(|_| ())
    }

    /// Unmaps the leaf at a frame; no processor uses it any more afterwards.
    pub(crate) fn unmap<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
    ) -> Result<(), Error> {
        let pages = self.replace(storage, gfn, |_| Stage2K4::EMPTY)?;
        self.mapped -= pages;
        Ok(())
    }

    /// Unmaps a page and notes that it was taken by force.
    pub(crate) fn poison<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
    ) -> Result<(), Error> {
        let poison = annotation(POISONED, 0).ok_or(Error::Invalid)?;
        let pages = self.replace(storage, gfn, |_| poison)?;
        self.mapped -= pages;
        Ok(())
    }

    /// Gives a leaf more access.
    ///
    /// # Errors
    /// [`Error::Again`] if the leaf has vanished.
    pub(crate) fn relax<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        access: Access,
    ) -> Result<(), Error> {
        if access.contains(Access::EXECUTE)
            && let GuestPage::Mapped { page, pages, .. } = self.look(storage, gfn)?
        {
            for offset in 0..pages {
                storage.0.sync_instructions(Hfn::new(page.get() + offset));
            }
        }
        self.replace(storage, gfn, |old| {
            let mut new = old | access.leaf_bits() & !Execute::None.bits();
            if access.contains(Access::EXECUTE) {
                new &= !Stage2Flags::EXECUTE_NEVER.bits();
            }
            new | Stage2Flags::ACCESSED.bits()
        })
        .map(|_| ())
    }

    /// Marks a leaf used.
    pub(crate) fn make_young<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
    ) -> Result<(), Error> {
        self.replace(storage, gfn, |old| old | Stage2Flags::ACCESSED.bits())
            .map(|_| ())
    }

    /// Takes write access from every leaf of a range.
    pub(crate) fn write_protect<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        pages: u64,
    ) -> Result<(), Error> {
        self.for_each_leaf(storage, gfn, pages, |old| old & !Stage2Flags::WRITE.bits())
            .map(|_| ())
    }

    /// Whether a leaf of the range was used; forgets it if `clear`.
    pub(crate) fn test_clear_young<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        pages: u64,
        clear: bool,
    ) -> Result<bool, Error> {
        let mut young = false;
        self.for_each_leaf(storage, gfn, pages, |old| {
            young |= old & Stage2Flags::ACCESSED.bits() != 0;
            if clear {
                old & !Stage2Flags::ACCESSED.bits()
            } else {
                old
            }
        })?;
        Ok(young)
    }

    /// Changes attributes of every leaf in a range.
    fn for_each_leaf<P: Platform>(
        &mut self,
        storage: &RawPages<P>,
        gfn: Gfn,
        pages: u64,
        mut change: impl FnMut(u64) -> u64,
    ) -> Result<(), Error> {
        if pages == 0 {
            return Err(Error::Invalid);
        }
        let gpa = self.gpa(gfn, pages)?;
        let end = Gpa::new(gpa.get() + pages * PAGE_SIZE);
        let (platform, vmid) = (&storage.0, self.vmid);
        let mut debt = Debt::none();
        let table = self.table(storage);
        let mut cursor = Cursor::new(table, gpa..end);
        while let Some(seen) = cursor.next() {
            if seen.entry::<Stage2K4>() != Entry::Leaf {
                continue;
            }
            let new = change(seen.value());
            if new != seen.value() {
                table
                    .set(
                        seen,
                        new,
                        |range| platform.invalidate(vmid, range),
                        &mut debt,
                    )
                    .map_err(|_| Error::Again)?;
            }
        }
        self.settle(storage, debt);
        Ok(())
    }

    /// Calls `visit` with every page that the guest has or borrows: frame, page and state.
    pub(crate) fn for_each_page<P: Platform>(
        &self,
        storage: &RawPages<P>,
        mut visit: impl FnMut(Gfn, Hfn, State),
    ) {
        let end = Gpa::new(1 << self.geometry.ipa_bits);
        let mut cursor = Cursor::new(self.table(storage), Gpa::new(0)..end);
        while let Some(seen) = cursor.next() {
            if let GuestPage::Mapped { page, pages, state } = Self::describe(seen) {
                for offset in 0..pages {
                    let gfn = Gfn::new(seen.place().gpa().frame().get() + offset);
                    visit(gfn, Hfn::new(page.get() + offset), state);
                }
            }
        }
    }

    /// Takes the whole table apart: every table below the root, and every spare one, goes to
    /// `give`, not yet wiped; the root's pages too. Nothing may be mapped.
    pub(crate) fn dissolve<P: Platform>(
        mut self,
        storage: &RawPages<P>,
        mut give: impl FnMut(Hfn),
    ) {
        let platform = &storage.0;
        let mut debt = Debt::none();
        self.table(storage).retire_root(&mut debt);
        let settled = debt.settle(|_| platform.invalidate_all(self.vmid));
        // SAFETY: the VM is dying and no vCPU of it is loaded.
        let alone = unsafe { Quiesced::exclusive() };
        let _ = settled.reclaim(&alone, storage, |page| give(page.hpa().frame()));
        while let Some(page) = self.spare.pop(platform) {
            give(page);
        }
    }
}
