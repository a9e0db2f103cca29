//! What a table crate can do: the work of the rows about tables, in the words of none of them.

use anyhow::{Result, ensure};
use std::ops::Range;
use twofold_arch::{Level, PAGE_SIZE};

/// Host-physical address of guest-physical address 0 in every table of the benchmark.
pub(crate) const HOST_BASE: u64 = 1 << 40;

/// Work that not every crate can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Work {
    /// [`Mapper::map`] with 4K leaves.
    Map4K,
    /// [`Mapper::map`] with 2M leaves.
    Map2M,
    /// [`Mapper::split`].
    Split,
    /// [`Mapper::write_protect`].
    WriteProtect,
    /// [`Mapper::unmap`].
    Unmap,
}

/// What a page is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    /// The host-physical address of the page.
    pub(crate) hpa: u64,
    /// Whether the guest may write.
    pub(crate) writable: bool,
}

/// A table that maps the guest-physical addresses from 0 to [`HOST_BASE`] and what follows, in one
/// piece. `bytes` are multiples of 1 GiB, counted from guest-physical address 0. Tables come from
/// the pool and go back to it when the mapper is dropped.
pub(crate) trait Mapper {
    /// The crate's name.
    fn name(&self) -> &'static str;

    /// Whether the crate has an operation for this work.
    fn can(&self, work: Work) -> bool;

    /// Starts again with an empty table. Not measured.
    fn clear(&mut self) -> Result<()>;

    /// Maps `bytes`, writable, where nothing is mapped, with leaves of this level.
    fn map(&mut self, bytes: u64, level: Level) -> Result<()>;

    /// Splits every 2M leaf of `bytes` into 4K leaves.
    fn split(&mut self, bytes: u64) -> Result<()>;

    /// Takes the permission to write from every 4K leaf of `bytes`.
    fn write_protect(&mut self, bytes: u64) -> Result<()>;

    /// Unmaps `bytes` and gives all tables back, except perhaps the root.
    fn unmap(&mut self, bytes: u64) -> Result<()>;

    /// What the page at `gpa` is mapped to.
    fn find(&self, gpa: u64) -> Option<Found>;

    /// [`find`](Self::find) for each of `gpas`: the sum of what is found.
    fn find_all(&self, gpas: &[u64]) -> u64 {
        gpas.iter()
            .filter_map(|&gpa| self.find(gpa))
            .fold(0, |sum, found| sum.wrapping_add(found.hpa))
    }
}

/// Makes sure, by samples, that `mapper` has mapped `range` as asked.
pub(crate) fn check(mapper: &dyn Mapper, range: Range<u64>, writable: bool) -> Result<()> {
    let last = range.end - PAGE_SIZE;
    for gpa in range.clone().step_by((17 << 21) + 4096).chain([last]) {
        let wanted = Found {
            hpa: HOST_BASE + gpa,
            writable,
        };
        let found = mapper.find(gpa);
        ensure!(
            found == Some(wanted),
            "{} maps {gpa:#x} to {found:x?}, not {wanted:x?}",
            mapper.name()
        );
    }
    Ok(())
}
