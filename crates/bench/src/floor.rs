//! What no implementation can undercut: the loads and stores alone, into memory that is there.

use crate::huge::Huge;
use crate::pool;
use anyhow::{Context, Result};
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::PAGE_SIZE;

/// As many entries as there are pages, in one piece.
pub(crate) struct Entries {
    memory: Huge,
    count: usize,
}

impl Entries {
    /// An entry for each of `pages`.
    ///
    /// # Errors
    /// If the machine does not have that much memory.
    pub(crate) fn new(pages: u64) -> Result<Self> {
        let mut entries = Self {
            memory: Huge::new(pages * 8)?,
            count: pages as usize,
        };
        entries.store(0);
        Ok(entries)
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "UNSAFETY: entries are reached by address")]
    const fn all(&self) -> &[AtomicU64] {
        let start = std::ptr::with_exposed_provenance(self.memory.address() as usize);
        // SAFETY: the memory is large enough, aligned, initialised, lives as long as `self`, and is
        // used as atomic integers only, or with `&mut self`.
        unsafe { std::slice::from_raw_parts(start, self.count) }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "UNSAFETY: entries are reached by address")]
    const fn all_mut(&mut self) -> &mut [u64] {
        let start = std::ptr::with_exposed_provenance_mut(self.memory.address() as usize);
        // SAFETY: as in `all`, and `&mut self` is the only user.
        unsafe { std::slice::from_raw_parts_mut(start, self.count) }
    }

    /// A plain store into every entry.
    pub(crate) fn store(&mut self, value: u64) {
        black_box(self.all_mut()).fill(black_box(value));
    }

    /// A plain load, change and store of every entry.
    pub(crate) fn update(&mut self, change: impl Fn(u64) -> u64) {
        for entry in black_box(self.all_mut()) {
            *entry = change(*entry);
        }
    }

    /// A locked exchange of each entry of `range`, every `step`th.
    pub(crate) fn exchange(&self, range: Range<u64>, step: usize) {
        for page in range.step_by(step) {
            self.exchange_one(page);
        }
    }

    /// A locked exchange of one entry.
    #[inline(always)]
    pub(crate) fn exchange_one(&self, page: u64) {
        self.all()[page as usize].swap(page | 7, Ordering::AcqRel);
    }

    /// A load of every entry, in words of a clean bitmap.
    pub(crate) fn load(&self) -> u64 {
        self.all()
            .iter()
            .fold(0, |any, entry| any | entry.load(Ordering::Relaxed))
    }
}

/// Four levels of bare tables: each entry is the address of the next table, without any other bit.
pub(crate) struct BareTables {
    root: u64,
    pages: Vec<u64>,
}

impl BareTables {
    /// Tables for `bytes` from 0.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let mut tables = Self {
            root: 0,
            pages: Vec::new(),
        };
        tables.root = tables.build(3, bytes)?;
        Ok(tables)
    }

    fn build(&mut self, height: u32, bytes: u64) -> Result<u64> {
        let page = pool::take().context("the pool is empty")?;
        self.pages.push(page);
        let covered = PAGE_SIZE << (9 * height);
        for index in 0..512.min(bytes.div_ceil(covered)) {
            let value = match height {
                0 => index,
                _ => self.build(height - 1, covered.min(bytes - index * covered))?,
            };
            entry(page, index).store(value, Ordering::Relaxed);
        }
        Ok(page)
    }

    /// Four loads for each of `gpas`.
    pub(crate) fn find_all(&self, gpas: &[u64]) -> u64 {
        gpas.iter().fold(0, |sum, gpa| {
            let leaf = [39, 30, 21, 12].iter().fold(self.root, |page, shift| {
                entry(page, gpa >> shift & 511).load(Ordering::Relaxed)
            });
            sum.wrapping_add(leaf)
        })
    }
}

#[inline(always)]
#[expect(unsafe_code, reason = "UNSAFETY: tables are reached by address")]
fn entry(page: u64, index: u64) -> &'static AtomicU64 {
    let entries = std::ptr::with_exposed_provenance_mut::<u64>(page as usize);
    // SAFETY: only tables of `BareTables`, whose pages the pool never frees, come here, and indices
    // below 512.
    unsafe { AtomicU64::from_ptr(entries.add(index as usize)) }
}

impl Drop for BareTables {
    fn drop(&mut self) {
        for page in self.pages.drain(..) {
            pool::give_back(page);
        }
    }
}
