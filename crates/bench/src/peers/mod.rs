//! Other crates that do the same work.

pub(crate) mod aarch64_paging;
pub(crate) mod axaddrspace;
pub(crate) mod hyperlight;
pub(crate) mod page_table_generic;
pub(crate) mod page_table_multiarch;
pub(crate) mod vm_memory;
pub(crate) mod x86_64;

use crate::mapper::Mapper;
use anyhow::Result;

/// Every crate that is a [`Mapper`], each with an empty table.
pub(crate) fn mappers() -> Result<Vec<Box<dyn Mapper>>> {
    Ok(vec![
        Box::new(page_table_multiarch::PageTableMultiarch::new()?),
        Box::new(page_table_generic::PageTableGeneric::new()?),
        Box::new(x86_64::X86_64::new()?),
        Box::new(aarch64_paging::Aarch64Paging::new()),
        Box::new(hyperlight::Hyperlight::new()?),
    ])
}
