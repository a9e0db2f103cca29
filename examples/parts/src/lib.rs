//! What the small VMMs in `examples/` have in common. Like them it is written in the ordinary calls
//! of the KVM API.

mod file;
mod long_mode;
mod memory;

pub use file::{cannot_map, punch_hole};
pub use long_mode::enter_long_mode;
pub use memory::Memory;
