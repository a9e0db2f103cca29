//! The formats that the MMU can write.

/// A second-stage format with the software bits that the MMU keeps in its entries.
pub trait MmuFormat: 'static {}

/// Intel's extended page tables.
#[derive(Clone, Copy, Debug)]
pub enum Ept {}

/// AMD's nested page tables.
#[derive(Clone, Copy, Debug)]
pub enum Npt {}

impl MmuFormat for Ept {}
impl MmuFormat for Npt {}
