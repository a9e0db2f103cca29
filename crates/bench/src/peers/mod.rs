//! Other crates that do the same work.

pub(crate) mod aarch64_paging;
pub(crate) mod axaddrspace;
pub(crate) mod hyperlight;
pub(crate) mod page_table_generic;
pub(crate) mod page_table_multiarch;
pub(crate) mod rangemap;
pub(crate) mod vm_memory;
pub(crate) mod x86_64;

use crate::mapper::{Mapper, Work};
use crate::pool;
use anyhow::Result;

/// Every crate that can do `work`, each with an empty table. The pool has `tables` pages for each of
/// them, and as many again for ours and for the floor.
pub(crate) fn mappers(work: Work, tables: u64) -> Result<Vec<Box<dyn Mapper>>> {
    const CRATES: u64 = 5;
    pool::reserve(tables * (CRATES + 2))?;
    let all: [Box<dyn Mapper>; CRATES as usize] = [
        Box::new(page_table_multiarch::PageTableMultiarch::new()?),
        Box::new(page_table_generic::PageTableGeneric::new()?),
        Box::new(x86_64::X86_64::new()?),
        Box::new(aarch64_paging::Aarch64Paging::new()),
        Box::new(hyperlight::Hyperlight::new()?),
    ];
    Ok(all.into_iter().filter(|peer| peer.can(work)).collect())
}
