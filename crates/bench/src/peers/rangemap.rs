//! `rangemap`: which frames are private, as ranges in a sorted map.

use ::rangemap::RangeMap;
use std::ops::Range;

/// Frames that are private; all others are shared.
#[derive(Default)]
pub(crate) struct Attributes(RangeMap<u64, ()>);

impl Attributes {
    /// Makes `gfns`, which is not empty, private or shared.
    pub(crate) fn set(&mut self, gfns: Range<u64>, private: bool) {
        if private {
            self.0.insert(gfns, ());
        } else {
            self.0.remove(gfns);
        }
    }

    /// Whether a frame is private.
    pub(crate) fn is_private(&self, gfn: u64) -> bool {
        self.0.contains_key(&gfn)
    }
}
