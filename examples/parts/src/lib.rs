//! What the small VMMs in `examples/` have in common. Like them it is written in the ordinary calls
//! of the KVM API.

mod file;
mod memory;
mod modes;

pub use file::{cannot_map, punch_hole};
pub use memory::Memory;
pub use modes::{enter_flat_mode, enter_long_mode};
