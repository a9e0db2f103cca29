//! Stacks of pages linked through their first words.
//!
//! The host hands pages over for tables in such a stack (a memory cache) and gets them back in
//! one. The hypervisor keeps its own, of pages that it owns, in the same way.

use crate::error::Error;
use crate::platform::{Platform, read, split, write};
use twofold_arch::{Hfn, Hpa};
use twofold_table::{PageSource, TablePage};

/// Pages that belong to the hypervisor, zero but for the link.
#[derive(Debug, Default)]
pub(crate) struct Stack {
    head: Option<Hfn>,
    count: u64,
}

impl Stack {
    pub(crate) const fn new() -> Self {
        Self {
            head: None,
            count: 0,
        }
    }

    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// Adds a zeroed page.
    pub(crate) fn push<P: Platform>(&mut self, platform: &P, page: Hfn) {
        // Address 0 could be a page; the link says "one more than the frame", or none.
        write(
            platform,
            page,
            0,
            self.head.map_or(0, |head| head.get() + 1),
        );
        self.head = Some(page);
        self.count += 1;
    }

    /// A zeroed page.
    pub(crate) fn pop<P: Platform>(&mut self, platform: &P) -> Option<Hfn> {
        let page = self.head?;
        let link = read(platform, page, 0);
        self.head = link.checked_sub(1).map(Hfn::new);
        self.count -= 1;
        write(platform, page, 0, 0);
        Some(page)
    }
}

/// Tables from a stack.
pub(crate) struct StackSource<'a, P> {
    pub(crate) stack: &'a mut Stack,
    pub(crate) platform: &'a P,
}

impl<P: Platform> PageSource for StackSource<'_, P> {
    #[expect(unsafe_code)]
    fn take(&mut self) -> Option<TablePage> {
        let page = self.stack.pop(self.platform)?;
        // UNSAFETY: a table page is declared here.
        // SAFETY: the stack's pages are the hypervisor's until they are given back at teardown,
        // after the tables.
        Some(unsafe { TablePage::assume(page.address()) })
    }

    fn give_back(&mut self, page: TablePage) {
        let page = page.hpa().frame();
        self.platform.wipe(page);
        self.stack.push(self.platform, page);
    }
}

/// A host's stack, in two words of memory that the host shares: the address of the first page (0
/// for none) and the number of pages. Each page's first word has the address of the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostStack {
    page: Hfn,
    index: usize,
}

impl HostStack {
    /// The stack whose two words are at `address`, in a page that is pinned.
    pub(crate) fn at(address: Hpa) -> Result<Self, Error> {
        let (page, index) = split(address.get()).ok_or(Error::Invalid)?;
        Ok(Self { page, index })
    }

    /// The first page's address and the count, each read once.
    pub(crate) fn read<P: Platform>(&self, platform: &P) -> (u64, u64) {
        (
            read(platform, self.page, self.index),
            read(platform, self.page, self.index + 1),
        )
    }

    /// Writes both.
    pub(crate) fn write<P: Platform>(&self, platform: &P, head: u64, count: u64) {
        write(platform, self.page, self.index, head);
        write(platform, self.page, self.index + 1, count);
    }
}
