//! Who has a page, and how that changes.
//!
//! Every transition takes the locks of both parties, checks both over the whole range, makes sure
//! of the tables it needs, and only then changes anything; from there on nothing can fail (SPEC
//! 2.4, 2.5).

use crate::error::Error;
use crate::guest::{Access, BLOCK_PAGES, Guest, GuestPage, Mapping};
use crate::host_table::Owner;
use crate::hypervisor::Hypervisor;
use crate::page::{PageRecord, Pages, State};
use crate::platform::Platform;
use crate::stack::Stack;
use crate::vm::{Handle, Vm};
use twofold_arch::{Gfn, Hfn};

/// Checks what the host and the hypervisor know of every page.
fn expect(records: &[PageRecord], host: State, hyp: State) -> Result<(), Error> {
    if records
        .iter()
        .all(|record| record.host() == host && record.hyp() == hyp)
    {
        Ok(())
    } else {
        Err(Error::NotPermitted)
    }
}

/// Whether the host has the page and nobody else knows it.
fn is_hosts_own(record: &PageRecord) -> bool {
    record.host() == State::Owned && record.hyp() == State::NoPage
}

impl<P: Platform> Hypervisor<'_, P> {
    /// The host lends a page to the hypervisor, which maps it only while it is pinned.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] unless the page is the host's alone.
    pub fn host_share_hyp(&self, page: Hfn) -> Result<(), Error> {
        let records = self.pages.range(Pages::one(page))?;
        let _host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::Owned, State::NoPage)?;
        for record in records {
            record.set_host(State::SharedOwned);
            record.set_hyp(State::SharedBorrowed);
        }
        Ok(())
    }

    /// The host takes a page back that it had lent to the hypervisor.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] if it had not; [`Error::Busy`] while the page is pinned.
    pub fn host_unshare_hyp(&self, page: Hfn) -> Result<(), Error> {
        let records = self.pages.range(Pages::one(page))?;
        let _host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::SharedOwned, State::SharedBorrowed)?;
        if records.iter().any(|record| record.count() != 0) {
            return Err(Error::Busy);
        }
        for record in records {
            record.set_host(State::Owned);
            record.set_hyp(State::NoPage);
        }
        Ok(())
    }

    /// Keeps a page that the host has lent to the hypervisor from being taken back, and maps it at
    /// EL2 with the first pin.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] if the page is not lent to the hypervisor; [`Error::Busy`] if it has
    /// as many pins as can be counted.
    pub fn pin(&self, page: Hfn) -> Result<(), Error> {
        let records = self.pages.range(Pages::one(page))?;
        let _host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::SharedOwned, State::SharedBorrowed)?;
        for record in records {
            let count = record.count().checked_add(1).ok_or(Error::Busy)?;
            record.set_count(count);
            if count == 1 {
                self.platform().map(page);
            }
        }
        Ok(())
    }

    /// Undoes one [`pin`](Self::pin).
    ///
    /// # Errors
    /// [`Error::NotPermitted`] if the page is not pinned.
    pub fn unpin(&self, page: Hfn) -> Result<(), Error> {
        let records = self.pages.range(Pages::one(page))?;
        let _hyp = self.hyp.lock();
        for record in records {
            let count = record.count().checked_sub(1);
            if record.hyp() != State::SharedBorrowed {
                return Err(Error::NotPermitted);
            }
            let count = count.ok_or(Error::NotPermitted)?;
            record.set_count(count);
            if count == 0 {
                self.platform().unmap(page);
            }
        }
        Ok(())
    }

    /// The host gives pages to the hypervisor, which maps them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that makes no sense; [`Error::NotPermitted`] unless every
    /// page is the host's alone; [`Error::NoMemory`].
    pub fn host_donate_hyp(&self, pages: Pages) -> Result<(), Error> {
        let records = self.pages.range(pages)?;
        let mut host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::Owned, State::NoPage)?;
        host.reserve(&self.env(), pages)?;
        host.give_away(&self.env(), pages, Owner::Hyp)?;
        for (record, page) in records.iter().zip(pages.iter()) {
            record.set_host(State::NoPage);
            record.set_hyp(State::Owned);
            self.platform().map(page);
        }
        Ok(())
    }

    /// The hypervisor gives pages to the host: it wipes them first and forgets them.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] unless every page is the hypervisor's alone; [`Error::NoMemory`].
    pub fn hyp_donate_host(&self, pages: Pages) -> Result<(), Error> {
        self.donate_back(pages, true)
    }

    /// [`hyp_donate_host`](Self::hyp_donate_host); without `wipe` the caller has wiped the pages and
    /// the host may see what was written since.
    pub(crate) fn donate_back(&self, pages: Pages, wipe: bool) -> Result<(), Error> {
        let records = self.pages.range(pages)?;
        let mut host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::NoPage, State::Owned)?;
        if records.iter().any(|record| record.count() != 0) {
            return Err(Error::Busy);
        }
        host.reserve(&self.env(), pages)?;
        for (record, page) in records.iter().zip(pages.iter()) {
            // Wiped and cleaned while still mapped, then unmapped, then the host's.
            if wipe {
                self.platform().wipe(page);
            }
            self.platform().unmap(page);
            record.set_hyp(State::NoPage);
            record.set_host(State::Owned);
            record.set_order(0);
        }
        host.take_back(&self.env(), pages);
        Ok(())
    }

    /// The host lends pages to the secure world.
    ///
    /// # Errors
    /// [`Error::Invalid`], or [`Error::NotPermitted`] unless every page is the host's alone.
    pub fn host_share_ffa(&self, pages: Pages) -> Result<(), Error> {
        let records = self.pages.range(pages)?;
        let _host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::Owned, State::NoPage)?;
        for record in records {
            record.set_host(State::SharedOwned);
        }
        Ok(())
    }

    /// The host takes pages back from the secure world, which has agreed.
    ///
    /// # Errors
    /// [`Error::Invalid`], or [`Error::NotPermitted`] unless every page is lent to the secure
    /// world.
    pub fn host_unshare_ffa(&self, pages: Pages) -> Result<(), Error> {
        let records = self.pages.range(pages)?;
        let _host = self.host.lock();
        let _hyp = self.hyp.lock();
        expect(records, State::SharedOwned, State::NoPage)?;
        if records.iter().any(|record| record.shares() != 0) {
            return Err(Error::NotPermitted);
        }
        for record in records {
            record.set_host(State::Owned);
        }
        Ok(())
    }

    /// The host lends a page, or an aligned block of 512, to a guest that is not protected.
    /// Tables come from `tables`. Several guests, or one at several frames, may borrow one page.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another number of pages or unaligned ones; [`Error::NotPermitted`]
    /// unless the guest has nothing there and each page is the host's, lent to nobody but guests;
    /// [`Error::Busy`] if a page has as many borrowers as can be counted; [`Error::NoMemory`] if
    /// `tables` does not hold enough for the deepest path.
    pub(crate) fn host_share_guest(
        &self,
        vm: &Vm,
        tables: &mut Stack,
        pages: Pages,
        gfn: Gfn,
        access: Access,
    ) -> Result<(), Error> {
        if vm.protected {
            return Err(Error::NotPermitted);
        }
        let aligned = pages.start.is_aligned(BLOCK_PAGES) && gfn.is_aligned(BLOCK_PAGES);
        if pages.count != 1 && !(pages.count == BLOCK_PAGES && aligned) {
            return Err(Error::Invalid);
        }
        let records = self.pages.range(pages)?;
        let _host = self.host.lock();
        let mut guest = vm.guest.lock();
        guest.check_absent(&self.storage, gfn, pages.count)?;
        for record in records {
            let lent_to_guests = record.host() == State::SharedOwned && record.shares() > 0;
            if !(is_hosts_own(record) || lent_to_guests) {
                return Err(Error::NotPermitted);
            }
            if record.shares() == u32::MAX {
                return Err(Error::Busy);
            }
        }
        check_tables(&guest, tables)?;
        let mapping = Mapping {
            gfn,
            page: pages.start,
            pages: pages.count,
            access,
            state: State::SharedBorrowed,
        };
        guest.map(&self.storage, mapping, tables)?;
        for record in records {
            record.set_host(State::SharedOwned);
            record.set_shares(record.shares() + 1);
        }
        Ok(())
    }

    /// The host takes a page or block back from a guest that borrowed it.
    ///
    /// # Errors
    /// [`Error::NotFound`] if nothing is mapped; [`Error::TooBig`] if the mapping has another size;
    /// [`Error::Invalid`] if `gfn` is not its first frame; [`Error::NotPermitted`].
    pub(crate) fn host_unshare_guest(&self, vm: &Vm, gfn: Gfn, pages: u64) -> Result<(), Error> {
        if vm.protected {
            return Err(Error::NotPermitted);
        }
        if pages != 1 && pages != BLOCK_PAGES {
            return Err(Error::Invalid);
        }
        let _host = self.host.lock();
        let mut guest = vm.guest.lock();
        let (page, size, state) = match guest.look(&self.storage, gfn)? {
            GuestPage::Absent => return Err(Error::NotFound),
            GuestPage::Poisoned => return Err(Error::Poisoned),
            GuestPage::Mapped { page, pages, state } => (page, pages, state),
        };
        if size != pages {
            return Err(Error::TooBig);
        }
        if !gfn.is_aligned(pages) {
            return Err(Error::Invalid);
        }
        let records = self.pages.range(Pages {
            start: page,
            count: pages,
        })?;
        let lent = |record: &PageRecord| record.host() == State::SharedOwned && record.shares() > 0;
        if state != State::SharedBorrowed || !records.iter().all(lent) {
            return Err(Error::NotPermitted);
        }
        guest.unmap(&self.storage, gfn)?;
        for record in records {
            record.set_shares(record.shares() - 1);
            if record.shares() == 0 {
                record.set_host(State::Owned);
            }
        }
        Ok(())
    }

    /// The host gives a page to a protected guest. Tables come from `tables`.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] unless the page is the host's alone and the guest has nothing there;
    /// [`Error::NoMemory`].
    pub(crate) fn host_donate_guest(
        &self,
        vm: &Vm,
        tables: &mut Stack,
        page: Hfn,
        gfn: Gfn,
    ) -> Result<(), Error> {
        if !vm.protected {
            return Err(Error::NotPermitted);
        }
        let records = self.pages.range(Pages::one(page))?;
        let mut host = self.host.lock();
        let mut guest = vm.guest.lock();
        guest.check_absent(&self.storage, gfn, 1)?;
        if !records.iter().all(is_hosts_own) {
            return Err(Error::NotPermitted);
        }
        check_tables(&guest, tables)?;
        let owner = owner(vm.handle, gfn);
        owner.entry()?;
        host.reserve(&self.env(), Pages::one(page))?;
        // The host loses it before the guest has it.
        host.give_away(&self.env(), Pages::one(page), owner)?;
        for record in records {
            record.set_host(State::NoPage);
        }
        let mapping = Mapping {
            gfn,
            page,
            pages: 1,
            access: Access::all(),
            state: State::Owned,
        };
        guest.map(&self.storage, mapping, tables)
    }

    /// A protected guest lends a page of its own to the host.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the guest has nothing there, [`Error::TooBig`], [`Error::Poisoned`],
    /// [`Error::NotPermitted`] if the page is lent already.
    pub(crate) fn guest_share_host(&self, vm: &Vm, gfn: Gfn) -> Result<(), Error> {
        let mut host = self.host.lock();
        let mut guest = vm.guest.lock();
        let (page, state) = guest.page(&self.storage, gfn)?;
        let records = self.pages.range(Pages::one(page))?;
        if state != State::Owned {
            return Err(Error::NotPermitted);
        }
        expect(records, State::NoPage, State::NoPage)?;
        host.reserve(&self.env(), Pages::one(page))?;
        guest.set_state(&self.storage, gfn, State::SharedOwned)?;
        for record in records {
            record.set_host(State::SharedBorrowed);
        }
        host.take_back(&self.env(), Pages::one(page));
        Ok(())
    }

    /// A protected guest takes a page back that it had lent to the host.
    ///
    /// # Errors
    /// As [`guest_share_host`](Self::guest_share_host).
    pub(crate) fn guest_unshare_host(&self, vm: &Vm, gfn: Gfn) -> Result<(), Error> {
        let mut host = self.host.lock();
        let mut guest = vm.guest.lock();
        let (page, state) = guest.page(&self.storage, gfn)?;
        let records = self.pages.range(Pages::one(page))?;
        if state != State::SharedOwned {
            return Err(Error::NotPermitted);
        }
        expect(records, State::SharedBorrowed, State::NoPage)?;
        host.reserve(&self.env(), Pages::one(page))?;
        host.give_away(&self.env(), Pages::one(page), owner(vm.handle, gfn))?;
        for record in records {
            record.set_host(State::NoPage);
        }
        guest.set_state(&self.storage, gfn, State::Owned)
    }

    /// The host gets a page of a dying guest back. A page that the guest had not lent is wiped.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such VM or it is not dying; [`Error::NotFound`] if nothing
    /// is mapped there; [`Error::NotPermitted`] for what the guest only borrows.
    pub fn reclaim_dying_guest_page(&self, handle: Handle, gfn: Gfn) -> Result<(), Error> {
        let vms = self.vms.lock();
        let vm = vms.find(handle).ok_or(Error::Invalid)?;
        if !vms.is_dying(handle) {
            return Err(Error::Invalid);
        }
        let mut host = self.host.lock();
        let mut guest = vm.guest.lock();
        let (page, state) = match guest.page(&self.storage, gfn) {
            // What was taken by force is the host's already.
            Err(Error::Poisoned) => return Ok(()),
            found => found?,
        };
        let records = self.pages.range(Pages::one(page))?;
        let host_state = match state {
            State::Owned => State::NoPage,
            State::SharedOwned => State::SharedBorrowed,
            State::SharedBorrowed | State::NoPage => return Err(Error::NotPermitted),
        };
        expect(records, host_state, State::NoPage)?;
        host.reserve(&self.env(), Pages::one(page))?;
        guest.unmap(&self.storage, gfn)?;
        if state == State::Owned {
            self.platform().wipe(page);
        }
        for record in records {
            record.set_host(State::Owned);
        }
        host.take_back(&self.env(), Pages::one(page));
        Ok(())
    }

    /// The host takes a page from whichever guest has it. The page is wiped and the guest can never
    /// use that frame again.
    ///
    /// # Errors
    /// [`Error::Fault`] for what is not memory; [`Error::Again`] if the host has the page after
    /// all, or the guest is gone; [`Error::NotPermitted`] if the hypervisor has it or the guest has
    /// lent it.
    pub fn force_reclaim_guest_page(&self, page: Hfn) -> Result<(), Error> {
        let pages = Pages::one(page);
        let records = self.pages.range(pages).map_err(|_| Error::Fault)?;
        let vms = self.vms.lock();
        let mut host = self.host.lock();
        for record in records {
            match record.host() {
                State::NoPage => {}
                // The guest has lent it: it is the host's to use already.
                State::SharedBorrowed => return Err(Error::NotPermitted),
                State::Owned | State::SharedOwned => return Err(Error::Again),
            }
        }
        let (number, gfn) = match host.owner(&self.env(), page) {
            Some(Owner::Guest { handle, gfn }) => (handle, Gfn::new(gfn)),
            _ => return Err(Error::NotPermitted),
        };
        let handle = Handle::new(u64::from(number)).ok_or(Error::Again)?;
        let vm = vms.find(handle).ok_or(Error::Again)?;
        let mut guest = vm.guest.lock();
        let found = guest.page(&self.storage, gfn);
        if found != Ok((page, State::Owned)) {
            return Err(Error::NotPermitted);
        }
        host.reserve(&self.env(), pages)?;
        guest.poison(&self.storage, gfn)?;
        self.platform().wipe(page);
        for record in records {
            record.set_host(State::Owned);
        }
        host.take_back(&self.env(), pages);
        Ok(())
    }
}

fn owner(handle: Handle, gfn: Gfn) -> Owner {
    Owner::Guest {
        handle: handle.get() as u16,
        gfn: gfn.get(),
    }
}

/// Whether there are pages for every table that one mapping may need.
fn check_tables(guest: &Guest, tables: &Stack) -> Result<(), Error> {
    if tables.count() < u64::from(guest.geometry().tables_per_page()) {
        return Err(Error::NoMemory);
    }
    Ok(())
}
