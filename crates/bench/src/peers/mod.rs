//! Other crates that do the same work.

pub(crate) mod axaddrspace;
pub(crate) mod vm_memory;
